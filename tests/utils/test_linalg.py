"""Helpers on arrays and trees, and linear algebra against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from optax_cgfac.utils import arrays, linalg


def random_matrices(size, stack=(), *, dtype, seed=0):
    """Positive definite, condition number 100."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(*stack, size, size)))[0]
    values = np.geomspace(0.1, 10, size)
    return jnp.asarray((basis * values) @ np.swapaxes(basis, -1, -2), dtype)


def test_tree_dot_sums_over_all_leaves(dtype):
    rng = np.random.default_rng(0)
    x, y = ({"w": rng.normal(size=(4, 3)), "b": [rng.normal(size=5)]} for _ in range(2))
    expected = np.sum(x["w"] * y["w"]) + np.sum(x["b"][0] * y["b"][0])
    as_dtype = [jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), t) for t in (x, y)]
    dot = arrays.tree_dot(*as_dtype)
    assert dot.dtype == dtype
    assert abs(dot - expected) < oracles.tolerance(dtype, condition=10)


def test_tree_dtype_is_the_promoted_dtype(x64):
    tree = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float64)}
    assert arrays.tree_dtype(tree) == jnp.float64
    assert arrays.tree_dot(tree, tree).dtype == jnp.float64


@pytest.mark.parametrize("value", [1.0, jnp.nan, jnp.inf, -jnp.inf])
def test_tree_is_finite_looks_at_every_entry(value):
    tree = {"a": jnp.zeros(3), "b": (jnp.zeros((2, 2)).at[1, 0].set(value),)}
    assert arrays.tree_is_finite(tree) == np.isfinite(value)
    assert arrays.tree_is_finite({})


def test_safe_divide_gives_zero_where_the_denominator_is_zero(dtype):
    numerator = jnp.asarray([6.0, 1.0, 0.0, -3.0], dtype)
    denominator = jnp.asarray([2.0, 0.0, 0.0, 4.0], dtype)
    quotient = arrays.safe_divide(numerator, denominator)
    assert quotient.dtype == dtype
    np.testing.assert_array_equal(quotient, [3.0, 0.0, 0.0, -0.75])


@pytest.mark.parametrize("size", [2, 30, 120])
def test_the_tiny_shift_keeps_a_singular_gram_matrix_definite(size, dtype):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(size, 1 + size // 10)), dtype)
    matrix = linalg.matmul(rows, rows.T)
    shift = linalg.tiny_shift(jnp.trace(matrix))
    assert 0 < shift < 1e-3 * jnp.trace(matrix)
    factor = jnp.linalg.cholesky(matrix + shift * jnp.eye(size, dtype=dtype))
    assert np.all(np.isfinite(factor))


def test_the_tiny_shift_of_a_zero_matrix_can_be_divided_by(dtype):
    shift = linalg.tiny_shift(jnp.zeros((), dtype))
    assert shift.dtype == dtype
    assert shift > 0
    assert np.isfinite(1 / shift)
    # Over both factors of a layer no step can be taken with it.
    assert np.isinf(1 / shift**2)


@pytest.mark.parametrize("exponent", [-120, -1, 0, 30, 120])
def test_a_power_of_two_changes_no_digit(exponent, dtype):
    x = jnp.asarray([1.0, 1.5, 1.99, 1 / 3], dtype) * 2.0**exponent
    unit = arrays.power_of_two(jnp.max(x))
    assert unit.dtype == dtype
    assert 1 <= jnp.max(x) / unit < 4
    assert np.log2(unit) == round(float(np.log2(unit)))
    np.testing.assert_array_equal((x / unit) * unit, x)
    np.testing.assert_array_equal(x * (1 / unit), x / unit)


@pytest.mark.parametrize("number", [0.0, np.nan, np.inf])
def test_what_cannot_be_divided_by_has_the_unit_one(number):
    assert arrays.power_of_two(jnp.asarray(number, jnp.float32)) == 1


def test_narrowed_numbers_end_at_the_range():
    x = jnp.array([1e38, -1e38, 1.5, 1e-30, jnp.nan])
    half = np.asarray(arrays.narrowed(x, "float16"))
    np.testing.assert_array_equal(half, np.float16([65504, -65504, 1.5, 0, np.nan]))
    assert np.isfinite(arrays.narrowed(jnp.asarray(3.4e38), "bfloat16"))
    np.testing.assert_array_equal(arrays.narrowed(x, "float32"), x)


def test_dot_products_in_half_precision_have_the_range_of_single():
    x = {"large": jnp.full(100, 300, jnp.float16), "small": jnp.full(3, 1e-4)}
    assert float(arrays.tree_dot(x, x)) == pytest.approx(9e6, rel=1e-6)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: arrays.tree_dot(x, x))(x))


