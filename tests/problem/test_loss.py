"""Losses against Optax's, their Hessians against automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from optax_cgfac.problem.loss import get_loss

NAMES = ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "squared_error"]
CLASSES = 4


def optax_value(name, outputs, targets):
    if name == "softmax_cross_entropy":
        if targets.ndim < outputs.ndim:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return optax.softmax_cross_entropy(outputs, targets)
    return jnp.sum(getattr(optax, name)(outputs, targets), -1)


def example(name, dtype, shape=(2, 3)):
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(*shape, CLASSES)), dtype)
    if name == "softmax_cross_entropy":
        targets = jnp.asarray(rng.integers(CLASSES, size=shape))
    elif name == "sigmoid_binary_cross_entropy":
        targets = jnp.asarray(rng.integers(2, size=outputs.shape), dtype)
    else:
        targets = jnp.asarray(rng.normal(size=outputs.shape), dtype)
    return outputs, targets


def dense_hessians(name, outputs, targets):
    """Of Optax's value, for every prediction: shape ``(*shape, C, C)``."""
    hessian = jax.hessian(lambda z, t: optax_value(name, z, t))
    for _ in range(outputs.ndim - 1):
        hessian = jax.vmap(hessian)
    return jax.jit(hessian)(outputs, targets)


@pytest.mark.parametrize("name", NAMES)
def test_the_value_is_that_of_optax_summed_over_the_last_axis(name, dtype):
    outputs, targets = example(name, dtype)
    value = get_loss(name).value(outputs, targets)
    assert value.dtype == dtype
    assert oracles.relative_error(value, optax_value(name, outputs, targets)) < (
        oracles.tolerance(dtype)
    )


def test_other_forms_of_labels_have_the_same_value(dtype):
    value = get_loss("softmax_cross_entropy").value
    outputs, labels = example("softmax_cross_entropy", dtype)
    one_hot = jax.nn.one_hot(labels, CLASSES, dtype=dtype)
    soft = jax.nn.softmax(outputs[::-1])
    close = functools.partial(np.testing.assert_allclose, rtol=oracles.tolerance(dtype))
    close(value(outputs, one_hot), value(outputs, labels))
    close(value(outputs, soft), optax.softmax_cross_entropy(outputs, soft))
    value = get_loss("sigmoid_binary_cross_entropy").value
    outputs, targets = example("sigmoid_binary_cross_entropy", dtype)
    close(value(outputs, targets.astype(bool)), value(outputs, targets))


@pytest.mark.parametrize("name", NAMES)
def test_hessian_products_and_columns_equal_the_dense_hessian(name, dtype):
    outputs, targets = example(name, dtype)
    tangents = jnp.asarray(np.random.default_rng(1).normal(size=outputs.shape), dtype)
    product = get_loss(name).hessian_product(outputs, tangents)
    columns = get_loss(name).hessian_columns(outputs)
    assert columns.shape == (CLASSES, *outputs.shape)
    dense = dense_hessians(name, outputs, targets)
    for found, expected in (
        (product, np.einsum("...ij,...j->...i", dense, tangents)),
        (jnp.einsum("c...i,c...j->...ij", columns, columns), dense),
    ):
        assert found.dtype == dtype
        assert oracles.relative_error(found, expected) < oracles.tolerance(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_at_sampled_targets_have_mean_zero_and_the_hessian_as_covariance(
    name, dtype
):
    num_samples = 20_000
    loss = get_loss(name)
    z = example(name, dtype)[0][0, 0]
    outputs = jnp.broadcast_to(z, (num_samples, CLASSES))

    @jax.jit
    def sample(key, outputs):
        targets = loss.sample(key, outputs)
        return targets, jax.grad(lambda z: jnp.sum(loss.value(z, targets)))(outputs)

    targets, gradient = sample(jax.random.key(0), outputs)
    gradient, target = oracles.float64(gradient), targets[0]
    hessian = oracles.float64(dense_hessians(name, z, target))
    products = gradient[:, :, None] * gradient[:, None, :]

    def assert_within_five_sigma(samples, expected):
        sigma = samples.std(0) / np.sqrt(num_samples)
        error = np.abs(samples.mean(0) - expected)
        assert np.all(error <= 5 * sigma + oracles.tolerance(dtype))

    assert_within_five_sigma(gradient, 0)
    assert_within_five_sigma(products, hessian)


@pytest.mark.parametrize("name", NAMES[:2])
def test_extreme_logits_keep_curvature_and_gradient_finite(name):
    loss = get_loss(name)
    outputs = jnp.array([[1e4, -1e4, 0.0, 1e3]])
    targets = loss.sample(jax.random.key(0), outputs)
    gradient = jax.grad(lambda z: jnp.sum(loss.value(z, targets)))(outputs)
    product = loss.hessian_product(outputs, jnp.ones_like(outputs))
    columns = loss.hessian_columns(outputs)
    for array in (gradient, product, columns):
        assert np.all(np.isfinite(array))
