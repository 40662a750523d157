import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oracles
import problems
import steps
from optax_cgfac import (
    KroneckerOperator,
    StopReason,
    cgfac,
    diagnostics,
    fisher_estimator,
    scale_by_cgfac,
)
from optax_cgfac.solve.eigenpairs import (
    LayerEigenpairs,
    empty_eigenpairs,
    refresh,
    solve_with_eigenpairs,
    split_dampings,
)
from trees import assert_trees_close

DAMPING = 0.1
ROWS, N_IN, N_OUT = 24, 40, 30


def decaying(seed=0, dtype="float64"):
    """A layer whose factors have eigenvalues far apart."""
    problem = problems.layer_problem(ROWS, N_IN, N_OUT, seed=seed, dtype=dtype)
    weights = jnp.asarray(0.6 ** np.arange(ROWS), dtype)[:, None]
    return problem._replace(a=weights * problem.a, g=weights * problem.g)


def operator(problem):
    scale = 1 / problem.a.shape[-2]
    return KroneckerOperator(problem.a, problem.g, scale, scale)


def empty(problem, rank):
    stack, rows = problem.a.shape[:-2], problem.a.shape[-2]
    sizes = problem.a.shape[-1], problem.g.shape[-1]
    dtype = problem.a.dtype.name
    return LayerEigenpairs(
        *(empty_eigenpairs(stack, rows, n, rank, dtype) for n in sizes)
    )


@jax.jit
def refreshed(operator, old):
    for _ in range(6):
        [old] = refresh([operator], [old])
    return old


def solve(eigenpairs, blocks, damping=DAMPING):
    [split] = split_dampings([eigenpairs], jnp.asarray(damping))
    return solve_with_eigenpairs(eigenpairs, split, blocks)


def truncated(rows, rank):
    """The factor with all but its leading eigenvalues set to zero, and its trace."""
    factor = oracles.moment(rows)
    values, vectors = np.linalg.eigh(factor)
    top = vectors[:, -rank:]
    return (top * values[-rank:]) @ top.T, np.trace(factor)


def expected_solution(problem, rank, damping=DAMPING):
    (a, a_trace), (g, g_trace) = (truncated(x, rank) for x in (problem.a, problem.g))
    pi = np.sqrt(a_trace / len(a) / (g_trace / len(g)))
    alpha, beta = pi * np.sqrt(damping), np.sqrt(damping) / pi
    left = np.linalg.solve(a + alpha * np.eye(len(a)), oracles.float64(problem.b))
    return np.linalg.solve(g + beta * np.eye(len(g)), left.T).T


@pytest.mark.parametrize("rank", [4, ROWS, 100])
def test_the_solution_is_that_of_the_truncated_factors(rank, dtype):
    problem = decaying(dtype=dtype)
    eigenpairs = refreshed(operator(problem), empty(problem, rank))
    blocks = [problem.b[:-1], problem.b[-1:]]
    solution, is_finite = jax.jit(solve)(eigenpairs, blocks)
    assert is_finite
    expected = expected_solution(problem, min(rank, ROWS))
    error = oracles.relative_error(jnp.concatenate(solution), expected)
    exact = 1e-9 if dtype == "float64" else 1e-3
    assert error < (2e-3 if rank < ROWS else exact)


