"""Cases, their parameters and inputs, and gradients rebuilt from their rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.layers.layer import leaves_from_matrix
from optax_cgfac.operators.rows import to_dense
from optax_cgfac.utils.paths import leaves_by_path, text

NUM_EXAMPLES = N = 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


BATCH = normal(0, N, 5)
SEQUENCE = normal(0, N, 5, 4)
IMAGE = normal(0, N, 5, 4, 2)
TOKENS = jnp.asarray(
    [[0, 3, 1], [2, 2, 5], [6, 0, 4], [1, 1, 1], [5, 6, -1], [3, 2, 0]]
)


def loss_of(model_fn):
    """A loss under which no gradient vanishes: a norm's squares add to a constant."""

    def loss(params, inputs):
        outputs = model_fn(params, inputs)
        outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
        outputs = outputs.reshape(N, -1)
        weights = jnp.linspace(0.5, 1.5, outputs.shape[-1], dtype=outputs.dtype)
        return jnp.mean(jnp.sum(weights * (outputs - 0.3) ** 2, -1))

    return loss


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its parameters and a batch.

    Attributes:
      model_fn: ``(params, inputs) -> outputs``, examples first.
      params: The parameters in whatever form the case is about; a module of NNX.
      inputs: Any pytree.
      layers: The layers that must be covered: kind and positions by name.
      input_axes: As in `fisher_estimator`.
    """

    model_fn: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    layers: dict[str, tuple[str, int]]
    input_axes: Any = "auto"

    @property
    def model(self):
        return self.params

    @property
    def loss(self):
        return loss_of(self.model_fn)


def of(layers):
    """Expected layers, written ``"kind positions name name, kind positions name"``."""
    found = {}
    for part in layers.split(", "):
        kind, positions, *names = part.split()
        found |= dict.fromkeys(names, (kind, int(positions)))
    return found


def moved(params):
    """Parameters with biases that are not zero and scales that are not one."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def init(model, inputs, **kwargs):
    """Parameters of a Linen model with biases that are not zero."""
    variables = jax.jit(lambda: model.init(jax.random.key(1), inputs, **kwargs))()
    return moved(variables["params"])


def rebuild_gradients(curvature, like):
    """The gradient of every covered leaf as ``aᵀg / N``, summed in float64."""
    leaves, rebuilt = leaves_by_path(like), {}
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        a, g = (np.asarray(x, np.float64) for x in (to_dense(rows.a), rows.g))
        own = {path: leaves[path] for path in tag.leaves}
        rebuilt |= leaves_from_matrix(tag, jnp.asarray(a.mT @ g / N), own)
    return {text(path): np.asarray(leaf, np.float64) for path, leaf in rebuilt.items()}


def assert_close(actual, expected, tolerance, zeros=()):
    """Compares leaves by the norm of their difference; some may be rounding alone."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        norm = np.linalg.norm(value)
        if name in zeros:
            assert np.abs(actual[name]).max() < 1e-5
            continue
        assert norm > 0, f"{name}: the case shows nothing, its gradient is zero"
        difference = np.linalg.norm(np.asarray(actual[name]) - value)
        assert difference <= tolerance * norm, (name, difference / norm)


def by_name(tree):
    leaves = leaves_by_path(tree)
    return {text(path): np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
