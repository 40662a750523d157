"""From trees to layers and back: applies the damped inverse curvature to gradients."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature, check_samples_match
from optax_cgfac.layers.layer import (
    LayerTag,
    blocks_from_leaves,
    leaves_from_blocks,
    leaves_from_matrix,
    matrix_from_leaves,
    rows_for_leaves,
)
from optax_cgfac.solve.choose import SolveSpec
from optax_cgfac.solve.info import SolveInfo
from optax_cgfac.solve.solver import Solved, System, solve_systems
from optax_cgfac.utils.arrays import narrowed
from optax_cgfac.utils.devices import with_auto_axes
from optax_cgfac.utils.paths import Path, leaves_by_path, map_with_path, text
from optax_cgfac.utils.types import Array, PyTree


def precondition(
    spec: SolveSpec,
    curvature: Curvature,
    grads: PyTree,
    warm_start: PyTree | None,
    damping: Array,
    info: SolveInfo,
) -> tuple[PyTree, SolveInfo]:
    """Solves ``(F + damping) x = grads`` for every tagged layer.

    A layer whose solution is not finite gets its gradient divided by the damped
    mean curvature instead, or zero if the gradient itself is not finite.

    Args:
      spec: How to solve.
      curvature: The curvature.
      grads: Gradients; absent leaves (``MaskedNode``) are left out.
      warm_start: The previous solution, like ``grads``, or None.
      damping: The scalar damping.
      info: The info of the previous solve.

    Returns:
      The solution, like ``grads`` (leaves without a tag keep their gradient), and
      the new info.
    """

    def solve(*given: Any) -> tuple[PyTree, SolveInfo]:
        return _precondition(spec, *given)

    given = curvature, grads, warm_start, damping, info
    return with_auto_axes(solve, *given, like=(grads, info))


def _precondition(
    spec: SolveSpec,
    curvature: Curvature,
    grads: PyTree,
    warm_start: PyTree | None,
    damping: Array,
    info: SolveInfo,
) -> tuple[PyTree, SolveInfo]:
    leaves = leaves_by_path(grads)
    starts = None if warm_start is None else leaves_by_path(warm_start)
    _check_same_model(curvature, leaves)
    if curvature.spec.asks_for_eigenpairs and not spec.uses_eigenpairs:
        raise ValueError(
            "fisher_estimator(rank=, refresh_every=) needs solves by eigenpairs, got "
            f"solver={spec.method!r}. Leave both out, or use cgfac() as it is."
        )
    tags = [tag for tag in curvature.tags if any(path in leaves for path in tag.leaves)]
    present = [{p: leaves[p] for p in tag.leaves if p in leaves} for tag in tags]
    systems = [
        _system(spec, curvature, tag, own, starts)
        for tag, own in zip(tags, present, strict=True)
    ]
    if spec.structure == "full":
        check_samples_match([system.operator for system in systems], tags)
    gamma = jnp.asarray(damping)
    # A schedule may have fallen below zero, where steps may ascend: every solution is
    # replaced, and counted.
    gamma = jnp.where(gamma < 0, jnp.nan, gamma)
    solutions: dict[Path, Array] = {}
    by_path: dict[Path, Solved] = {}
    for tag, own, solved in zip(
        tags, present, solve_systems(spec, systems, gamma), strict=True
    ):
        blocks = [_in_range(block, own) for block in solved.blocks]
        if len(blocks) == 1:
            solutions |= leaves_from_matrix(tag, blocks[0], own)
        else:
            solutions |= leaves_from_blocks(tag, blocks, own)
        by_path |= dict.fromkeys(own, solved)
    updates = map_with_path(lambda path, leaf: solutions.get(path, leaf), grads)
    dropped = {
        path: curvature.dropped[index]
        for index, tag in enumerate(curvature.tags)
        for path in tag.leaves
    }
    return updates, _merge_info(info, leaves, by_path, dropped)


def _system(
    spec: SolveSpec,
    curvature: Curvature,
    tag: LayerTag,
    present: dict[Path, Array],
    starts: dict[Path, Array] | None,
) -> System:
    """Returns a layer's system for the parameters whose gradients are present."""
    rows = rows_for_leaves(tag, curvature.layers[tag.name], present)
    x0 = None
    if starts is not None:
        x0 = matrix_from_leaves(tag, {path: starts[path] for path in present})
    operator = curvature.layer_operator(tag, rows, spec.structure)
    eigenpairs = None
    # The eigenpairs are those of the layer with all of its parameters.
    if spec.uses_eigenpairs and len(present) == len(tag.leaves):
        eigenpairs = curvature.eigenpairs.get(tag.name)
    # The leaves of an elementwise layer lie side by side.
    if eigenpairs is None or tag.is_elementwise:
        blocks = [matrix_from_leaves(tag, present)]
    else:
        blocks = blocks_from_leaves(tag, present)
    return System(operator, blocks, x0, eigenpairs)


def _in_range(x: Array, leaves: dict[Path, Array]) -> Array:
    """Returns a solution within the range of the gradients' precision."""
    narrowest = min(
        (leaf.dtype for leaf in leaves.values()), key=lambda d: float(jnp.finfo(d).max)
    )
    return narrowed(x, narrowest).astype(x.dtype)


def _merge_info(
    info: SolveInfo,
    paths: Iterable[Path],
    by_path: dict[Path, Solved],
    dropped: dict[Path, Array],
) -> SolveInfo:
    columns = []
    for index, path in enumerate(paths):
        column = SolveInfo(*(x[index] for x in info))
        if path in by_path:
            solved = by_path[path]
            column = SolveInfo(
                num_steps=solved.num_steps,
                residual=solved.residual,
                num_replaced=column.num_replaced + solved.replaced,
                reason=solved.reason,
                num_dropped=dropped.get(path, column.num_dropped),
            )
        columns.append(column)
    stacked = [jnp.stack(x) for x in zip(*columns, strict=True)]
    return SolveInfo(*(x.astype(y.dtype) for x, y in zip(stacked, info, strict=True)))


def _check_same_model(curvature: Curvature, leaves: dict[Path, Array]) -> None:
    """Checks that gradients belong to the model whose layers the curvature holds."""
    shapes = {
        path: shape
        for tag in curvature.tags
        for path, shape in zip(tag.leaves, tag.shapes, strict=True)
    }
    known = shapes.keys() | {path for path, _ in curvature.spec.uncovered}
    strange = [
        f"{text(path)} {leaf.shape}"
        for path, leaf in leaves.items()
        if path not in known or leaf.shape != shapes.get(path, leaf.shape)
    ]
    if strange or not shapes.keys() & leaves.keys():
        layers = ", ".join(f"{text(path)} {shape}" for path, shape in shapes.items())
        raise ValueError(
            "The curvature must be of the parameters that are trained.\n"
            f"  expected: gradients of {layers}\n"
            f"  got:      {', '.join(strange) or 'none of them'}\n"
            "Call estimator.init(params, inputs) with the parameters that are trained."
        )
