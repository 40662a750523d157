"""What the curvature of a model does when its loss, batch or inputs are transformed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import oracles
import problems
from optax_cgfac import value_and_grad
from strategies import factors, precision, properties

# (examples, inputs, widths, biases): programs that the examples of a property share.
MODELS = (
    (1, 3, (2,), True),
    (6, 3, (3, 2), True),
    (4, 2, (4, 3), (False, True)),
)


def make(model, dtype, seed):
    """Returns the model, its parameters, inputs and targets, in NumPy."""
    num_examples, n_in, widths, use_bias = model
    module = problems.MLP(widths, use_bias=use_bias, dtype=dtype)
    _, params, x = problems.model_problem(module, (num_examples, n_in), seed)
    y = np.random.default_rng(seed).normal(size=(num_examples, widths[-1]))
    return module, params, x, jnp.asarray(y, dtype)


drawn = {
    "model": st.sampled_from(MODELS),
    "dtype": st.sampled_from(("float64", "float32")),
    "seed": st.integers(0, 2**32 - 1),
}


def structures(curvature):
    """Every exact structure as dense matrices."""
    dense = {("full", "all"): curvature.operator(None, structure="full").to_dense()}
    for structure in ("kronecker", "block"):
        for tag in curvature.tags:
            operator = curvature.operator(tag.name, structure=structure)
            dense[structure, tag.name] = operator.to_dense()
    return dense


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(module, params, x, y, weight=1.0, copies=1):
    """The gradient and the curvature of copies of a batch."""

    def loss(params, x, y):
        outputs = module.apply({"params": params}, x)
        return weight * jnp.mean(jnp.sum((outputs - y) ** 2, -1))

    x, y = (jnp.concatenate([z] * copies) for z in (x, y))
    _, grads, curvature = value_and_grad(loss, num_examples=len(x))(params, x, y)
    return grads, structures(curvature)


def assert_same(actual, expected, allowed):
    for name, matrix in expected.items():
        matrix = oracles.float64(matrix)
        difference = oracles.float64(actual[name]) - matrix
        assert np.linalg.norm(difference) <= allowed * np.linalg.norm(matrix), name


@properties
@given(**drawn, weight=factors(1e-2, 1e2))
def test_a_loss_times_c_has_a_curvature_times_c_squared(model, dtype, seed, weight):
    with precision(dtype):
        given = make(model, dtype, seed)
        _, expected = run(*given)
        _, found = run(*given, weight)
    found = {name: oracles.float64(x) / weight**2 for name, x in found.items()}
    assert_same(found, expected, oracles.tolerance(dtype))


@properties
@given(**drawn)
def test_a_batch_repeated_twice_is_the_batch(model, dtype, seed):
    with precision(dtype):
        given = make(model, dtype, seed)
        grads, expected = run(*given)
        same_grads, found = run(*given, 1.0, 2)
    assert_same(found, expected, oracles.tolerance(dtype))
    leaves = zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True)
    for actual, leaf in leaves:
        size = np.linalg.norm(leaf) + np.finfo(dtype).tiny
        assert np.linalg.norm(actual - leaf) <= oracles.tolerance(dtype, 10) * size


@properties
@given(**drawn, scale=factors(0.1, 10))
def test_inputs_times_c_and_weights_over_c_transform_the_first_layer(
    model, dtype, seed, scale
):
    """The function stays, and ``F`` changes with the parameters' coordinates.

    With ``W = W'/c`` the gradient is ``T ∇`` and the curvature ``T F T``, ``T`` being
    ``c`` for the kernel and 1 for everything else.
    """
    with precision(dtype):
        module, params, x, y = make(model, dtype, seed)
        old_grads, expected = run(module, params, x, y)
        first = params["Dense_0"] | {"kernel": params["Dense_0"]["kernel"] / scale}
        grads, found = run(module, params | {"Dense_0": first}, scale * x, y)
    kernel = oracles.float64(old_grads["Dense_0"]["kernel"])
    error = oracles.float64(grads["Dense_0"]["kernel"]) / scale - kernel
    allowed = oracles.tolerance(dtype, 100)
    assert np.linalg.norm(error) <= allowed * (np.linalg.norm(kernel) + 1e-30)
    for (structure, name), matrix in expected.items():
        change = np.ones(len(matrix))
        if name in ("all", "Dense_0"):
            change[: kernel.size] = scale
        predicted = change[:, None] * oracles.float64(matrix) * change
        assert_same(found, {(structure, name): predicted}, allowed)
