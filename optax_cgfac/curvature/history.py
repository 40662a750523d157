"""The window of rows: its length, new rows in a slot, rows gathered from devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.operators.rows import (
    IndexRows,
    Rows,
    StackedRows,
    as_dtype,
    keep_where,
    split_rows,
    squares_are_finite,
    update_slot,
)
from optax_cgfac.utils.arrays import scaled
from optax_cgfac.utils.devices import axis_size
from optax_cgfac.utils.types import Array, LayerRows

WINDOW = 8
"""How many captures are kept by default."""


def pushed(
    layers: Mapping[str, LayerRows], new: Mapping[str, LayerRows], slot: Array
) -> tuple[dict[str, LayerRows], Array]:
    """Puts one capture's rows into a slot; returns how many each layer dropped, too."""
    good = {name: without_bad_rows(new[name]) for name in layers}
    kept = {name: put_into_slot(layers[name], x, slot) for name, (x, _) in good.items()}
    return kept, jnp.array([num_bad for _, num_bad in good.values()])


def without_bad_rows(new: LayerRows) -> tuple[LayerRows, Array]:
    """Zeroes rows that are non-finite or have a zero cotangent; counts the former."""
    # A row with a NaN, or with infinite squares, would poison the layer for a whole
    # window. The others are scaled to stand for it in the mean of g gᵀ.
    finite = squares_are_finite(new.a) & squares_are_finite(new.g)
    good = finite & jnp.any(new.g != 0, -1)
    g = keep_where(new.g, good)
    share = jnp.maximum(jnp.mean(finite, -1, dtype=g.dtype), 1 / g.shape[-2])
    kept = LayerRows(keep_where(new.a, good), scaled(g, jax.lax.rsqrt(share)))
    return kept, jnp.sum(~finite, dtype=jnp.int32)


def empty_rows(tag: LayerTag, window: int, dtype: str) -> LayerRows:
    """Returns a window of zeros."""
    num_rows = window * tag.rows_per_step
    g = jnp.zeros((*tag.stack, num_rows, tag.n_out), dtype)
    per_example = sum(use.kept for use in tag.uses)
    of_indices = (u.kept for u in tag.uses if u.form == "index" or u.sampled)
    num_indices = num_rows * sum(of_indices) // per_example
    dense = jnp.zeros((*tag.stack, num_rows - num_indices, tag.n_in), dtype)
    if not num_indices:
        return LayerRows(dense, g)
    shape = (*tag.stack, num_indices)
    indices = IndexRows(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, dtype), tag.n_in)
    a = indices if num_indices == num_rows else StackedRows(indices, dense)
    return LayerRows(a, g)


def put_into_slot(buffer: LayerRows, new: LayerRows, slot: Array) -> LayerRows:
    """Puts one update's rows into a slot of the window."""
    g = [
        update_slot(old, part, slot)
        for old, part in zip(
            split_rows(buffer.a, buffer.g), split_rows(new.a, new.g), strict=True
        )
    ]
    a = update_slot(buffer.a, new.a, slot)
    return LayerRows(a, g[0] if len(g) == 1 else jnp.concatenate(g, -2))


# From this version on `all_gather` can mark its result as equal on all devices.
_GATHERS_INVARIANTLY = (0, 10, 2)


def gathered(rows: LayerRows, dtype: str, axis_name: str | None) -> LayerRows:
    """Returns one layer's rows of all devices of the axis, sent in ``dtype``."""
    if axis_name is None:
        return rows

    def gather(x: Array, axis: int) -> Array:
        axis %= x.ndim
        if jax.__version_info__ >= _GATHERS_INVARIANTLY:
            return jax.lax.all_gather(
                x, axis_name, axis=axis, tiled=True, to="invarying"
            )
        # Sums arrays that are zero outside a device's own part, which sends more.
        size, index = axis_size(axis_name), jax.lax.axis_index(axis_name)
        shape = (*x.shape[:axis], size * x.shape[axis], *x.shape[axis + 1 :])
        whole = jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros(shape, x.dtype), x, index * x.shape[axis], axis
        )
        return jax.lax.psum(whole, axis_name)

    def gather_indices(side: IndexRows) -> IndexRows:
        return IndexRows(gather(side.indices, -1), gather(side.weights, -1), side.size)

    def gather_side(side: Rows) -> Rows:
        if isinstance(side, StackedRows):
            return StackedRows(gather_indices(side.top), gather(side.bottom, -2))
        if isinstance(side, IndexRows):
            return gather_indices(side)
        return gather(side, -2)

    parts = [gather(part.astype(dtype), -2) for part in split_rows(rows.a, rows.g)]
    g = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -2)
    return LayerRows(gather_side(as_dtype(rows.a, dtype)), g)
