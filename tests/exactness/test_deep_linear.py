"""Deep linear networks with squared error: K-FAC's factorisation is exact there."""

import jax
import jax.numpy as jnp
import pytest

import oracles
import problems
from optax_cgfac import fisher_estimator

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = ["Dense_0", "Dense_1", "Dense_2"]


def network(num_examples, use_bias):
    model = problems.MLP((4, 3, 2), use_bias=use_bias, activation=None)
    return problems.model_problem(model, (num_examples, 5))


def captured(model_fn, params, inputs):
    estimator = fisher_estimator(
        model_fn, "squared_error", kind="exact", examples=len(inputs), window=2
    )
    curvature = estimator.init(params, inputs)
    return jax.jit(estimator.update)(curvature, params, inputs)


def fisher_block(model_fn, params, inputs, name):
    def outputs(matrix):
        layer = problems.layer_from_matrix(matrix, params[name])
        return model_fn({**params, name: layer}, inputs)

    matrix = problems.layer_matrix(params[name])
    return oracles.gauss_newton(outputs, matrix, lambda z: jnp.sum(z**2))


@pytest.mark.parametrize("use_bias", [False, True], ids=["no bias", "bias"])
def test_the_exact_kind_is_the_dense_fisher_block(use_bias):
    problem = network(8, use_bias)
    curvature = captured(*problem)
    for name in LAYERS:
        dense = curvature.operator(name).to_dense()
        expected = fisher_block(*problem, name)
        assert oracles.relative_error(dense, expected) < oracles.tolerance("float64")


def test_the_blocks_differ_where_the_network_is_not_linear():
    model = problems.MLP((4, 2), activation="tanh")
    problem = problems.model_problem(model, (8, 5))
    dense = captured(*problem).operator("Dense_0").to_dense()
    expected = fisher_block(*problem, "Dense_0")
    assert oracles.relative_error(dense, expected) > 1e-3
