import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import DampedOperator, KroneckerOperator
from optax_cgfac.solve.direct import solve_by_eigendecomposition
from optax_cgfac.solve.factored import factored_damping

DAMPING = 0.1


def damped(problem, form, damping=DAMPING):
    scale = 1 / len(problem.a)
    operator = KroneckerOperator(problem.a, problem.g, scale, scale)
    if form == "tikhonov":
        return DampedOperator(operator, damping)
    return factored_damping(operator, damping)


@pytest.mark.parametrize("num_rows", [2, 12])
@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_it_equals_the_dense_solve(form, num_rows, dtype):
    problem = problems.layer_problem(num_rows, 6, 4, bias=True, dtype=dtype)
    x = solve_by_eigendecomposition(damped(problem, form), problem.b)
    dense = oracles.DAMPED[form](problem.a, problem.g, DAMPING)
    assert x.dtype == dtype
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < (
        oracles.tolerance(dtype, np.linalg.cond(dense))
    )


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_zero_eigenvalues_under_a_small_damping_do_not_flip_the_direction(form):
    problem = problems.layer_problem(2, 20, 20, dtype="float32")
    operator = damped(problem, form, damping=1e-6)
    x = solve_by_eigendecomposition(operator, problem.b)
    assert np.all(np.isfinite(x))
    assert jnp.sum(x * problem.b) > 0


def test_a_window_without_rows_divides_by_the_damping():
    problem = problems.layer_problem(3, 5, 4, dtype="float32")
    operator = KroneckerOperator(jnp.zeros((3, 5)), jnp.zeros((3, 4)), 1.0, 1.0)
    x = solve_by_eigendecomposition(DampedOperator(operator, DAMPING), problem.b)
    np.testing.assert_allclose(x, problem.b / DAMPING, rtol=1e-5)
