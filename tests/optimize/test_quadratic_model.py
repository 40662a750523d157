import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
import problems
from optax_cgfac import fisher_estimator
from optax_cgfac.optimize.adaptive.quadratic_model import (
    QuadraticModel,
    Step,
    gauss_newton_products,
    minimize_in_box,
    model_value,
    quadratic_model,
    within_loss,
)

ONE_PREDICTION = {
    "squared_error": lambda z: jnp.sum(z**2),
    "sigmoid_binary_cross_entropy": lambda z: jnp.sum(
        optax.sigmoid_binary_cross_entropy(z, jnp.zeros_like(z))
    ),
    "softmax_cross_entropy": lambda z: optax.softmax_cross_entropy_with_integer_labels(
        z, 0
    ),
}


def setup(loss, dtype, shape=(6, 4)):
    """A curvature, parameters, two directions, and the same ones flat."""
    model = problems.MLP((5, 3), dtype=dtype)
    model_fn, params, inputs = problems.model_problem(model, shape)
    estimator = fisher_estimator(model_fn, loss, examples=2, model_examples=len(inputs))
    curvature = estimator.init(params, inputs)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    vectors = np.random.default_rng(1).normal(size=(2, len(flat)))
    directions = tuple(unravel(jnp.asarray(v, dtype)) for v in vectors)
    dense = oracles.gauss_newton(
        lambda flat: model_fn(unravel(flat), inputs), flat, ONE_PREDICTION[loss]
    )
    return curvature, params, directions, dense, vectors


products_of = jax.jit(gauss_newton_products)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [*((loss, (6, 4)) for loss in ONE_PREDICTION), ("squared_error", (5, 3, 4))],
    ids=[*ONE_PREDICTION, "sequences"],
)
def test_products_equal_those_of_the_dense_gauss_newton_matrix(loss, shape, dtype):
    curvature, params, directions, dense, vectors = setup(loss, dtype, shape)
    products = products_of(curvature, params, directions)
    assert products.dtype == dtype
    expected = vectors @ dense @ vectors.T
    assert oracles.relative_error(products, expected) < oracles.tolerance(dtype, 10)


def test_outputs_in_half_precision_give_products_in_single():
    model = problems.MLP((5, 3), dtype="bfloat16")
    model_fn, params, inputs = problems.model_problem(model, (6, 4))
    estimator = fisher_estimator(model_fn, "squared_error", examples=2)
    curvature = estimator.init(params, inputs)
    products = gauss_newton_products(curvature, params, [params])
    assert products.dtype == jnp.float32
    assert products > 0


def test_damping_and_l2_enter_the_model_where_they_should(x64):
    damping, l2 = 0.3, 0.02
    curvature, params, directions, dense, vectors = setup("squared_error", "float64")
    grads = jax.tree.map(jnp.cos, params)
    slope = vectors @ jax.flatten_util.ravel_pytree(grads)[0]
    model = quadratic_model(
        curvature, params, slope, directions, damping=damping, l2=l2
    )
    identity = np.eye(len(dense))
    for actual, expected in (
        (model.undamped, vectors @ (dense + l2 * identity) @ vectors.T),
        (model.curvature, vectors @ (dense + (damping + l2) * identity) @ vectors.T),
        (model.slope, slope),
    ):
        assert oracles.relative_error(actual, expected) < 1e-12


def model_of(matrix, slope):
    matrix = jnp.asarray(matrix, jnp.float32)
    return QuadraticModel(matrix, matrix, jnp.asarray(slope, jnp.float32))


BOX = [(0.0, 1.0), (0.0, 0.95)]
MATRIX = np.array([[2.0, 0.5], [0.5, 1.0]])
# The minimizer without a box.
REGIMES = {
    "inside": (0.4, 0.5),
    "momentum above": (0.4, 2.0),
    "momentum below": (0.6, -0.5),
    "step size above": (1.5, 0.5),
    "step size below": (-0.3, 0.5),
    "both above": (2.0, 2.0),
    "step size above, momentum below": (1.5, -0.5),
}


