"""Small random layers and models that several tests share."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class LayerProblem(NamedTuple):
    """Rows of a dense layer, a right-hand side and a warm start."""

    a: jax.Array
    g: jax.Array
    b: jax.Array
    x0: jax.Array


def layer_problem(num_rows, n_in, n_out, *, bias=False, seed=0, dtype="float64"):
    """A dense layer's problem; a bias is one more input that is always one."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(num_rows, n_in))
    if bias:
        a = np.concatenate([a, np.ones((num_rows, 1))], -1)
    g = rng.normal(size=(num_rows, n_out))
    shape = a.shape[1], n_out
    arrays = a, g, rng.normal(size=shape), rng.normal(size=shape)
    return LayerProblem(*(jnp.asarray(x, dtype) for x in arrays))


def stack_problems(problems):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)


class Diagonal(NamedTuple):
    """An operator, as a preconditioner of one's own."""

    entries: jax.Array

    def matvec(self, vector):
        return self.entries * vector


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def ravel(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


class MLP(nn.Module):
    """Dense layers with an activation in between."""

    widths: tuple[int, ...]
    use_bias: bool | tuple[bool, ...] = True
    activation: str | None = "tanh"
    dtype: str = "float64"

    @nn.compact
    def __call__(self, x):
        use_bias = np.broadcast_to(self.use_bias, len(self.widths)).tolist()
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=use_bias[index], param_dtype=self.dtype)(x)
            if self.activation and index + 1 < len(self.widths):
                x = getattr(nn, self.activation)(x)
        return x


def model_problem(model, input_shape, seed=0):
    """Returns ``model_fn``, random parameters (biases too) and inputs."""
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=input_shape), model.dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype), shapes
    )

    def model_fn(params, inputs):
        return model.apply({"params": params}, inputs)

    return model_fn, params, inputs


def layer_matrix(layer):
    """A dense layer's parameters as one matrix, the bias below the kernel."""
    bias = [layer["bias"][None]] if "bias" in layer else []
    return jnp.concatenate([layer["kernel"], *bias])


def layer_from_matrix(matrix, like):
    if "bias" not in like:
        return {"kernel": matrix}
    return {"kernel": matrix[:-1], "bias": matrix[-1]}
