"""Every solver, run to convergence, equals the dense solve to 1e-9 in float64."""

import jax
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import (
    DampedOperator,
    KroneckerOperator,
    conjugate_gradient,
    jacobi_preconditioner,
)
from optax_cgfac.solve.direct import solve_by_eigendecomposition
from optax_cgfac.solve.factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac.solve.sample_space import cg_on_rows

pytestmark = pytest.mark.usefixtures("x64")

DAMPING = 0.1
EPS = np.finfo(np.float64).eps
LIMITS = {"max_steps": 500, "rtol": 1e-13}


def damped(operator, form):
    if form == "tikhonov":
        return DampedOperator(operator, DAMPING)
    return factored_damping(operator, DAMPING)


def in_parameter_space(operator, form, b, x0):
    return conjugate_gradient(damped(operator, form), b, x0, **LIMITS)[0]


def with_jacobi(operator, form, b, x0):
    operator = damped(operator, form)
    preconditioner = jacobi_preconditioner(operator)
    return conjugate_gradient(operator, b, x0, preconditioner=preconditioner, **LIMITS)[
        0
    ]


def on_rows(operator, form, b, x0):
    if form == "tikhonov":
        return cg_on_rows(operator, DAMPING, b, x0, **LIMITS)[0]
    return solve_by_cg(damped(operator, form), b, x0, **LIMITS)[0]


SOLVERS = {
    solver.__name__: jax.jit(solver, static_argnums=1)
    for solver in (in_parameter_space, with_jacobi, on_rows)
}


LAYERS = pytest.mark.parametrize(
    ("num_rows", "bias"),
    [(4, True), (20, False)],
    ids=["few rows, bias", "many rows, no bias"],
)


def layer(num_rows, bias):
    problem = problems.layer_problem(num_rows, 7, 6, bias=bias)
    scale = 1 / num_rows
    return problem, KroneckerOperator(problem.a, problem.g, scale, scale)


@pytest.mark.parametrize("start", ["zero", "warm"])
@pytest.mark.parametrize("solver", SOLVERS)
@LAYERS
@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_conjugate_gradients_equal_the_dense_solve(form, num_rows, bias, solver, start):
    problem, operator = layer(num_rows, bias)
    x0 = problem.x0 if start == "warm" else None
    x = SOLVERS[solver](operator, form, problem.b, x0)
    dense = oracles.DAMPED[form](problem.a, problem.g, DAMPING)
    # Inner products of coefficients cancel: see the attainable accuracy
    # in _sample_space.py.
    redundant = solver == "on_rows" and form == "tikhonov"
    tolerance = EPS**0.5 if redundant else 1e-9
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < tolerance


@LAYERS
@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_eigendecompositions_equal_the_dense_solve(form, num_rows, bias):
    problem, operator = layer(num_rows, bias)
    x = solve_by_eigendecomposition(damped(operator, form), problem.b)
    dense = oracles.DAMPED[form](problem.a, problem.g, DAMPING)
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < 1e-9


@LAYERS
def test_the_direct_factored_solve_equals_the_dense_solve(num_rows, bias):
    problem, operator = layer(num_rows, bias)
    [x] = solve_directly([damped(operator, "factored")], [problem.b])
    dense = oracles.factored(problem.a, problem.g, DAMPING)
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < 1e-9
