"""What a solve says of itself is true: its residual, why it ended, the model's fall.

Every claim is checked in float64 on dense matrices, for solves in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import (
    DampedOperator,
    KroneckerOperator,
    StopReason,
    cgfac,
    conjugate_gradient,
    diagnostics,
    scale_by_cgfac,
    scale_by_kfac,
)
from optax_cgfac.solve.cg import Space, certified, cg_loop
from optax_cgfac.solve.choose import SolveSpec
from optax_cgfac.solve.sample_space import cg_on_rows
from optax_cgfac.solve.solver import solve_layers
from optax_cgfac.utils.arrays import tree_dot
from steps import ingredients, make_problem, update

EPS = np.finfo(np.float32).eps
NUM_STEPS = 30
# As long as a residual is this much above rounding, recurrence and truth agree to 1 %.
AGREEMENT, ABOVE_ROUNDING = 1.01, 100

SIZES = {
    "fewer rows than features": (6, 12, 10),
    "more rows than features": (40, 8, 6),
    "one row": (1, 7, 5),
}
DAMPINGS = {"small damping": 1e-3, "large damping": 1.0}


@jax.jit
def in_parameter_space(operator, damping, b, x0, max_steps):
    limits = {"max_steps": max_steps, "rtol": 0.0}
    return conjugate_gradient(DampedOperator(operator, damping), b, x0, **limits)


@jax.jit
def on_rows(operator, damping, b, x0, max_steps):
    limits = {"max_steps": max_steps, "rtol": 0.0}
    return cg_on_rows(operator, damping, b, x0, **limits)


@jax.jit
def recurrence(operator, damping, b, x0, max_steps):
    """The residual norm that the iteration carries, and the iterate."""
    damped = DampedOperator(operator, damping)
    end = cg_loop(
        Space(damped.matvec, tree_dot),
        b - damped.matvec(x0),
        x0,
        squared_tolerance=jnp.zeros(()),
        max_steps=max_steps,
    )
    return end.x, jnp.sqrt(end.squared_norm)


SPACES = {"parameter": in_parameter_space, "rows": on_rows}
every_space = pytest.mark.parametrize("space", SPACES)
every_problem = pytest.mark.parametrize(
    ("size", "damping"), [(s, d) for s in SIZES for d in DAMPINGS]
)


def setup(size, damping):
    """A problem in float32 and its dense matrix in float64."""
    problem = problems.layer_problem(*SIZES[size], dtype="float32")
    scale = 1 / len(problem.a)
    operator = KroneckerOperator(problem.a, problem.g, scale, scale)
    damping = DAMPINGS[damping]
    return problem, operator, damping, oracles.tikhonov(problem.a, problem.g, damping)


def residual_norm(dense, b, x):
    return np.linalg.norm(oracles.float64(b) - oracles.apply(dense, x))


def quadratic(dense, b, x):
    x = oracles.float64(x).reshape(-1)
    return oracles.quadratic(dense, -oracles.float64(b).reshape(-1), x)


def model_error(dense, b, x):
    """What rounding of ``x`` may do to the model: it is summed from terms like b/γ."""
    values = np.linalg.eigvalsh(dense)
    change = 10 * EPS * (np.linalg.norm(x) + np.linalg.norm(b) / values[0])
    return change * (residual_norm(dense, b, x) + values[-1] * change)


@every_space
@every_problem
@pytest.mark.parametrize("start", ["zero", "warm"])
def test_no_step_raises_the_quadratic_model(space, size, damping, start):
    problem, operator, damping, dense = setup(size, damping)
    x0 = problem.x0 * (start == "warm")
    models = [quadratic(dense, problem.b, x0)]
    slack = [0.0]
    for max_steps in range(1, NUM_STEPS):
        x, _ = SPACES[space](operator, damping, problem.b, x0, max_steps)
        models.append(quadratic(dense, problem.b, x))
        slack.append(model_error(dense, problem.b, x))
    fall = models[0] - min(models)
    assert np.all(np.diff(models) <= np.array(slack[1:]) + 1e-6 * fall)
    # The slack is rounding: it would not hide a step that is wrong.
    assert max(slack[1:]) < 1e-2 * fall


@every_space
@every_problem
def test_the_reported_residual_is_true_at_every_step(space, size, damping):
    problem, operator, damping, dense = setup(size, damping)
    b, x0 = problem.b, problem.x0
    size = np.linalg.norm(b) + np.linalg.norm(oracles.apply(dense, x0))
    # Among rows an inner product is good to eps ‖d‖², its root to √eps ‖d‖.
    floor = {"parameter": 10 * EPS * np.linalg.cond(dense), "rows": 20 * EPS**0.5}[
        space
    ]
    for max_steps in range(1, NUM_STEPS, 3):
        x, info = SPACES[space](operator, damping, b, x0, max_steps)
        truth = residual_norm(dense, b, x)
        assert info.residual_norm <= AGREEMENT * truth + floor * size
        assert truth <= AGREEMENT * info.residual_norm + floor * size


@every_problem
def test_recurrence_and_truth_agree_above_rounding(size, damping):
    problem, operator, damping, dense = setup(size, damping)
    compared = 0
    for max_steps in range(1, NUM_STEPS):
        x, carried = recurrence(operator, damping, problem.b, problem.x0, max_steps)
        truth = residual_norm(dense, problem.b, x)
        rounding = EPS * np.linalg.norm(dense, 2) * np.linalg.norm(x)
        if carried > ABOVE_ROUNDING * rounding:
            compared += 1
            assert 1 / AGREEMENT < carried / truth < AGREEMENT
    assert compared >= 1


@every_space
def test_below_rounding_the_truth_is_told_and_the_solve_says_so(space):
    problem, operator, damping, dense = setup(
        "fewer rows than features", "large damping"
    )
    x, info = SPACES[space](operator, damping, problem.b, problem.x0, 300)
    truth = residual_norm(dense, problem.b, x)
    assert info.reason == StopReason.STAGNATED
    assert not info.converged
    assert 0 < truth < 1e-3 * np.linalg.norm(problem.b)
    assert info.residual_norm >= 0.9 * truth


@pytest.mark.parametrize(
    ("entries", "b", "rtol", "expected"),
    [
        ([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], 1e-3, StopReason.CONVERGED),
        ([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], 0.0, StopReason.STEP_LIMIT),
        ([-1.0, 2.0, 4.0], [1.0, 0.0, 0.0], 1e-3, StopReason.INDEFINITE),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], 1e-3, StopReason.INDEFINITE),
        ([np.nan, 2.0, 4.0], [1.0, 1.0, 1.0], 1e-3, StopReason.NOT_FINITE),
        ([1.0, 2.0, 4.0], [1.0, np.inf, 1.0], 1e-3, StopReason.NOT_FINITE),
    ],
    ids=["converged", "steps", "negative", "zero", "not finite", "b not finite"],
)
def test_the_reason_names_what_happened(entries, b, rtol, expected):
    operator, b = Diagonal(entries), jnp.array(b)
    max_steps = 2 if expected is StopReason.STEP_LIMIT else 5
    _, info = conjugate_gradient(operator, b, max_steps=max_steps, rtol=rtol)
    assert StopReason(int(info.reason)) is expected
    assert info.reason.dtype == jnp.int32
    assert info.converged == (expected is StopReason.CONVERGED)


def test_an_indefinite_preconditioner_is_named():
    operator, b = Diagonal([1.0, 2.0]), jnp.array([1.0, 1.0])
    minus = Diagonal([-1.0, -1.0])
    x, info = conjugate_gradient(operator, b, max_steps=5, preconditioner=minus)
    assert info.reason == StopReason.INDEFINITE
    assert not np.any(x)


class Diagonal:
    """A diagonal matrix."""

    def __init__(self, entries):
        self.entries = jnp.array(entries)

    def matvec(self, vector):
        return self.entries * vector


class Skewed:
    """No symmetric operator: CG's steps along it raise the model."""

    def matvec(self, vector):
        return jnp.array([[0.1, 5.0], [-5.0, 0.1]]) @ vector


