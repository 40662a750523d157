"""Cases, their parameters and inputs, and gradients rebuilt from their rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      layouts: Functions from a layer's matrix (inputs, outputs) to a leaf, by the
        leaf's name, where `rebuild_gradients` cannot infer the layout.
      input_axes: As in `fisher_estimator`.
    """

    model_fn: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    layers: dict[str, tuple[str, int]]
    layouts: dict[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
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


def rebuild_gradients(curvature, like, layouts=None):
    """The gradient of every covered leaf as ``aᵀg / N``, in float64 by NumPy.

    Shares no code with the package, so it does not share mistakes of the matrix form.
    """
    shapes = {
        "/".join(_names(path)): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    rebuilt = {}
    for tag in curvature.tags:
        a, g = curvature.layers[tag.name]
        a, g = _dense_rows(a), np.asarray(g, np.float64)
        matrix = np.einsum("...ri,...ro->...io", a, g) / N
        if tag.kernel is None:
            start = 0
            for path in tag.leaves:
                shape = shapes["/".join(path)]
                end = start + (shape[-1] if shape else 1)
                part = matrix[..., 0, start:end]
                rebuilt["/".join(path)] = part.reshape(shape)
                start = end
            assert start == matrix.shape[-1]
            continue
        kernel = "/".join(tag.kernel)
        if tag.bias is not None:
            bias = "/".join(tag.bias)
            rebuilt[bias] = matrix[..., -1, :].reshape(shapes[bias])
            matrix = matrix[..., :-1, :]
        if layouts and kernel in layouts:
            matrix = layouts[kernel](matrix)
        elif tag.kind.startswith("conv"):
            matrix = _conv_kernel(matrix, shapes[kernel])
        elif tag.kind == "attend" or tag.kind.startswith("embed"):
            assert matrix.shape == shapes[kernel]
        rebuilt[kernel] = matrix.reshape(shapes[kernel])
    return rebuilt


def _conv_kernel(matrix, shape):
    """``(taps · c, o)`` to the kernel: ``(*taps, c, o)``, groups or transposed."""
    num_groups = shape[-1] // matrix.shape[-1]
    if num_groups > 1 and matrix.shape[:-2][-1:] == (num_groups,):
        # (groups, taps · c, o) -> (taps · c, groups, o)
        return np.moveaxis(matrix, -3, -2)
    if shape[-2] == matrix.shape[-1] != shape[-1]:  # transposed: (*taps, o, c)
        return matrix.reshape(-1, shape[-1], shape[-2]).swapaxes(-1, -2)
    return matrix


def _dense_rows(a):
    """Rows as an array, one-hot ones spelled out."""
    if hasattr(a, "top"):
        return np.concatenate([_dense_rows(a.top), _dense_rows(a.bottom)], -2)
    if hasattr(a, "indices"):
        one_hot = np.eye(a.size)[np.asarray(a.indices)]
        return one_hot * np.asarray(a.weights, np.float64)[..., None]
    return np.asarray(a, np.float64)


def by_name(tree):
    return {
        "/".join(_names(path)): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _names(path):
    names = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
    return names[:-1] if names[-1] == "value" else names
