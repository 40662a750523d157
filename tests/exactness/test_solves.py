"""Conjugate gradients against the textbook's, step by step."""

import jax
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import DampedOperator, KroneckerOperator, conjugate_gradient
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


def setup(size, start, dtype="float64"):
    problem = problems.layer_problem(*size, dtype=dtype)
    scale = 1 / len(problem.a)
    operator = KroneckerOperator(problem.a, problem.g, scale, scale)
    return problem, operator, problem.x0 if start == "warm" else None


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
    damped = DampedOperator(operator, DAMPING)
    expected, _ = in_parameter_space(damped, problem.b, x0, **limits)
    x, _ = on_rows(operator, DAMPING, problem.b, x0, **limits)
    assert x.dtype == dtype
    assert oracles.relative_error(x, expected) <= AGREEMENT[dtype]


@starts
def test_both_spaces_stop_at_the_same_step_with_the_same_residual(start, dtype):
    problem, operator, x0 = setup((16, 24, 20), start, dtype)
    # Rounding makes the iterates differ in the end: start near enough to stop before.
    x0 = None if x0 is None else 0.1 * x0
    limits = {"max_steps": 30, "rtol": 0.5}
    damped = DampedOperator(operator, DAMPING)
    _, expected = in_parameter_space(damped, problem.b, x0, **limits)
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
        DampedOperator(operator, DAMPING),
        problem.b,
        x0,
        max_steps=num_steps,
        rtol=0.0,
        preconditioner=problems.Diagonal(weights) if preconditioned else None,
    )
    expected = oracles.cg_iterates(dense, problem.b, x0, num_steps, weights)
    assert oracles.relative_error(x, expected[-1]) <= 1e-10
