import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import KroneckerOperator, StopReason
from optax_cgfac.solve import sample_space
from optax_cgfac.solve.sample_space import cg_on_rows

solve = jax.jit(cg_on_rows)

DAMPING = 0.1


def setup(dtype="float32", num_rows=5):
    problem = problems.layer_problem(num_rows, 9, 7, dtype=dtype)
    operator = KroneckerOperator(problem.a, problem.g, 1 / num_rows, 1 / num_rows)
    return problem, operator


def test_scales_weigh_the_operator(x64):
    problem, _ = setup("float64")
    operator = KroneckerOperator(problem.a, problem.g, 0.3, 0.5)
    x, info = solve(operator, DAMPING, problem.b, max_steps=200, rtol=1e-7)
    dense = np.kron(oracles.moment(problem.a, 0.3), oracles.moment(problem.g, 0.5))
    dense += DAMPING * np.eye(len(dense))
    assert info.converged
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < 1e-6


def test_a_window_without_rows_divides_by_the_damping():
    problem, operator = setup()
    empty = jax.tree.map(jnp.zeros_like, operator)
    x, info = solve(empty, DAMPING, problem.b, problem.x0, max_steps=3, rtol=1e-3)
    np.testing.assert_allclose(x, problem.b / DAMPING, rtol=1e-5)
    assert info.converged


def test_steps_beyond_convergence_do_no_harm():
    problem, operator = setup(num_rows=2)
    x, _ = solve(operator, DAMPING, problem.b, max_steps=200, rtol=0.0)
    dense = oracles.tikhonov(problem.a, problem.g, DAMPING)
    condition = np.linalg.cond(dense)
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < (
        oracles.tolerance("float32", condition)
    )


def test_no_step_is_taken_and_no_residual_told_below_rounding(monkeypatch):
    """As if rounding were larger than all numbers."""
    monkeypatch.setattr(sample_space, "_ROUNDING", 1.2 / np.finfo("float32").eps)
    problem, operator = setup()
    x, info = cg_on_rows(operator, DAMPING, problem.b, max_steps=5)
    assert info.reason == StopReason.STAGNATED
    assert info.num_steps == 0
    assert not np.any(x)
    np.testing.assert_allclose(
        info.residual_norm, 1.2**0.5 * jnp.linalg.norm(problem.b), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_steps_on_rounding_are_not_taken_for_the_solution(seed):
    """Where nothing is known of it, the residual among rows comes out as zero."""
    problem = problems.layer_problem(40, 8, 6, seed=seed, dtype="float32")
    operator = KroneckerOperator(problem.a, problem.g, 1 / 40, 1 / 40)
    x, info = solve(operator, 1e-4, problem.b, max_steps=100, rtol=0.0)
    dense = oracles.tikhonov(problem.a, problem.g, 1e-4)
    truth = np.linalg.norm(oracles.float64(problem.b) - oracles.apply(dense, x))
    assert info.reason == StopReason.STAGNATED
    assert info.residual_norm > 0.5 * truth > 0


def test_no_residual_below_rounding_is_called_converged():
    problem = problems.layer_problem(20, 5, 4, dtype="float32")
    operator = KroneckerOperator(problem.a, problem.g, 1 / 20, 1 / 20)
    for rtol, converges in ((1e-2, True), (1e-5, False)):
        _, info = cg_on_rows(operator, 0.1, problem.b, max_steps=100, rtol=rtol)
        assert bool(info.converged) == converges
        assert info.residual_norm > 0