@pytest.mark.parametrize("coupling", [0.5, -0.9])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_step_is_the_minimizer_in_the_box(regime, coupling):
    matrix = np.array([[2.0, coupling], [coupling, 1.0]])
    slope = -matrix @ np.array(REGIMES[regime])
    step = minimize_in_box(model_of(matrix, slope))
    expected, _ = oracles.minimum_on_grid(matrix, slope, BOX)
    np.testing.assert_allclose(step, expected, atol=2 / 400)


def test_a_step_lowers_the_model_as_far_as_its_momentum_allows():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(500, 2, 3))
    matrices, slopes = factors @ factors.mT, rng.normal(size=(500, 2))
    slopes[:, 0] = -np.abs(slopes[:, 0])
    models = QuadraticModel(*map(jnp.asarray, (matrices, matrices, slopes)))
    steps = jnp.stack(jax.vmap(minimize_in_box)(models), -1)
    values = jax.vmap(model_value)(slopes, matrices, steps)
    expected = map(oracles.quadratic, matrices, slopes, oracles.float64(steps))
    np.testing.assert_allclose(values, [*expected], rtol=1e-4, atol=1e-6)
    assert np.max(values) <= 1e-6
    step_size, momentum = steps.T
    best = -(slopes[:, 0] + matrices[:, 0, 1] * momentum) / matrices[:, 0, 0]
    np.testing.assert_allclose(step_size, np.clip(best, 0, 1), atol=1e-4)
    assert np.all((momentum >= 0) & (momentum <= 0.95))


def test_the_box_is_an_argument():
    slope = -MATRIX @ np.array([3.0, 2.0])
    step = minimize_in_box(model_of(MATRIX, slope), max_momentum=10.0)
    # At the end of the box for the step size, 1, the best momentum is 3.
    np.testing.assert_allclose(step, (1.0, 3.0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_momentum_can_be_fixed(momentum):
    slope = -MATRIX @ np.array([0.4, 0.5])
    step = minimize_in_box(
        model_of(MATRIX, slope), min_momentum=momentum, max_momentum=momentum
    )
    assert step.momentum == np.float32(momentum)
    # Of the quadratic in the step size alone.
    np.testing.assert_allclose(step.step_size, 0.4 + 0.25 * (0.5 - momentum), rtol=1e-5)


def parallel(factor):
    v = np.array([1.0, factor])
    return 2 * np.outer(v, v), -v


@pytest.mark.parametrize(
    ("matrix", "slope", "expected"),
    [
        ([[4.0, 0.0], [0.0, 0.0]], [-2.0, 0.0], (0.5, 0.0)),  # no velocity
        *((*parallel(factor), (0.5, 0.0)) for factor in (0.5, 1.0, -2.0, 1e-4)),
        ([[1.0, 0.0], [0.0, 1e-6]], [-0.5, 0.1], (0.5, 0.0)),  # a flat one
        ([[1.0, 0.0], [0.0, 1e-6]], [-0.5, -0.1], (0.5, 0.95)),
        (np.zeros((2, 2)), [-1.0, 0.0], (1.0, 0.0)),
    ],
)
def test_models_that_do_not_determine_a_step_give_one_in_the_box(
    matrix, slope, expected
):
    step = minimize_in_box(model_of(matrix, slope))
    np.testing.assert_allclose(step, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_is_not_finite_gives_no_step(bad):
    for matrix, slope in (
        ([[bad, 0.0], [0.0, 1.0]], [-1.0, 0.0]),
        ([[1.0, bad], [bad, 1.0]], [-1.0, 0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [bad, 0.0]),
    ):
        step = minimize_in_box(model_of(matrix, slope))
        assert step.step_size == 0


@pytest.mark.parametrize(
    ("value", "factor"), [(10.0, 1.0), (0.5, 1.0), (0.1, 0.2), (0.0, 1.0), (-1.0, 1.0)]
)
def test_no_step_promises_more_than_the_loss(value, factor):
    slope = jnp.array([-0.6, -0.8])
    step = Step(jnp.array(0.6), jnp.array(0.8))  # the slope along it is -1
    short = within_loss(slope, step, jnp.array(value))
    np.testing.assert_allclose(short, [0.6 * factor, 0.8 * factor], rtol=1e-6)