def test_a_solve_that_would_raise_the_model_returns_its_start():
    b, x0 = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.25])
    x, info = conjugate_gradient(Skewed(), b, x0, max_steps=7, rtol=1e-6)
    residual = np.linalg.norm(b - Skewed().matvec(x0))
    np.testing.assert_array_equal(x, x0)
    np.testing.assert_allclose(info.residual_norm, residual, rtol=1e-6)
    assert info.reason >= StopReason.STAGNATED


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (1e-4, StopReason.CONVERGED),
        (1.05e-3, StopReason.CONVERGED),  # the difference of the two is rounding
        (1.5e-3, StopReason.STAGNATED),
        (1e-2, StopReason.STAGNATED),
    ],
)
def test_a_residual_that_only_the_recurrence_has_is_no_convergence(norm, reason):
    space, tolerance = Space(lambda v: 2 * v, tree_dot), jnp.array(1e-6)
    start = jnp.zeros(1), jnp.array([1.0])
    end = cg_loop(space, start[1], start[0], squared_tolerance=tolerance, max_steps=3)
    assert end.reason == StopReason.CONVERGED
    judged = certified(
        space,
        end,
        start=start,
        residual=jnp.array([norm]),
        squared_tolerance=tolerance,
    )
    assert judged.reason == reason
    np.testing.assert_allclose(judged.squared_norm, norm**2, rtol=1e-5)


