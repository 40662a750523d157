"""A batch that is split over the devices of a named axis, inside `jax.shard_map`.

Every device captures rows of its own examples. The new rows are gathered, so that all
devices hold the same window and take the same step; nothing else of the curvature is
sent but a 2 x 2 matrix.
"""

import jax
import jax.numpy as jnp

from optax_cgfac.operators.rows import (
    IndexRows,
    Rows,
    StackedRows,
    as_dtype,
    split_rows,
)
from optax_cgfac.utils.devices import axis_size
from optax_cgfac.utils.types import Array, LayerRows

# The oldest version of JAX seen to gather what it knows to be the same on all devices.
_GATHERS_INVARIANTLY = (0, 10, 2)


def gathered(rows: LayerRows, dtype: str, axis_name: str | None) -> LayerRows:
    """Returns the rows of all devices, device by device.

    Args:
      rows: This device's rows of one layer.
      dtype: The dtype in which they are kept, and sent.
      axis_name: The axis; None to return ``rows``.

    Returns:
      The rows, the same on every device.
    """
    if axis_name is None:
        return rows

    def gather(x: Array, axis: int) -> Array:
        axis %= x.ndim
        if jax.__version_info__ >= _GATHERS_INVARIANTLY:
            return jax.lax.all_gather(
                x, axis_name, axis=axis, tiled=True, to="invarying"
            )
        # A sum in which every device has its own part, zeros elsewhere: more is sent.
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
