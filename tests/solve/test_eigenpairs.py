import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oracles
import problems
import steps
from optax_cgfac import KroneckerOperator, cgfac, fisher_estimator, scale_by_cgfac
from optax_cgfac.solve.eigenpairs import (
    LayerEigenpairs,
    empty_eigenpairs,
    refresh,
    solve_with_eigenpairs,
    split_dampings,
)

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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [4, 10])
def test_subspace_iteration_finds_the_leading_eigenpairs(rank):
    problem = decaying()
    eigenpairs = refreshed(operator(problem), empty(problem, rank))
    for rows, (vectors, values, trace) in zip(problem[:2], eigenpairs, strict=True):
        expected, whole = truncated(rows, rank)
        # Every start is disturbed by a tenth, to find what is new.
        assert oracles.relative_error((vectors * values) @ vectors.T, expected) < 2e-3
        assert oracles.relative_error(vectors.T @ vectors, np.eye(rank)) < 1e-10
        assert oracles.relative_error(trace, np.asarray(whole)) < 1e-12


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
def test_a_factor_smaller_than_the_rank_is_exact():
    problem = problems.layer_problem(50, 9, 40)
    eigenpairs = refreshed(operator(problem), empty(problem, 20))
    vectors, values, _ = eigenpairs.a
    assert vectors.shape == (9, 9)
    expected = oracles.moment(problem.a)
    assert oracles.relative_error((vectors * values) @ vectors.T, expected) < 1e-12


@pytest.mark.usefixtures("x64")
def test_stacked_layers_are_those_one_by_one():
    layers = [decaying(seed) for seed in (0, 1)]
    stacked = problems.stack_problems(layers)
    eigenpairs = refreshed(operator(stacked), empty(stacked, 6))
    [solution], _ = solve(eigenpairs, [stacked.b])
    for layer, x in zip(layers, solution, strict=True):
        assert oracles.relative_error(x, expected_solution(layer, 6)) < 2e-3


@pytest.mark.parametrize("dead", ["ag", "a", "g", ""])
def test_without_damping_a_dead_layer_takes_no_step(dead):
    """Nothing is known of it; what would divide by rounding is not finite, or huge."""
    problem = decaying(dtype="float32")
    zeros = {name: jnp.zeros_like(getattr(problem, name)) for name in dead}
    eigenpairs = refreshed(operator(problem._replace(**zeros)), empty(problem, 4))
    [solution], is_finite = solve(eigenpairs, [problem.b], 0.0)
    assert np.isfinite(solution).all()
    assert bool(is_finite) == np.any(solution) == (not dead)


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


@pytest.mark.usefixtures("x64")
def test_a_refresh_recovers_from_eigenvectors_that_are_not_finite():
    problem = decaying()
    old = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty(problem, 4))
    eigenpairs = refreshed(operator(problem), old)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(eigenpairs))


def run(estimator, params, batch, num_updates):
    curvature = estimator.init(params, batch["x"])
    update = jax.jit(estimator.update)
    counts = []
    for i in range(num_updates):
        curvature = update(curvature, params, batch["x"], rng=jax.random.key(i))
        counts.append(int(curvature.num_updates))
    return curvature, counts


def test_eigenpairs_are_kept_where_a_factor_has_more():
    p = steps.make_problem(rank=4)
    curvature, _ = run(p.estimator, p.params, p.batch, 1)
    for tag in curvature.tags:
        is_large = min(max(tag.n_in, tag.n_out), 8) > 4
        assert (tag.name in curvature.eigenpairs) == is_large
    whole, _ = run(steps.make_problem(rank=None).estimator, p.params, p.batch, 1)
    assert not whole.eigenpairs


def test_a_large_rank_gives_the_step_of_all_rows():
    """Rank 7 of eight rows, of which the first update has seen but four."""
    p = steps.make_problem(jnp.float32, rank=7)
    _, grads = jax.value_and_grad(p.loss)(p.params, p.batch)
    solutions = []
    for rank in (7, None):
        estimator = steps.make_problem(rank=rank).estimator
        curvature, _ = run(estimator, p.params, p.batch, 1)
        tx = cgfac(learning_rate=1.0)
        updates, _ = tx.update(grads, tx.init(p.params), p.params, curvature=curvature)
        solutions.append(updates)
    for x, y in zip(*map(jax.tree.leaves, solutions), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_eigenpairs_are_renewed_every_few_updates_once_the_window_is_full():
    p = steps.make_problem(rank=4, refresh_every=3)
    curvature = p.estimator.init(p.params, p.batch["x"])
    changed = []
    for i in range(9):
        old = curvature
        rng = jax.random.key(i)
        curvature = jax.jit(p.estimator.update)(old, p.params, p.batch["x"], rng=rng)
        same = jax.tree.map(jnp.array_equal, old.eigenpairs, curvature.eigenpairs)
        changed.append(not all(jax.tree.leaves(same)))
    # The window has two slots; then updates 3, 6 and 9.
    assert changed == [True, True, True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("batch_size", "outputs", "rank"),
    [(32, 40, 16), (128, 40, 32), (128, 10, 16), (256, 32, 32), (1000, 10, 64)],
)
def test_the_rank_follows_the_batch_and_the_outputs(batch_size, outputs, rank):
    model = problems.MLP((outputs,), dtype="float32")
    model_fn, params, x = problems.model_problem(model, (batch_size, 4))
    estimator = fisher_estimator(model_fn, "squared_error")
    assert estimator.init(params, x).spec.rank == rank


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (3, [1, 2, 2, 3, 3, 3])]
)
def test_rows_are_captured_every_few_updates_once_the_window_is_full(every, expected):
    p = steps.make_problem(capture_every=every)
    curvature, counts = run(p.estimator, p.params, p.batch, 6)
    assert counts == expected
    assert int(curvature.num_calls) == 6


