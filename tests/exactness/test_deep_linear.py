"""Deep linear networks with squared error: K-FAC's factorisation is exact there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import fisher_estimator

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = ["Dense_0", "Dense_1", "Dense_2"]


def network(num_examples, use_bias):
    model = problems.MLP((4, 3, 2), use_bias=use_bias, activation=None)
    return problems.model_problem(model, (num_examples, 5))


def captured(model_fn, params, inputs, kind):
    estimator = fisher_estimator(
        model_fn, "squared_error", kind=kind, examples=len(inputs), window=2
    )
    curvature = estimator.init(params, inputs)
    update = jax.jit(estimator.update)
    return update(curvature, params, inputs, rng=jax.random.key(0))


def fisher_block(model_fn, params, inputs, name):
    def outputs(matrix):
        layer = problems.layer_from_matrix(matrix, params[name])
        return model_fn({**params, name: layer}, inputs)

    matrix = problems.layer_matrix(params[name])
    return oracles.gauss_newton(outputs, matrix, lambda z: jnp.sum(z**2))


biases = pytest.mark.parametrize("use_bias", [False, True], ids=["no bias", "bias"])


@biases
def test_the_exact_kind_is_the_dense_fisher_block(use_bias):
    problem = network(8, use_bias)
    curvature = captured(*problem, "exact")
    for name in LAYERS:
        dense = curvature.operator(name).to_dense()
        expected = fisher_block(*problem, name)
        assert oracles.relative_error(dense, expected) < oracles.tolerance("float64")


@biases
def test_many_samples_approach_the_dense_fisher_block(use_bias):
    num_examples = 4000
    problem = network(num_examples, use_bias)
    curvature = captured(*problem, "mc")
    for name in LAYERS:
        operator = curvature.operator(name)
        # The block is A ⊗ G. Rows give A without error and G as the second moment
        # of normal vectors: an entry has variance (G_ii G_jj + G_ij²) / N.
        expected = fisher_block(*problem, name)
        a_factor = oracles.float64(operator.factors()[0])
        n_in, n_out = len(a_factor), len(expected) // len(a_factor)
        blocks = expected.reshape(n_in, n_out, n_in, n_out)
        g_factor = blocks[0, :, 0] / a_factor[0, 0]
        spread = np.diag(g_factor)[:, None] * np.diag(g_factor) + g_factor**2
        sigma = np.kron(np.abs(a_factor), np.sqrt(spread / num_examples))
        error = np.abs(operator.to_dense() - expected)
        assert np.all(error <= 5 * sigma)
        assert np.max(error) > 0.01 * np.max(sigma)  # it was sampled


def test_the_blocks_differ_where_the_network_is_not_linear():
    model = problems.MLP((4, 2), activation="tanh")
    problem = problems.model_problem(model, (8, 5))
    dense = captured(*problem, "exact").operator("Dense_0").to_dense()
    expected = fisher_block(*problem, "Dense_0")
    assert oracles.relative_error(dense, expected) > 1e-3
