from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from optax_cgfac import StopReason, conjugate_gradient
from optax_cgfac.solve.cg import Space, cg_loop


class DenseOperator(NamedTuple):
    """A dense matrix on vectors that may be any pytree."""

    matrix: jax.Array

    def matvec(self, vector):
        flat, unravel = jax.flatten_util.ravel_pytree(vector)
        return unravel(self.matrix @ flat)


def diagonal(entries):
    return DenseOperator(jnp.diag(jnp.asarray(entries)))


solve = jax.jit(conjugate_gradient)

SIZE = 8
CONDITION = 100


def dense_problem(dtype, seed=0):
    """A positive definite matrix with condition number 100, and a right-hand side."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    matrix = (basis * np.geomspace(0.1, 10, SIZE)) @ basis.T
    b, x0 = rng.normal(size=(2, SIZE))
    return tuple(jnp.asarray(x, dtype) for x in (matrix, b, x0))


def test_it_converges_to_what_the_precision_allows(dtype):
    matrix, b, _ = dense_problem(dtype)
    rtol = 20 * np.finfo(dtype).eps
    x, info = solve(DenseOperator(matrix), b, max_steps=100, rtol=rtol)
    assert x.dtype == dtype
    assert info.converged
    assert oracles.relative_error(x, oracles.solve(matrix, b)) < oracles.tolerance(
        dtype, CONDITION
    )


def test_the_error_falls_monotonically_in_the_norm_of_the_operator(x64):
    matrix, b, x0 = dense_problem("float64")
    solution = oracles.solve(matrix, b)
    errors = []
    for max_steps in range(1, SIZE + 1):
        x, _ = solve(DenseOperator(matrix), b, x0, max_steps=max_steps, rtol=0.0)
        errors.append((x - solution) @ matrix @ (x - solution))
    assert np.all(np.diff(errors) < 0)


def test_a_vector_may_be_any_pytree(dtype):
    matrix, b, x0 = dense_problem(dtype)

    def as_tree(flat):
        return {"w": flat[:6].reshape(2, 3), "b": (flat[6], flat[7:])}

    limits = {"max_steps": 4, "rtol": 0.0}
    x, info = solve(DenseOperator(matrix), b, x0, **limits)
    # ravel_pytree takes the keys of a dict in sorted order.
    order = jax.flatten_util.ravel_pytree(as_tree(jnp.arange(SIZE)))[0]
    permuted = DenseOperator(matrix[order][:, order])
    tree, tree_info = solve(permuted, as_tree(b), as_tree(x0), **limits)
    assert jax.tree.structure(tree) == jax.tree.structure(as_tree(b))
    flat = jax.flatten_util.ravel_pytree(tree)[0]
    assert oracles.relative_error(flat, x[order]) < oracles.tolerance(dtype, CONDITION)
    np.testing.assert_allclose(tree_info.residual_norm, info.residual_norm, rtol=1e-4)


@pytest.mark.parametrize(
    ("tolerances", "bound"),
    [
        ({"rtol": 0.1}, 0.1),
        ({"rtol": 0.0, "atol": 0.5}, 0.5 / 3.0),
        ({"rtol": 0.1, "atol": 0.9}, 0.3),
        ({"rtol": 0.3, "atol": 0.1}, 0.3),
    ],
    ids=["relative", "absolute", "absolute is larger", "relative is larger"],
)
def test_it_stops_at_the_first_step_within_the_tolerance(tolerances, bound, x64):
    matrix, b, _ = dense_problem("float64")
    b = 3 * b / jnp.linalg.norm(b)
    iterates = oracles.cg_iterates(matrix, b, np.zeros(SIZE), SIZE)
    residuals = [np.linalg.norm(b - oracles.apply(matrix, x)) for x in iterates]
    expected = 1 + next(i for i, r in enumerate(residuals) if r <= bound * 3)
    _, info = solve(DenseOperator(matrix), b, max_steps=50, **tolerances)
    assert info.converged
    assert info.num_steps == expected


def test_a_right_hand_side_whose_norm_overflows_is_not_reported_as_solved():
    matrix, b, _ = dense_problem("float32")
    x, info = solve(DenseOperator(matrix), 1e25 * b, max_steps=50)
    b, dense = np.asarray(1e25 * b, np.float64), np.asarray(matrix, np.float64)
    residual = b - dense @ np.asarray(x, np.float64)
    is_solved = np.linalg.norm(residual) <= 1e-4 * np.linalg.norm(b)
    assert np.all(np.isfinite(x))
    assert info.converged == is_solved


def test_a_direction_of_negative_curvature_ends_at_the_last_good_iterate(x64):
    matrix = np.diag([4.0, 3.0, 2.0, -0.2])
    b = jnp.array([1.0, 1.0, 1.0, 0.3])
    iterates = oracles.cg_iterates(matrix, b, np.zeros(4), 4)
    x, info = solve(DenseOperator(jnp.asarray(matrix)), b, max_steps=10, rtol=1e-9)
    assert not info.converged
    assert 1 < info.num_steps <= 4
    last_good = iterates[int(info.num_steps) - 2]
    np.testing.assert_allclose(x, last_good, rtol=1e-12)
    residual = np.linalg.norm(b - matrix @ last_good)
    np.testing.assert_allclose(info.residual_norm, residual, rtol=1e-12)


def test_a_step_whose_residual_overflows_is_not_taken_whatever_its_preconditioner():
    """The preconditioned residual is finite: what grows is divided by a thousand."""
    operator = diagonal(jnp.array([1e-20, 1e3]))
    inverse = diagonal(jnp.array([1.0, 1e-3]))
    b = jnp.array([1e10, 1.0])
    x, info = solve(operator, b, max_steps=3, preconditioner=inverse)
    assert info.reason == StopReason.NOT_FINITE
    np.testing.assert_array_equal(x, 0)
    np.testing.assert_allclose(info.residual_norm, 1e10, rtol=1e-6)


@pytest.mark.parametrize(("size", "rtol"), [(300.0, 0.5), (1e-3, 1e-2)])
def test_half_precision_has_a_tolerance_beyond_its_range(size, rtol):
    """``rtol² ‖b‖²`` is infinite, or zero, in float16."""
    with np.errstate(over="ignore"):
        assert np.float16(rtol**2 * size**2 * SIZE) in (0, np.inf)
    operator = diagonal(jnp.linspace(1.0, 1.5, SIZE, dtype="float16"))
    b = jnp.full(SIZE, size, "float16")
    x, info = solve(operator, b, max_steps=4, rtol=rtol)
    assert x.dtype == jnp.float16
    assert info.reason == StopReason.CONVERGED
    residual = oracles.float64(b) - oracles.float64(operator.matvec(x))
    assert np.linalg.norm(residual) <= 1.1 * rtol * np.linalg.norm(oracles.float64(b))


@pytest.mark.parametrize("value", [-0.5, float("nan")])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_negative_tolerance_is_refused(name, value):
    operator, b = diagonal(jnp.ones(2)), jnp.ones(2)
    with pytest.raises(ValueError, match=f"{name} must be .*not negative, got {value}"):
        conjugate_gradient(operator, b, max_steps=2, **{name: value})


def columns_problem():
    matrix, b, x0 = dense_problem("float32")
    return matrix, jnp.stack([b, 0 * b, 1e3 * x0, matrix @ b], 1)


def solve_columns(matrix, b, squared_tolerance, max_steps):
    return cg_loop(
        Space(lambda x: matrix @ x, lambda u, v: jnp.sum(u * v, 0)),
        b,
        jnp.zeros_like(b),
        squared_tolerance=squared_tolerance,
        max_steps=max_steps,
    )


@pytest.mark.parametrize("max_steps", [2, 30])
def test_columns_are_independent_systems_with_their_own_stop(max_steps):
    matrix, b = columns_problem()
    tolerance = 1e-6 * jnp.sum(b * b, 0)
    x, squared_norms, num_steps, reasons = solve_columns(
        matrix, b, tolerance, max_steps
    )
    steps = []
    for column in range(b.shape[1]):
        expected, info = solve(
            DenseOperator(matrix), b[:, column], max_steps=max_steps, rtol=1e-3
        )
        scale = max(np.linalg.norm(expected), 1.0)
        assert np.linalg.norm(x[:, column] - expected) < 1e-3 * scale
        assert info.converged == (squared_norms[column] <= tolerance[column])
        assert info.reason == reasons[column]
        steps.append(int(info.num_steps))
    # Rounding, which differs from program to program, may decide about one step.
    assert abs(int(num_steps) - max(steps)) <= 1
    assert len(set(steps)) > 1


def test_a_bad_column_does_not_spoil_the_others():
    matrix, b = columns_problem()
    tolerance = 1e-6 * jnp.sum(b * b, 0)
    expected = solve_columns(matrix, b, tolerance, 20).x
    x, _, _, reasons = solve_columns(matrix, b.at[3, 1].set(jnp.nan), tolerance, 20)
    np.testing.assert_allclose(x[:, [0, 2, 3]], expected[:, [0, 2, 3]], rtol=1e-6)
    assert not np.any(x[:, 1])
    assert np.flatnonzero(reasons == StopReason.NOT_FINITE) == [1]
