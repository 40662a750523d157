"""What a solve says of itself is true: its residual, why it ended, the model's fall.

Every claim is checked in float64 on dense matrices, for solves in float32.
"""

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
from optax_cgfac.solve.factored import factored_damping, solve_by_cg
from optax_cgfac.solve.sample_space import cg_on_rows
from optax_cgfac.solve.solver import solve_layers
from optax_cgfac.utils.arrays import tree_dot
from steps import ingredients, update

EPS = np.finfo(np.float32).eps
AGREEMENT = 1.01

SIZES = {
    "fewer rows than features": (6, 12, 10),
    "more rows than features": (40, 8, 6),
    "one row": (1, 7, 5),
}
DAMPINGS = {"small damping": 1e-3, "large damping": 1.0}


def on_both_sides(operator, damping, b, x0, **limits):
    return solve_by_cg(factored_damping(operator, damping), b, x0, **limits)


def in_parameter_space(operator, damping, b, x0, **limits):
    return conjugate_gradient(DampedOperator(operator, damping), b, x0, **limits)


SPACES = {
    "parameter": jax.jit(in_parameter_space),
    "rows": jax.jit(cg_on_rows),
    "both sides": jax.jit(on_both_sides),
}
every_space = pytest.mark.parametrize("space", ["parameter", "rows"])
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
    for max_steps in range(1, 30, 3):
        limits = {"max_steps": max_steps, "rtol": 0.0}
        x, info = SPACES[space](operator, damping, b, x0, **limits)
        truth = residual_norm(dense, b, x)
        assert info.residual_norm <= AGREEMENT * truth + floor * size
        assert truth <= AGREEMENT * info.residual_norm + floor * size


@every_space
def test_below_rounding_the_truth_is_told_and_the_solve_says_so(space):
    problem, operator, damping, dense = setup(
        "fewer rows than features", "large damping"
    )
    limits = {"max_steps": 300, "rtol": 0.0}
    x, info = SPACES[space](operator, damping, problem.b, problem.x0, **limits)
    truth = residual_norm(dense, problem.b, x)
    assert info.reason == StopReason.STAGNATED
    assert not info.converged
    assert 0 < truth < 1e-3 * np.linalg.norm(problem.b)
    assert info.residual_norm >= 0.9 * truth


@pytest.mark.parametrize("space", SPACES)
def test_right_hand_sides_that_need_or_have_no_solution(space):
    problem, operator, damping, dense = setup("one row", "large damping")
    if space == "both sides":
        dense = oracles.factored(problem.a, problem.g, damping)
    b, limits = problem.b, {"max_steps": 50, "rtol": 1e-3}

    def solve(b, x0=None):
        return SPACES[space](operator, damping, b, x0, **limits)

    x, info = solve(0 * b)
    assert not np.any(x)
    assert jax.tree.map(float, info) == (0, 0, True, StopReason.CONVERGED)
    # From a warm start there is no relative tolerance to reach.
    x, _ = solve(0 * b, problem.x0)
    assert np.linalg.norm(x) < 1e-3 * np.linalg.norm(problem.x0)
    # At the solution no step is taken.
    solution = jnp.asarray(oracles.solve(dense, b), "float32")
    x, info = solve(b, solution)
    assert info.num_steps == 0
    assert info.converged
    np.testing.assert_allclose(x, solution, rtol=1e-3, atol=1e-5)
    for value in (np.nan, np.inf):
        x, info = solve(b.at[0, 0].set(value), problem.x0)
        assert not info.converged
        if space == "parameter":
            np.testing.assert_array_equal(x, problem.x0)
        if space != "both sides":
            assert info.num_steps == 0
    # Its squares are no numbers in float32.
    b = oracles.float64(1e25 * b)
    x, info = solve(jnp.asarray(b, "float32"))
    assert np.all(np.isfinite(x))
    is_solved = residual_norm(dense, b, x) <= 1.1e-3 * np.linalg.norm(b)
    assert is_solved or not info.converged


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
    operator, b = problems.Diagonal(jnp.array(entries)), jnp.array(b)
    max_steps = 2 if expected is StopReason.STEP_LIMIT else 5
    x, info = conjugate_gradient(operator, b, max_steps=max_steps, rtol=rtol)
    assert StopReason(int(info.reason)) is expected
    assert np.any(x) == (expected <= StopReason.STEP_LIMIT)
    assert info.reason.dtype == jnp.int32
    assert info.converged == (expected is StopReason.CONVERGED)


def test_an_indefinite_preconditioner_is_named():
    operator, b = problems.Diagonal(jnp.array([1.0, 2.0])), jnp.ones(2)
    minus = problems.Diagonal(-b)
    x, info = conjugate_gradient(operator, b, max_steps=5, preconditioner=minus)
    assert info.reason == StopReason.INDEFINITE
    assert not np.any(x)


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
    b = -oracles.float64(problem.b).ravel()
    none, helped = (
        oracles.quadratic(dense, b, oracles.float64(x).ravel())
        for x in (nothing, recent)
    )
    assert helped < none < 0  # and a start that helps is one


# --------------------------------------------------------- through the optimizers


def of_layers(state, key):
    layers = diagnostics(state, ingredients().params)["layers"]
    assert set(layers) == {"hidden", "out"}
    return np.array([layer[key] for layer in layers.values()])


OPTIMIZERS = {
    "by cholesky": (cgfac, StopReason.DIRECT),
    "by cg": (
        lambda: scale_by_cgfac(0.1, max_steps=1, rtol=1e-3),
        StopReason.STEP_LIMIT,
    ),
    "kfac": (lambda: scale_by_kfac(0.1), StopReason.DIRECT),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_diagnostics_name_the_reason_and_make_up_no_residual(name):
    make, reason = OPTIMIZERS[name]
    state = make().init(ingredients().params)
    assert np.all(of_layers(state, "stop_reason") == StopReason.UNSOLVED)
    assert np.all(of_layers(state, "residual") == -1)

    _, state = update(make(), state)
    assert np.all(of_layers(state, "stop_reason") == reason)
    residuals = of_layers(state, "residual")
    is_known = reason is StopReason.STEP_LIMIT
    assert np.all(residuals > 0 if is_known else residuals == -1)


def test_a_replaced_solution_is_named():
    tx = scale_by_cgfac(0.1)
    grads = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    _, state = update(tx, tx.init(ingredients().params), grads=grads)
    assert np.all(of_layers(state, "stop_reason") == StopReason.NOT_FINITE)