def test_inverses_of_many_sizes_stacks_and_positions(dtype):
    shapes = [(1, ()), (5, (2,)), (32, ()), (33, ()), (31, (2, 3)), (70, ())]
    matrices = [
        random_matrices(size, stack, dtype=dtype, seed=seed)
        for seed, (size, stack) in enumerate(shapes)
    ]
    inverses = jax.jit(linalg.spd_inverses)(matrices)
    assert len(inverses) == len(matrices)
    for matrix, inverse in zip(matrices, inverses, strict=True):
        expected = np.linalg.inv(oracles.float64(matrix))
        assert inverse.dtype == dtype
        assert oracles.relative_error(inverse, expected) < oracles.tolerance(
            dtype, condition=100
        )


@pytest.mark.parametrize("size", [1, 33, 200])
def test_blocked_and_unblocked_inverses_agree(size, dtype):
    matrices = random_matrices(size, (2,), dtype=dtype)
    blocked = jax.jit(linalg.blocked_inverse)(matrices)
    unblocked = jax.jit(linalg.cholesky_inverse)(matrices)
    assert oracles.relative_error(blocked, unblocked) < oracles.tolerance(
        dtype, condition=100
    )


INDEFINITE = {
    "negative": -np.eye(3),
    "zero": np.zeros((3, 3)),
    "singular": np.ones((3, 3)),
    "indefinite": np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "not a number": np.full((3, 3), np.nan),
    "large, last pivot negative": np.diag([*np.ones(39), -1.0]),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_the_inverse_of_what_is_not_positive_definite_is_not_finite(name):
    matrix = jnp.asarray(INDEFINITE[name], jnp.float32)[None]
    for invert in (linalg.blocked_inverse, linalg.cholesky_inverse):
        assert not np.all(np.isfinite(invert(matrix)))


def test_a_bad_matrix_does_not_spoil_the_others_of_its_batch():
    good = jnp.diag(jnp.array([2.0, 4.0]))
    bad, inverse = linalg.spd_inverses([-good, good])
    assert not np.all(np.isfinite(bad))
    np.testing.assert_allclose(inverse, np.diag([0.5, 0.25]), rtol=1e-6)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_three_rounds_of_cholesky_give_an_orthonormal_basis(condition):
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(2, 40, 7)))[0]
    right = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    matrices = (left * np.geomspace(1, 1 / condition, 7)) @ right
    basis = np.asarray(linalg.cholesky_qr(jnp.asarray(matrices, jnp.float32)))
    eps = np.finfo(np.float32).eps
    gram = np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(7), gram.shape), atol=1e-5)
    # The columns' span: what lies outside is rounding, seen through the condition.
    outside = basis - left @ (np.swapaxes(left, -1, -2) @ basis)
    assert np.linalg.norm(outside, 2, (-2, -1)).max() < 10 * eps * condition


def test_dependent_columns_leave_the_others_alone():
    rng = np.random.default_rng(0)
    three = rng.normal(size=(40, 3))
    matrices = np.concatenate([three, three @ rng.normal(size=(3, 4))], -1)[None]
    basis = np.asarray(linalg.cholesky_qr(jnp.asarray(matrices, jnp.float32)))[0]
    gram = basis.T @ basis
    np.testing.assert_allclose(gram[:3, :3], np.eye(3), atol=1e-5)
    # No direction twice, whatever rounding made of the dependent columns.
    assert np.linalg.eigvalsh(gram).max() < 1 + 1e-5
    np.testing.assert_array_equal(linalg.cholesky_qr(jnp.zeros((1, 5, 2))), 0)


def test_a_gpu_orthonormalizes_by_products_and_a_cpu_by_reflections():
    traced = jax.jit(linalg.orthonormal).trace(jnp.ones((2, 8, 3)))
    programs = {
        name: traced.lower(lowering_platforms=(name,)).as_text()
        for name in ("cpu", "cuda")
    }
    assert "geqrf" in programs["cpu"]
    assert "cholesky" in programs["cuda"] or "potrf" in programs["cuda"]
    assert "geqrf" not in programs["cuda"]
    assert "householder" not in programs["cuda"]