@pytest.mark.parametrize(
    ("batch_size", "outputs", "every"),
    [(8, 3, 1), (64, 3, 8), (256, 33, 2), (256, 32, 4), (512, 33, 1), (512, 3, 2)],
)
def test_small_batches_and_few_outputs_capture_less_often(batch_size, outputs, every):
    model = problems.MLP((outputs,), dtype="float32")
    model_fn, params, x = problems.model_problem(model, (batch_size, 4))
    estimator = steps.optax_cgfac.fisher_estimator(
        model_fn, "squared_error", examples=min(32, batch_size)
    )
    assert estimator.init(params, x).spec.capture_every == every


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


def test_the_report_says_where_eigenpairs_take_the_place_of_rows():
    p = steps.make_problem(rank=4)
    curvature = p.estimator.init(p.params, p.batch["x"])
    assert "rank 4 | rank 4, eigenpairs" in curvature.report()
    assert "eigenpairs" not in curvature.report(solver="cholesky")
    assert "eigenpairs" not in curvature.report(damping_form="tikhonov")


def test_masked_parameters_are_solved_with_rows():
    """The eigenpairs are those of kernel and bias together."""
    estimator = steps.make_problem(rank=4).estimator
    p = steps.make_problem(rank=4)
    curvature, _ = run(estimator, p.params, p.batch, 2)
    _, grads = jax.value_and_grad(p.loss)(p.params, p.batch)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" in str(path), grads
    )
    solutions = []
    for solver in ("auto", "cholesky"):
        inner = cgfac(learning_rate=1.0, solver=solver)
        tx = steps.optax.masked(inner, mask)
        updates, _ = tx.update(grads, tx.init(p.params), p.params, curvature=curvature)
        solutions.append(updates)
    for x, y in zip(*map(jax.tree.leaves, solutions), strict=True):
        np.testing.assert_array_equal(x, y)


class Normed(nn.Module):
    """A norm between layers, wide enough for eigenpairs of its own."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(20)(x)))


def test_scale_and_bias_of_a_norm_lie_side_by_side():
    """With every eigenvalue that is not zero kept it is the solve with all rows."""
    model, few = Normed(), jax.random.normal(jax.random.key(0), (8, 6))
    x = jnp.tile(few, (4, 1))  # cotangents of rank 8 * 3
    params = model.init(jax.random.key(1), x)["params"]
    grads = jax.tree.map(lambda p: jnp.cos(3 * p + 1), params)
    solutions = []
    for rank in (26, None):
        estimator = fisher_estimator(
            lambda p, x: model.apply({"params": p}, x),
            "squared_error",
            kind="exact",
            examples=32,
            window=1,
            rank=rank,
            rows_dtype="float32",
        )
        curvature = estimator.init(params, x)
        curvature = estimator.update(curvature, params, x)
        assert ("LayerNorm_0" in curvature.eigenpairs) == (rank is not None)
        tx = scale_by_cgfac(0.1, damping_form="factored")
        solved, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
        solutions.append(solved)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), *solutions
    )


@pytest.mark.parametrize("scale", [1e-28, 1e-22, 1e22, 1e35])
def test_gradients_of_all_sizes_have_the_solution_in_their_units(scale):
    """Their squares are no numbers in float32."""
    problem = decaying(dtype="float32")
    eigenpairs = refreshed(operator(problem), empty(problem, 10))
    [expected], _ = solve(eigenpairs, [problem.b])
    [actual], is_finite = solve(eigenpairs, [jnp.float32(scale) * problem.b])
    assert is_finite
    actual = oracles.float64(actual) / float(np.float32(scale))
    assert oracles.relative_error(actual, expected) < 1e-5


def test_a_solution_that_overflows_is_not_taken():
    problem = decaying(dtype="float32")
    eigenpairs = refreshed(operator(problem), empty(problem, 10))
    [solution], _ = solve(eigenpairs, [jnp.float32(1e20) * problem.b], 1e-30)
    assert np.isfinite(solution).all()