# ---------------------------------------------------- through the layers' solves

SOLVES = {
    "cg on rows": {},
    "cg on parameters": {"space": "parameter"},
    "cg on both sides": {"damping_form": "factored", "solver": "cg"},
}


@pytest.mark.parametrize("name", SOLVES)
def test_a_start_that_is_worse_than_none_is_not_taken(name):
    """Of some steps ago, and a hundred times too long: three steps are not enough."""
    spec = SolveSpec(**SOLVES[name], max_steps=3, rtol=1e-3)
    problem = problems.layer_problem(16, 24, 20, dtype="float32")
    operator = KroneckerOperator(problem.a, problem.g, 1 / 16, 1 / 16)
    dense = oracles.DAMPED[spec.damping_form](problem.a, problem.g, 0.1)
    before = oracles.solve(dense, problem.b + problem.x0 / 3)

    @jax.jit
    def solve(x0):
        return solve_layers(spec, [operator], 0.1, [problem.b], [x0])[0]

    (nothing, expected), (stale, info), (recent, _) = (
        solve(jnp.asarray(factor * before, "float32")) for factor in (0, 100, 1)
    )
    np.testing.assert_allclose(stale, nothing, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(info.residual_norm, expected.residual_norm, rtol=1e-4)
    models = [quadratic(dense, problem.b, x) for x in (nothing, recent)]
    assert models[1] < models[0] < 0  # and a start that helps is one


# --------------------------------------------------------- through the optimizers


@functools.cache
def truncated():
    """Ingredients whose curvature keeps two eigenpairs of each factor."""
    p = make_problem(rank=2)
    push = jax.jit(p.estimator.update)
    curvature = p.curvature()
    for i in range(2):
        curvature = push(curvature, p.params, p.batch["x"], rng=jax.random.key(i))
    return ingredients()._replace(curvature=curvature)


def of_layers(state, key):
    layers = diagnostics(state, ingredients().params)["layers"]
    assert set(layers) == {"hidden", "out"}
    return np.array([layer[key] for layer in layers.values()])


OPTIMIZERS = {
    "by eigenpairs": (cgfac, truncated, StopReason.EIGENPAIRS),
    "by cholesky": (cgfac, ingredients, StopReason.DIRECT),
    "by cg": (
        lambda: scale_by_cgfac(0.1, max_steps=1, rtol=1e-3),
        ingredients,
        StopReason.STEP_LIMIT,
    ),
    "kfac": (lambda: scale_by_kfac(0.1), ingredients, StopReason.DIRECT),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_diagnostics_name_the_reason_and_make_up_no_residual(name):
    make, given, reason = OPTIMIZERS[name]
    state = make().init(ingredients().params)
    assert np.all(of_layers(state, "stop_reason") == StopReason.UNSOLVED)
    assert np.all(of_layers(state, "residual") == -1)

    _, state = update(make(), state, given())
    assert np.all(of_layers(state, "stop_reason") == reason)
    residuals = of_layers(state, "residual")
    is_known = reason is StopReason.STEP_LIMIT
    assert np.all(residuals > 0 if is_known else residuals == -1)


def test_a_replaced_solution_is_named():
    tx = scale_by_cgfac(0.1)
    grads = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    _, state = update(tx, tx.init(ingredients().params), grads=grads)
    assert np.all(of_layers(state, "stop_reason") == StopReason.NOT_FINITE)