@pytest.mark.usefixtures("x64")
def test_stacked_layers_are_those_one_by_one():
    layers = [decaying(seed) for seed in (0, 1)]
    stacked = problems.stack_problems(layers)
    eigenpairs = refreshed(operator(stacked), empty(stacked, 6))
    [solution], _ = solve(eigenpairs, [stacked.b])
    for layer, x in zip(layers, solution, strict=True):
        assert oracles.relative_error(x, expected_solution(layer, 6)) < 2e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_falls_back_to_the_mean_curvature(bad):
    problem = decaying()
    eigenpairs = refreshed(operator(problem), empty(problem, 4))
    b = problem.b.at[2, 3].set(bad)
    [solution], is_finite = solve(eigenpairs, [b])
    assert not is_finite
    traces = eigenpairs.a.trace * eigenpairs.g.trace
    expected = problem.b / (traces / problem.b.size + DAMPING)
    np.testing.assert_allclose(solution, expected.at[2, 3].set(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("capture_every", "expected"),
    [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (3, [1, 2, 2, 3, 3, 3, 4, 4, 4])],
)
def test_renewals_are_every_few_updates_once_the_window_is_full(
    capture_every, expected
):
    options = {"refresh_every": 3, "capture_every": capture_every}
    p = steps.make_problem(rank=4, **options)
    assert "rank 4 | rank 4, eigenpairs" in p.curvature().report()
    update, curvature = jax.jit(p.estimator.update), p.curvature()
    changed, counts = [], []
    for i in range(9):
        old, rng = curvature.eigenpairs, jax.random.key(i)
        curvature = update(curvature, p.params, p.batch["x"], rng=rng)
        same = jax.tree.map(jnp.array_equal, old, curvature.eigenpairs)
        changed.append(not all(jax.tree.leaves(same)))
        counts.append(int(curvature.num_updates))
    assert counts == expected
    if capture_every == 1:  # two slots of the window; then updates 3, 6 and 9
        assert np.flatnonzero(changed).tolist() == [0, 1, 2, 5, 8]


@pytest.mark.parametrize(
    ("batch_size", "outputs", "rank", "every"),
    [(8, 3, 16, 1), (256, 32, 32, 4), (512, 33, 64, 1), (512, 3, 64, 2)],
)
def test_rank_and_captures_follow_the_batch_and_the_outputs(
    batch_size, outputs, rank, every
):
    model = problems.MLP((outputs,), dtype="float32")
    model_fn, params, x = problems.model_problem(model, (batch_size, 4))
    examples = min(32, batch_size)
    estimator = fisher_estimator(model_fn, "squared_error", examples=examples)
    spec = estimator.init(params, x).spec
    assert (spec.rank, spec.capture_every) == (rank, every)


@pytest.mark.parametrize(("interval", "fits"), [(4, False), (1, True)])
def test_step_size_and_momentum_stay_between_two_fits(interval, fits):
    tx = cgfac(model_interval=interval, damping_interval=4)
    state = tx.init(steps.problem().params)
    changed = []
    for _ in range(15):
        old = state
        _, state = steps.update(tx, old)
        chosen = [(x.step_size, x.momentum) for x in (old, state)]
        changed.append(not np.array_equal(*chosen))
    assert changed[0]
    # All of the first ten are fitted, and then updates 12 and 16.
    assert any(changed[i] for i in (10, 12, 13, 14)) == fits


def test_scale_and_bias_of_a_norm_lie_side_by_side():
    """With every eigenvalue that is not zero kept it is the solve with all rows."""
    model = nn.Sequential([nn.Dense(20), nn.LayerNorm(), nn.Dense(3)])
    few = jax.random.normal(jax.random.key(0), (8, 6))
    x = jnp.tile(few, (4, 1))  # cotangents of rank 8 * 3
    params = model.init(jax.random.key(1), x)
    grads = jax.tree.map(lambda p: jnp.cos(3 * p + 1), params)
    solutions = []
    for rank in (26, None):
        estimator = fisher_estimator(
            model.apply,
            "squared_error",
            kind="exact",
            examples=32,
            window=1,
            rank=rank,
            rows_dtype="float32",
        )
        curvature = estimator.init(params, x)
        curvature = estimator.update(curvature, params, x)
        assert any("layers_1" in name for name in curvature.eigenpairs) == bool(rank)
        tx = scale_by_cgfac(0.1, damping_form="factored")
        solved, state = tx.update(grads, tx.init(params), params, curvature=curvature)
        solutions.append(solved)
        found = diagnostics(state, params)["layers"].values()
        reason = StopReason.EIGENPAIRS if rank else StopReason.DIRECT
        assert reason in {int(layer["stop_reason"]) for layer in found}
    assert_trees_close(*solutions, rtol=1e-3, atol=1e-4)
