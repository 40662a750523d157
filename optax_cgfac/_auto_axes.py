"""Meshes whose axes are explicit, where every operation must say how its result lies.

Slices of a sharded batch and products with its transpose would have to be told. Inside
`auto_axes` the compiler decides, as it does on a mesh of automatic axes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optax_cgfac._types import PyTree


def with_auto_axes(
    function: Callable[..., Any], *args: Any, like: PyTree | None = None
) -> Any:
    """Calls a function with all axes of the mesh automatic.

    Args:
      function: Returns arrays.
      *args: Its arguments, pytrees of arrays.
      like: A tree with the structure of the results, whose shardings they get; None
        for results that all devices have.

    Returns:
      What ``function(*args)`` returns.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(*args)
    out_sharding = PartitionSpec()
    if like is not None:
        out_sharding = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*args)


def without_shardings(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes of arrays as if they lay on one device."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.eval_shape(lambda: tree),
    )
