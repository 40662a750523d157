"""Solvers against dense float64 solutions, step by step and at convergence."""

import jax
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import DampedOperator, KroneckerOperator, conjugate_gradient
from optax_cgfac.solve.direct import solve_by_eigendecomposition
from optax_cgfac.solve.factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac.solve.sample_space import cg_on_rows

DAMPING = 0.1
AGREEMENT = {"float64": 1e-10, "float32": 1e-3}
SIZES = {
    "fewer rows than features": (16, 24, 20),
    "more rows than features": (60, 8, 6),
    "one row": (1, 6, 5),
}

in_parameter_space = jax.jit(conjugate_gradient)
on_rows = jax.jit(cg_on_rows)
starts = pytest.mark.parametrize("start", ["zero", "warm"])
forms = pytest.mark.parametrize("form", ["tikhonov", "factored"])
layers = pytest.mark.parametrize(
    ("num_rows", "bias"),
    [(4, True), (20, False)],
    ids=["few rows, bias", "many rows, no bias"],
)


def setup(size, start="zero", dtype="float64", **options):
    problem = problems.layer_problem(*size, dtype=dtype, **options)
    scale = 1 / len(problem.a)
    operator = KroneckerOperator(problem.a, problem.g, scale, scale)
    return problem, operator, problem.x0 if start == "warm" else None


def damped(operator, form):
    damp = {"tikhonov": DampedOperator, "factored": factored_damping}[form]
    return damp(operator, DAMPING)


# ---------------------------------------------------------------- step by step


def test_with_one_example_the_operator_is_the_product_of_algorithm_2(dtype):
    problem = problems.layer_problem(1, 5, 3, bias=True, dtype=dtype)
    product = KroneckerOperator(problem.a, problem.g).matvec(problem.b)
    expected = oracles.algorithm2_product(problem.a[0], problem.g[0], problem.b)
    assert product.dtype == dtype
    assert oracles.relative_error(product, expected) < oracles.tolerance(dtype)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
@starts
@pytest.mark.parametrize("size", SIZES)
def test_sample_space_equals_parameter_space(size, start, num_steps, dtype):
    problem, operator, x0 = setup(SIZES[size], start, dtype)
    limits = {"max_steps": num_steps, "rtol": 0.0}
    expected, _ = in_parameter_space(
        damped(operator, "tikhonov"), problem.b, x0, **limits
    )
    x, _ = on_rows(operator, DAMPING, problem.b, x0, **limits)
    assert x.dtype == dtype
    assert oracles.relative_error(x, expected) <= AGREEMENT[dtype]


@starts
def test_both_spaces_stop_at_the_same_step_with_the_same_residual(start, dtype):
    problem, operator, x0 = setup((16, 24, 20), start, dtype)
    # Rounding makes the iterates differ in the end: start near enough to stop before.
    x0 = None if x0 is None else 0.1 * x0
    limits = {"max_steps": 30, "rtol": 0.5}
    _, expected = in_parameter_space(
        damped(operator, "tikhonov"), problem.b, x0, **limits
    )
    _, info = on_rows(operator, DAMPING, problem.b, x0, **limits)
    assert 1 < info.num_steps < 30
    assert info.num_steps == expected.num_steps
    assert info.converged
    assert expected.converged
    np.testing.assert_allclose(
        info.residual_norm, expected.residual_norm, rtol=AGREEMENT[dtype]
    )


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
def test_parameter_space_equals_the_textbook(num_steps, preconditioned, x64):
    problem, operator, x0 = setup((16, 24, 20), "warm")
    dense = oracles.tikhonov(problem.a, problem.g, DAMPING)
    weights = 1 / np.diag(dense).reshape(problem.b.shape) if preconditioned else None
    x, _ = in_parameter_space(
        damped(operator, "tikhonov"),
        problem.b,
        x0,
        max_steps=num_steps,
        rtol=0.0,
        preconditioner=problems.Diagonal(weights) if preconditioned else None,
    )
    expected = oracles.cg_iterates(dense, problem.b, x0, num_steps, weights)
    assert oracles.relative_error(x, expected[-1]) <= 1e-10


# ---------------------------------------------------------------- at convergence


def to_convergence(solver, operator, form, b, x0):
    limits = {"max_steps": 500, "rtol": 1e-13}
    if solver == "parameter":
        return in_parameter_space(damped(operator, form), b, x0, **limits)[0]
    if form == "tikhonov":
        return on_rows(operator, DAMPING, b, x0, **limits)[0]
    return solve_by_cg(damped(operator, form), b, x0, **limits)[0]


@starts
@pytest.mark.parametrize("solver", ["parameter", "rows"])
@layers
@forms
def test_conjugate_gradients_equal_the_dense_solve(
    form, num_rows, bias, solver, start, x64
):
    problem, operator, x0 = setup((num_rows, 7, 6), start, bias=bias)
    x = to_convergence(solver, operator, form, problem.b, x0)
    dense = oracles.DAMPED[form](problem.a, problem.g, DAMPING)
    # Inner products of redundant coefficients cancel.
    redundant = solver == "rows" and form == "tikhonov"
    tolerance = np.finfo(np.float64).eps ** 0.5 if redundant else 1e-9
    assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < tolerance


@layers
@forms
def test_direct_solves_equal_the_dense_solve(form, num_rows, bias, x64):
    problem, operator, _ = setup((num_rows, 7, 6), bias=bias)
    operator = damped(operator, form)
    solutions = [solve_by_eigendecomposition(operator, problem.b)]
    if form == "factored":
        solutions += solve_directly([operator], [problem.b])
    dense = oracles.DAMPED[form](problem.a, problem.g, DAMPING)
    for x in solutions:
        assert oracles.relative_error(x, oracles.solve(dense, problem.b)) < 1e-9
