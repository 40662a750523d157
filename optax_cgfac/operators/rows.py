"""One side of a layer's rows: dense, one-hot, or one-hot rows above dense ones.

One-hot rows of an embedding are kept as indices; products gather or scatter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.utils.arrays import narrowed
from optax_cgfac.utils.linalg import matmul
from optax_cgfac.utils.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexRows:
    """Rows ``weights[r] · e(indices[r])`` with unit vectors ``e`` of length ``size``.

    Both arrays have shape ``(*stack, R)``; a row of weight zero does not count.
    """

    indices: Array
    weights: Array
    size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedRows:
    """One-hot rows above dense ones, with the same number of features."""

    top: IndexRows
    bottom: Array


# An array, IndexRows or StackedRows. With a union, pyright would lose the form.
Rows = Any


def num_rows(rows: Rows) -> int:
    """Returns ``R``."""
    if isinstance(rows, StackedRows):
        return num_rows(rows.top) + num_rows(rows.bottom)
    if isinstance(rows, IndexRows):
        return rows.indices.shape[-1]
    return rows.shape[-2]


def num_features(rows: Rows) -> int:
    """Returns ``n``."""
    if isinstance(rows, StackedRows):
        return rows.top.size
    return rows.size if isinstance(rows, IndexRows) else rows.shape[-1]


def rows_dtype(rows: Rows) -> jnp.dtype:
    """Returns the dtype of the rows' entries."""
    if isinstance(rows, StackedRows):
        return rows.bottom.dtype
    return rows.weights.dtype if isinstance(rows, IndexRows) else rows.dtype


def times(rows: Rows, x: Array) -> Array:
    """Returns ``rows x``, shape ``(*stack, R, k)`` for ``x`` of ``(*stack, n, k)``."""
    if isinstance(rows, StackedRows):
        return jnp.concatenate([times(rows.top, x), times(rows.bottom, x)], -2)
    if isinstance(rows, IndexRows):
        if rows.indices.ndim > 1:
            return jax.vmap(times)(rows, x)
        return rows.weights[:, None] * x[rows.indices]
    return matmul(rows, x)


def transpose_times(rows: Rows, z: Array) -> Array:
    """Returns ``rowsᵀ z``, shape ``(*stack, n, k)`` for ``z`` of ``(*stack, R, k)``."""
    if isinstance(rows, StackedRows):
        above, below = split_rows(rows, z)
        return transpose_times(rows.top, above) + transpose_times(rows.bottom, below)
    if isinstance(rows, IndexRows):
        if rows.indices.ndim > 1:
            return jax.vmap(transpose_times)(rows, z)
        zeros = jnp.zeros((rows.size, z.shape[-1]), z.dtype)
        return zeros.at[rows.indices].add(rows.weights[:, None] * z)
    return matmul(rows.mT, z)


def gram(rows: Rows) -> Array:
    """Returns ``rows rowsᵀ``, shape ``(*stack, R, R)``."""
    if isinstance(rows, StackedRows):
        cross = times(rows.top, rows.bottom.mT)
        above = jnp.concatenate([gram(rows.top), cross], -1)
        below = jnp.concatenate([cross.mT, gram(rows.bottom)], -1)
        return jnp.concatenate([above, below], -2)
    if isinstance(rows, IndexRows):
        equal = rows.indices[..., :, None] == rows.indices[..., None, :]
        weights = rows.weights[..., :, None] * rows.weights[..., None, :]
        return jnp.where(equal, weights, 0)
    return matmul(rows, rows.mT)


def column_squares(rows: Rows) -> Array:
    """Returns the diagonal of ``rowsᵀ rows``, shape ``(*stack, n)``."""
    if isinstance(rows, StackedRows):
        return column_squares(rows.top) + column_squares(rows.bottom)
    if isinstance(rows, IndexRows):
        return transpose_times(rows, rows.weights[..., None])[..., 0]
    return jnp.sum(rows**2, -2)


def squared_norm(rows: Rows) -> Array:
    """Returns the sum of all squared entries, shape ``stack``."""
    if isinstance(rows, StackedRows):
        return squared_norm(rows.top) + squared_norm(rows.bottom)
    if isinstance(rows, IndexRows):
        return jnp.sum(rows.weights**2, -1)
    return jnp.sum(rows**2, (-2, -1))


