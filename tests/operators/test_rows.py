"""Every form of rows does what its dense array does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from optax_cgfac.operators import rows as rows_module

SIZE = 7


def one_hot_rows(num_rows, stack, dtype):
    rng = np.random.default_rng(0)
    shape = (*stack, num_rows)
    indices = jnp.asarray(rng.integers(0, SIZE, shape), jnp.int32)
    weights = jnp.asarray(rng.normal(size=shape), dtype)
    return rows_module.IndexRows(indices, weights, SIZE)


def dense_rows(num_rows, stack, dtype):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(*stack, num_rows, SIZE)), dtype)


FORMS = {
    "dense": lambda stack, dtype: dense_rows(9, stack, dtype),
    "one-hot": lambda stack, dtype: one_hot_rows(9, stack, dtype),
    "one-hot above dense": lambda stack, dtype: rows_module.StackedRows(
        one_hot_rows(5, stack, dtype), dense_rows(4, stack, dtype)
    ),
}


@pytest.fixture(params=FORMS)
def make(request):
    return FORMS[request.param]


@pytest.fixture(params=[(), (2,), (2, 3)], ids=str)
def stack(request):
    return request.param


def test_products_and_sums(make, stack, dtype):
    rows = make(stack, dtype)
    dense = oracles.float64(rows_module.to_dense(rows))
    assert rows_module.num_rows(rows) == 9
    assert rows_module.num_features(rows) == SIZE
    assert rows_module.rows_dtype(rows) == dtype
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(*stack, SIZE, 3)), dtype)
    z = jnp.asarray(rng.normal(size=(*stack, 9, 3)), dtype)
    transposed = np.swapaxes(dense, -1, -2)
    for actual, expected in (
        (rows_module.times(rows, x), dense @ oracles.float64(x)),
        (rows_module.transpose_times(rows, z), transposed @ oracles.float64(z)),
        (rows_module.gram(rows), dense @ transposed),
        (rows_module.column_squares(rows), (dense**2).sum(-2)),
        (rows_module.squared_norm(rows), (dense**2).sum((-2, -1))),
    ):
        assert actual.dtype == dtype
        assert oracles.relative_error(actual, expected) < oracles.tolerance(dtype)


def spoiled(rows):
    """The rows with a NaN in the first one of each form, and which those are."""
    if isinstance(rows, rows_module.StackedRows):
        (top, bad), (bottom, worse) = spoiled(rows.top), spoiled(rows.bottom)
        return rows_module.StackedRows(top, bottom), bad + worse
    first = [True] + [False] * (rows_module.num_rows(rows) - 1)
    if isinstance(rows, rows_module.IndexRows):
        weights = rows.weights.at[..., 0].set(jnp.nan)
        return rows_module.IndexRows(rows.indices, weights, rows.size), first
    return rows.at[..., 0, :].set(jnp.nan), first


def test_rows_that_are_not_finite_are_found_and_left_out(make, stack, dtype):
    rows = make(stack, dtype)
    poisoned, bad = spoiled(rows)
    finite = rows_module.squares_are_finite(poisoned)
    np.testing.assert_array_equal(finite, np.broadcast_to(~np.array(bad), finite.shape))
    kept = rows_module.to_dense(rows_module.keep_where(poisoned, finite))
    dense = np.where(finite[..., None], rows_module.to_dense(rows), 0)
    np.testing.assert_array_equal(kept, dense)


@pytest.mark.parametrize(("number", "fits"), [(1e15, True), (1e17, False)])
def test_rows_whose_squares_cannot_be_added_up_are_found(number, fits):
    rows = jnp.ones((3, SIZE)).at[1, 2].set(number)
    finite = rows_module.squares_are_finite(rows)
    np.testing.assert_array_equal(finite, [True, fits, True])
    assert (65536 * number**2 < float(np.finfo("float32").max)) == fits


def test_a_slot_holds_what_its_precision_can():
    buffer = jnp.zeros((2, 3), jnp.float16)
    held = rows_module.update_slot(buffer, jnp.full((1, 3), -1e6), jnp.asarray(1))
    np.testing.assert_array_equal(held, np.float16([[0] * 3, [-65504] * 3]))


@pytest.mark.parametrize("slot", [0, 1])
def test_a_slot_of_the_ring_buffer_is_replaced(make, stack, dtype, slot):
    rows = make(stack, dtype)
    twice = jax.tree.map(
        lambda x: jnp.concatenate([x, x], -2 if x.ndim > len(stack) + 1 else -1), rows
    )
    zeros = jax.tree.map(jnp.zeros_like, rows)
    buffer = rows_module.update_slot(twice, zeros, jnp.asarray(slot))
    left, expected = (jnp.sum(rows_module.squared_norm(x)) for x in (buffer, rows))
    assert float(left) == pytest.approx(float(expected), rel=1e-4)


def test_products_ask_for_full_precision():
    assert "HIGHEST" in str(jax.make_jaxpr(rows_module.gram)(jnp.ones((2, 3))))
