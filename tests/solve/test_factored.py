import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import FactoredDampedOperator, KroneckerOperator
from optax_cgfac.solve.factored import (
    factored_damping,
    solve_by_cg,
    solve_directly,
    split_damping,
)

DAMPING = 0.1
SIZES = {"fewer rows": (4, 9, 7), "between": (8, 9, 7), "more rows": (20, 9, 7)}

direct = jax.jit(
    lambda operators, bs: solve_directly(
        [factored_damping(operator, DAMPING) for operator in operators], bs
    )
)
by_cg = jax.jit(solve_by_cg)


def kronecker(problem):
    scale = 1 / problem.a.shape[-2]
    return KroneckerOperator(problem.a, problem.g, scale, scale)


def damped(problem, damping=DAMPING):
    return factored_damping(kronecker(problem), damping)


def expected_solution(problem, damping=DAMPING):
    dense = oracles.factored(problem.a, problem.g, damping)
    return oracles.solve(dense, problem.b)


@pytest.mark.parametrize("ratio", [1e-2, 1.0, 30.0])
def test_the_damping_is_split_by_the_mean_eigenvalues(ratio, dtype):
    problem = problems.layer_problem(6, 5, 3, dtype=dtype)
    problem = problem._replace(a=ratio * problem.a)
    split = damped(problem)
    expected = oracles.factored_dampings(problem.a, problem.g, DAMPING)
    rtol = oracles.tolerance(dtype)
    np.testing.assert_allclose((split.a_damping, split.g_damping), expected, rtol=rtol)
    np.testing.assert_allclose(split.a_damping * split.g_damping, DAMPING, rtol=rtol)


def test_the_split_is_bounded(dtype):
    for ratio, pi in ((1e40, 1e18), (1e-40, 1e-18)):
        means = [jnp.asarray(x, dtype) for x in (ratio**0.5, ratio**-0.5)]
        alpha, beta = split_damping(*means, (1, 1), 1e8)
        # π within [1e-18, 1e18]
        np.testing.assert_allclose(alpha, pi * 1e4, rtol=1e-5)
        np.testing.assert_allclose(beta, 1e4 / pi, rtol=1e-5)


@pytest.mark.parametrize("dead", ["a", "g"])
def test_a_dead_side_splits_the_damping_evenly(dead):
    problem = problems.layer_problem(6, 5, 3, dtype="float32")
    problem = problem._replace(**{dead: jnp.zeros_like(getattr(problem, dead))})
    split = damped(problem, damping=0.25)
    np.testing.assert_allclose((split.a_damping, split.g_damping), 0.5, rtol=1e-6)


def test_stacked_layers_have_their_own_split(dtype):
    layers = [problems.layer_problem(6, 5, 3, seed=i, dtype=dtype) for i in range(3)]
    layers[1] = layers[1]._replace(a=10 * layers[1].a)
    split = damped(problems.stack_problems(layers))
    expected = [oracles.factored_dampings(p.a, p.g, DAMPING) for p in layers]
    actual = np.stack([split.a_damping, split.g_damping], -1)
    np.testing.assert_allclose(actual, expected, rtol=oracles.tolerance(dtype))


def test_without_damping_a_rank_deficient_layer_still_has_a_solution():
    problem = problems.layer_problem(3, 9, 7, dtype="float32")
    split = damped(problem, damping=0.0)
    assert split.a_damping > 0
    assert split.g_damping > 0
    [x] = solve_directly([split], [problem.b])
    assert np.all(np.isfinite(x))


def test_a_direct_solve_of_many_layers_at_once(dtype):
    layers = [problems.layer_problem(*size, dtype=dtype) for size in SIZES.values()]
    solutions = direct([kronecker(p) for p in layers], [p.b for p in layers])
    for problem, x in zip(layers, solutions, strict=True):
        condition = np.linalg.cond(oracles.factored(problem.a, problem.g, DAMPING))
        assert x.dtype == dtype
        assert oracles.relative_error(x, expected_solution(problem)) < (
            oracles.tolerance(dtype, condition)
        )


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_direct_solve_of_stacked_layers_is_that_of_each(size, dtype):
    layers = [problems.layer_problem(*size, seed=i, dtype=dtype) for i in range(2)]
    stacked = problems.stack_problems(layers)
    [x] = direct([kronecker(stacked)], [stacked.b])
    for problem, solution in zip(layers, x, strict=True):
        condition = np.linalg.cond(oracles.factored(problem.a, problem.g, DAMPING))
        assert oracles.relative_error(solution, expected_solution(problem)) < (
            oracles.tolerance(dtype, condition)
        )


@pytest.mark.parametrize(
    ("size", "start"),
    [
        ("fewer rows", "warm"),
        ("between", "zero"),
        ("between", "warm"),
        ("more rows", "warm"),
    ],
)
def test_conjugate_gradients_on_both_sides_solve_the_system(size, start, dtype):
    problem = problems.layer_problem(*SIZES[size], dtype=dtype)
    rtol = 20 * np.finfo(dtype).eps
    x0 = problem.x0 if start == "warm" else None
    x, info = by_cg(damped(problem), problem.b, x0, max_steps=300, rtol=rtol)
    condition = np.linalg.cond(oracles.factored(problem.a, problem.g, DAMPING))
    assert info.converged
    assert x.dtype == dtype
    assert oracles.relative_error(x, expected_solution(problem)) < (
        oracles.tolerance(dtype, condition)
    )


def test_columns_converge_each_to_their_own_tolerance(x64):
    problem = problems.layer_problem(4, 9, 7)
    columns = 10.0 ** -jnp.arange(7.0)
    b = problem.b * columns  # a sum over columns would stop at the large ones
    operator = damped(problem)
    # Only the left side has something to solve.
    operator = FactoredDampedOperator(
        KroneckerOperator(problem.a, jnp.zeros_like(problem.g), 0.25, 0.25),
        operator.a_damping,
        jnp.ones(()),
    )
    x, info = by_cg(operator, b, max_steps=100, rtol=1e-8)
    left = oracles.moment(problem.a) + operator.a_damping * np.eye(9)
    expected = np.linalg.solve(left, b)
    assert info.converged
    np.testing.assert_allclose(
        np.linalg.norm(x - expected, axis=0) / np.linalg.norm(expected, axis=0),
        0,
        atol=1e-7,
    )


def test_max_steps_bounds_each_side_and_convergence_is_reported():
    problem = problems.layer_problem(16, 24, 20, dtype="float32")
    limits = {"rtol": 1e-5}
    _, few = by_cg(damped(problem), problem.b, max_steps=3, **limits)
    _, many = by_cg(damped(problem), problem.b, max_steps=100, **limits)
    assert few.num_steps == 6
    assert not few.converged
    assert many.converged
    assert many.residual_norm < few.residual_norm
