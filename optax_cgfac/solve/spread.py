"""Spreads independent pieces of work over the devices of an axis, and gathers them."""

import heapq
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optax_cgfac.utils.types import PyTree


def assign(costs: Sequence[float], num_devices: int) -> list[list[int]]:
    """Gives every piece to a device, the dearest first, each to the least busy.

    Args:
      costs: Of every piece.
      num_devices: How many there are.

    Returns:
      The numbers of the pieces of every device, ascending. No device has more than
      4/3 of what the best assignment gives its busiest.

    Example:
      >>> assign([5.0, 1.0, 3.0, 3.0], 2)
      [[0, 1], [2, 3]]

    References:
      Graham (1969), "Bounds on multiprocessing timing anomalies".
    """
    loads = [(0.0, device) for device in range(num_devices)]
    groups: list[list[int]] = [[] for _ in range(num_devices)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, device = heapq.heappop(loads)
        groups[device].append(index)
        heapq.heappush(loads, (load + costs[index], device))
    return [sorted(group) for group in groups]


def spread(
    axis_name: str,
    costs: Sequence[float],
    work: Callable[[Sequence[int]], list[PyTree]],
) -> list[PyTree]:
    """Does each piece of work on one device of an axis, and tells all the results.

    Args:
      axis_name: An axis of the mesh: that of the `jax.shard_map` this is called in,
        or under `jax.jit` one of the mesh that `jax.set_mesh` has set.
      costs: Of every piece.
      work: ``work([2, 5])`` returns the results of pieces 2 and 5, trees of arrays.

    Returns:
      The results of all pieces.

    Raises:
      ValueError: If there is no such axis.
    """
    shapes = jax.eval_shape(lambda: work(range(len(costs))))

    def branch(group: Sequence[int]) -> Callable[[], list[PyTree]]:
        def run() -> list[PyTree]:
            found = dict(zip(group, work(group) if group else [], strict=True))
            done = [
                found.get(i, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape))
                for i, shape in enumerate(shapes)
            ]
            return jax.tree.map(lambda x: _varying(x, axis_name), done)

        return run

    def on_devices() -> list[PyTree]:
        groups = assign(costs, jax.lax.axis_size(axis_name))
        device = jax.lax.axis_index(axis_name)
        parts = jax.lax.switch(device, [branch(group) for group in groups])
        # All but one of the addends are zero.
        return jax.lax.psum(parts, axis_name)

    if is_bound(axis_name):
        return on_devices()
    spread_size(axis_name)
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(
        on_devices, in_specs=(), out_specs=whole, axis_names={axis_name}
    )()


def spread_size(axis_name: str) -> int:
    """Returns the number of devices of the axis, here or in the mesh that is set.

    Raises:
      ValueError: If there is no such axis.
    """
    if is_bound(axis_name):
        return jax.lax.axis_size(axis_name)
    mesh = jax.sharding.get_abstract_mesh()
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"solve_axis={axis_name!r} is no axis of a mesh here: there are "
            f"{mesh.axis_names or 'none'}. Call update() under jax.set_mesh(mesh), or "
            "inside jax.shard_map over that axis."
        )
    return mesh.shape[axis_name]


def is_bound(axis_name: str) -> bool:
    """Whether the code runs inside a map over the axis."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def _varying(x: jax.Array, axis_name: str) -> jax.Array:
    """Marks an array as one of which every device has its own."""
    if axis_name in getattr(jax.typeof(x), "vma", ()):
        return x
    return jax.lax.pcast(x, axis_name, to="varying")