def to_dense(rows: Rows) -> Array:
    """Returns the rows as an array ``(*stack, R, n)``; for small layers only."""
    if isinstance(rows, StackedRows):
        return jnp.concatenate([to_dense(rows.top), rows.bottom], -2)
    if isinstance(rows, IndexRows):
        one_hot = jax.nn.one_hot(rows.indices, rows.size, dtype=rows.weights.dtype)
        return rows.weights[..., None] * one_hot
    return rows


def squares_are_finite(rows: Rows) -> Array:
    """Whether the squares of 65,536 such rows have a finite sum, ``(*stack, R)``."""
    if isinstance(rows, StackedRows):
        both = squares_are_finite(rows.top), squares_are_finite(rows.bottom)
        return jnp.concatenate(both, -1)
    if isinstance(rows, IndexRows):
        return jnp.isfinite((256 * rows.weights) ** 2)
    return jnp.isfinite(jnp.sum((256 * rows) ** 2, -1))


def keep_where(rows: Rows, mask: Array) -> Rows:
    """Returns the rows with zeros in place of those where ``mask`` is false."""
    if isinstance(rows, StackedRows):
        split = num_rows(rows.top)
        top = keep_where(rows.top, mask[..., :split])
        return StackedRows(top, keep_where(rows.bottom, mask[..., split:]))
    if isinstance(rows, IndexRows):
        return dataclasses.replace(rows, weights=jnp.where(mask, rows.weights, 0))
    return jnp.where(mask[..., None], rows, 0)


def as_dtype(rows: Rows, dtype: jnp.dtype | str) -> Rows:
    """Returns the rows with entries of ``dtype``; indices stay as they are."""
    if isinstance(rows, StackedRows):
        return StackedRows(as_dtype(rows.top, dtype), rows.bottom.astype(dtype))
    if isinstance(rows, IndexRows):
        return dataclasses.replace(rows, weights=rows.weights.astype(dtype))
    return rows.astype(dtype)


def update_slot(buffer: Rows, new: Rows, slot: Array) -> Rows:
    """Puts ``new`` into a slot of a ring buffer of rows."""
    if isinstance(buffer, StackedRows):
        top = update_slot(buffer.top, new.top, slot)
        return StackedRows(top, update_slot(buffer.bottom, new.bottom, slot))

    def update(old: Any, new: Any, axis: int) -> Array:
        start = slot * new.shape[axis]
        is_real = jnp.issubdtype(old.dtype, jnp.floating)
        new = narrowed(new, old.dtype) if is_real else new.astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)

    if isinstance(buffer, IndexRows):
        indices = update(buffer.indices, new.indices, -1)
        return IndexRows(indices, update(buffer.weights, new.weights, -1), buffer.size)
    return update(buffer, new, -2)


def split_rows(like: Rows, rows: Array) -> list[Array]:
    """Splits the other side's rows where those of ``like`` change form."""
    if isinstance(like, StackedRows):
        split = num_rows(like.top)
        return [rows[..., :split, :], rows[..., split:, :]]
    return [rows]


def num_bytes(rows: Rows) -> int:
    """Returns the memory that rows, or a tree of arrays, take."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))


def cross_gram(x: Rows, y: Rows) -> Array:
    """Returns ``x yᵀ`` for unstacked rows of one form each."""
    if isinstance(x, IndexRows) and isinstance(y, IndexRows):
        equal = x.indices[:, None] == y.indices[None, :]
        return jnp.where(equal, x.weights[:, None] * y.weights[None, :], 0)
    if isinstance(y, IndexRows):
        return times(y, jnp.asarray(x).mT).mT
    return times(x, y.mT)


def per_example(rows: Rows, count: int) -> Rows:
    """Returns rows of one form as ``(*stack, R/count, count, n)``."""
    if isinstance(rows, IndexRows):
        return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], -1, count), rows)
    return rows.reshape(*rows.shape[:-2], -1, count, rows.shape[-1])
