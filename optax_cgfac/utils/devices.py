"""Explicitly sharded meshes, and batches that `jax.shard_map` splits over an axis."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optax_cgfac.utils.types import Array, PyTree


def with_auto_axes(
    function: Callable[..., Any], *args: Any, like: PyTree | None = None
) -> Any:
    """Calls a function with all axes of the mesh automatic.

    On a mesh of explicit axes, slices of a sharded batch and products with its
    transpose need an output sharding; with automatic axes the compiler chooses it.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(*args)
    out_sharding = PartitionSpec()
    if like is not None:
        out_sharding = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*args)


def without_shardings(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes of arrays, without their shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda: tree)
    )


def axis_size(axis_name: str | None) -> int:
    """Returns the number of devices that share a batch; 1 without an axis."""
    if axis_name is None:
        return 1
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is the name of a mesh axis, and there is no such "
            "axis here. Call update() and tx.update() inside jax.shard_map over it, or "
            "leave axis_name out: under jax.jit alone sharded batches need none."
        ) from None


def per_device(name: str, count: int, axis_name: str | None) -> int:
    """Returns a device's share of ``count`` examples."""
    size = axis_size(axis_name)
    if count % size:
        raise ValueError(
            f"{name}={count} examples cannot be split over the {size} devices of the "
            f"axis {axis_name!r}: pass fisher_estimator(..., {name}=...) a multiple of "
            f"{size}."
        )
    return count // size


def own_key(rng: Array, axis_name: str | None) -> Array:
    """Returns a key that differs from device to device."""
    if axis_name is None:
        return rng
    return jax.random.fold_in(rng, jax.lax.axis_index(axis_name))


def mean_over(x: Array, axis_name: str | None) -> Array:
    """Returns the mean over the devices; ``x`` without an axis."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def warn_of_hanging_lapack() -> None:
    """Warns where several CPU devices of this process would call OpenBLAS at once."""
    # Its threads may then wait for each other for ever (seen with 8 devices on 2 cores,
    # jaxlib 0.10.2, `jnp.linalg.eigh`).
    is_cpu = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    if is_cpu and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        warnings.warn(
            "Several CPU devices of one process call LAPACK at once, and OpenBLAS may "
            "then hang. Set OPENBLAS_NUM_THREADS=1 before Python starts.",
            RuntimeWarning,
            stacklevel=4,
        )
