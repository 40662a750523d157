"""Applies the damped inverse curvature to a gradient tree, layer by layer."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
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
from optax_cgfac.operators.rows import num_rows
from optax_cgfac.solve.choose import SolveConfig, make_plan
from optax_cgfac.solve.eigenpairs import (
    LayerEigenpairs,
    solve_with_eigenpairs,
    split_dampings,
)
from optax_cgfac.solve.info import CGInfo, SolveInfo, StopReason, direct_info
from optax_cgfac.solve.solver import (
    checked,
    damped_operator,
    relative_residual,
    solve_layers,
)
from optax_cgfac.solve.spread import spread, spread_size
from optax_cgfac.utils.arrays import narrowed, power_of_two, scaled
from optax_cgfac.utils.devices import with_auto_axes
from optax_cgfac.utils.paths import Path, leaves_by_path, map_with_path, text
from optax_cgfac.utils.types import Array, PyTree


def precondition(
    config: SolveConfig,
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
      config: The options of the solve.
      curvature: The curvature.
      grads: Gradients; absent leaves (``MaskedNode``) are left out.
      warm_start: The previous solution, like ``grads``, or None.
      damping: The scalar damping.
      info: The info of the previous solve.

    Returns:
      The solution, like ``grads`` (leaves without a tag keep their gradient), and
      the new info.

    Raises:
      ValueError: If ``grads`` and the curvature belong to different models.
    """

    def solve(*given: Any) -> tuple[PyTree, SolveInfo]:
        return _precondition(config, *given)

    given = curvature, grads, warm_start, damping, info
    return with_auto_axes(solve, *given, like=(grads, info))


def _precondition(
    config: SolveConfig,
    curvature: Curvature,
    grads: PyTree,
    warm_start: PyTree | None,
    damping: Array,
    info: SolveInfo,
) -> tuple[PyTree, SolveInfo]:
    leaves = leaves_by_path(grads)
    starts = None if warm_start is None else leaves_by_path(warm_start)
    gamma = jnp.asarray(damping)
    # A schedule may have fallen below zero, where steps may ascend: every layer falls
    # back, and is counted.
    gamma = jnp.where(gamma < 0, jnp.nan, gamma)
    problems = [
        _problem(config, curvature, tag, leaves, starts)
        for tag in curvature.tags
        if any(path in leaves for path in tag.leaves)
    ]
    if not problems:
        raise ValueError(
            "None of the curvature's layers is among the gradients: it belongs to "
            f"another model.\n  curvature: {', '.join(t.name for t in curvature.tags)}"
            f"\n  gradients: {', '.join(map(text, leaves)) or 'no leaves'}\n"
            "Call estimator.init(params, inputs) with the parameters that are trained."
        )
    known = {leaf for tag in curvature.tags for leaf in tag.leaves}
    known |= {path for path, _ in curvature.spec.uncovered}
    if set(leaves) - known:
        raise ValueError(
            "Gradients of parameters that the curvature was not initialised with: "
            f"{', '.join(map(text, sorted(set(leaves) - known)))}. Call "
            "estimator.init(params, inputs) with the parameters that are trained."
        )
    if config.structure == "full":
        check_samples_match([p.operator for p in problems], [p.tag for p in problems])
    solved = _solve_spread(config, problems, gamma)
    solutions: dict[Path, Array] = {}
    infos: dict[Path, _Solved] = {}
    for problem, result in zip(problems, solved, strict=True):
        blocks = [_in_range(block, problem.leaves) for block in result.blocks]
        if len(problem.blocks) == 1:
            found = leaves_from_matrix(problem.tag, blocks[0], problem.leaves)
        else:
            found = leaves_from_blocks(problem.tag, blocks, problem.leaves)
        solutions |= found
        infos |= dict.fromkeys(problem.leaves, result)
    updates = map_with_path(lambda path, leaf: solutions.get(path, leaf), grads)
    dropped = {
        path: curvature.dropped[index]
        for index, tag in enumerate(curvature.tags)
        for path in tag.leaves
    }
    return updates, _merge_info(info, leaves, infos, dropped)


def _in_range(x: Array, leaves: dict[Path, Array]) -> Array:
    """Returns a solution within the range of the gradients' precision."""
    narrowest = min(
        (leaf.dtype for leaf in leaves.values()), key=lambda d: float(jnp.finfo(d).max)
    )
    return narrowed(x, narrowest).astype(x.dtype)


class _Problem(NamedTuple):
    """One layer's system.

    With eigenpairs the right-hand side may be in several blocks, one above the other.
    """

    tag: LayerTag
    leaves: dict[Path, Array]
    operator: Any
    blocks: list[Array]
    x0: Array | None
    eigenpairs: LayerEigenpairs | None


class _Solved(NamedTuple):
    """A layer's solution, in the blocks of its right-hand side, and how it went."""

    blocks: list[Array]
    num_steps: Array
    residual: Array
    failed: Array
    reason: Array


def _problem(
    config: SolveConfig,
    curvature: Curvature,
    tag: LayerTag,
    leaves: dict[Path, Array],
    starts: dict[Path, Array] | None,
) -> _Problem:
    present = {path: leaves[path] for path in tag.leaves if path in leaves}
    _check_shapes(tag, present)
    rows = rows_for_leaves(tag, curvature.layers[tag.name], present)
    x0 = None
    if starts is not None:
        x0 = matrix_from_leaves(tag, {path: starts[path] for path in present})
    operator = curvature.layer_operator(tag, rows, config.structure)
    eigenpairs = None
    # The eigenpairs are those of the layer with all of its parameters.
    if config.uses_eigenpairs and len(present) == len(tag.leaves):
        eigenpairs = curvature.eigenpairs.get(tag.name)
    # With eigenpairs a kernel and a bias need not be copied into one matrix. The
    # leaves of an elementwise layer lie side by side.
    if eigenpairs is None or tag.is_elementwise:
        blocks = [matrix_from_leaves(tag, present)]
    else:
        blocks = blocks_from_leaves(tag, present)
    return _Problem(tag, present, operator, blocks, x0, eigenpairs)


def _solve_spread(
    config: SolveConfig, problems: list[_Problem], gamma: Array
) -> list[_Solved]:
    """Solves the systems of all layers, on the devices of ``config.axis`` if any."""
    if config.axis is None:
        return _solve(config, problems, gamma)
    # Stacked layers are as many systems as they are layers.
    pieces, owners = [], []
    for index, problem in enumerate(problems):
        parts = _parts(problem, spread_size(config.axis))
        pieces += parts
        owners += [index] * len(parts)
    costs = [_cost(config, piece) for piece in pieces]
    solved = spread(
        config.axis,
        costs,
        lambda chosen: _solve(config, [pieces[i] for i in chosen], gamma),
    )
    results = []
    for index in range(len(problems)):
        of_problem = [x for x, i in zip(solved, owners, strict=True) if i == index]
        if len(of_problem) == 1:
            results += of_problem
            continue
        results.append(
            _Solved(
                _joined([x.blocks for x in of_problem]),
                jnp.max(jnp.stack([x.num_steps for x in of_problem])),
                jnp.max(jnp.stack([x.residual for x in of_problem])),
                jnp.max(jnp.stack([x.failed for x in of_problem])),
                jnp.max(jnp.stack([x.reason for x in of_problem])),
            )
        )
    return results


def _joined(parts: Sequence[list[Array]]) -> list[Array]:
    """Returns blocks that were split along the first axis of a stack as they were."""
    return [jnp.concatenate(blocks) for blocks in zip(*parts, strict=True)]


def _parts(problem: _Problem, most: int) -> list[_Problem]:
    """Splits stacked layers into at most so many systems of about the same size."""
    count = problem.tag.stack[0] if problem.tag.stack else 1
    ends = [count * i // most for i in range(most + 1)] if count > 1 else [0, 1]
    if len(set(ends)) < 3:
        return [problem]

    def cut(tree: Any, first: int, last: int) -> Any:
        # Scales that all layers of the stack share have no axis.
        return jax.tree.map(
            lambda x: x[first:last] if jnp.ndim(x) and x.shape[0] == count else x, tree
        )

    return [
        problem._replace(
            operator=cut(problem.operator, first, last),
            blocks=cut(problem.blocks, first, last),
            x0=cut(problem.x0, first, last),
            eigenpairs=cut(problem.eigenpairs, first, last),
        )
        for first, last in itertools.pairwise(ends)
        if last > first
    ]


def _cost(config: SolveConfig, problem: _Problem) -> float:
    """Operations of a system, by the plan."""
    rows = num_rows(problem.operator.a)
    *stack, _, n_out = problem.blocks[0].shape
    n_in = sum(block.shape[-2] for block in problem.blocks)
    ranks = None if problem.eigenpairs is None else problem.eigenpairs.ranks
    return math.prod(stack) * make_plan(config, rows, n_in, n_out, ranks).flops


def _solve(
    config: SolveConfig, problems: list[_Problem], gamma: Array
) -> list[_Solved]:
    """Solves the systems of some layers."""
    solved: dict[int, _Solved] = {}
    pairs = [
        (i, p, p.eigenpairs) for i, p in enumerate(problems) if p.eigenpairs is not None
    ]
    dampings = split_dampings([eigenpairs for _, _, eigenpairs in pairs], gamma)
    for (index, problem, eigenpairs), split in zip(pairs, dampings, strict=True):
        blocks, is_finite = solve_with_eigenpairs(eigenpairs, split, problem.blocks)
        info, b = (
            direct_info(problem.tag.dtype, StopReason.EIGENPAIRS),
            problem.blocks[0],
        )
        if config.certify:
            b, x = (jnp.concatenate(part, -2) for part in (problem.blocks, blocks))
            damped = damped_operator(problem.operator, gamma, config.damping_form)
            info = checked(config, damped, b, x, info)
        solved[index] = _as_solved(blocks, info, b, ~is_finite)
    others = [(i, p) for i, p in enumerate(problems) if p.eigenpairs is None]
    results = _solve_normalized(config, [problem for _, problem in others], gamma)
    for (index, _), result in zip(others, results, strict=True):
        solved[index] = result
    return [solved[index] for index in range(len(problems))]


def _solve_normalized(
    config: SolveConfig, problems: list[_Problem], gamma: Array
) -> list[_Solved]:
    """Solves with all rows, CG for right-hand sides of about one.

    CG compares squares: those of a gradient of 1e-25 are zero in float32, and those of
    one of 1e25 are infinite. Direct solves are linear in the right-hand side.

    Returns:
      For each problem its solution.
    """
    bs, x0s = [problem.blocks[0] for problem in problems], [p.x0 for p in problems]
    units = [jnp.ones((), b.dtype) for b in bs]
    if config.is_iterative and bs:
        largest = [jnp.max(jnp.abs(b), (-2, -1)) for b in bs]
        if config.structure == "full":  # one system
            of_all = jnp.max(jnp.stack([jnp.max(x) for x in largest]))
            largest = [of_all.astype(b.dtype) for b in bs]
        units = [power_of_two(x) for x in largest]
        bs = [scaled(b, 1 / unit) for b, unit in zip(bs, units, strict=True)]
        # The solution for zero is zero, wherever the last one was.
        x0s = [
            None if x0 is None else scaled(x0, jnp.where(x == 0, 0, 1 / unit))
            for x0, x, unit in zip(x0s, largest, units, strict=True)
        ]
    operators = [problem.operator for problem in problems]
    results = solve_layers(config, operators, gamma, bs, x0s)
    solved = []
    for problem, b, unit, (x, info) in zip(problems, bs, units, results, strict=True):
        # CG returns its start where the residual is not finite.
        finite = jnp.all(jnp.isfinite(info.residual_norm))
        x, failed = _replace_non_finite(
            scaled(x, unit), problem.blocks[0], problem.operator, gamma, finite
        )
        solved.append(_as_solved([x], info, b, failed))
    return solved


def _as_solved(blocks: list[Array], info: CGInfo, b: Array, failed: Array) -> _Solved:
    """Returns one layer's result; of stacked layers, the worst."""
    relative = relative_residual(info, jnp.sqrt(jnp.sum(b**2, (-2, -1))))
    reason = jnp.where(failed, StopReason.NOT_FINITE.value, jnp.max(info.reason))
    return _Solved(
        blocks,
        jnp.max(info.num_steps),
        jnp.max(relative),
        failed.astype(jnp.int32),
        reason.astype(jnp.int32),
    )


def _replace_non_finite(
    x: Array, b: Array, operator: Any, damping: Array, finite: Array
) -> tuple[Array, Array]:
    mean_curvature = operator.trace() / (b.shape[-2] * b.shape[-1])
    mean_curvature = mean_curvature + damping.astype(b.dtype)
    safe = b / mean_curvature[..., None, None]
    safe = jnp.where(jnp.all(jnp.isfinite(safe)), safe, 0)
    finite = finite & jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(b))
    # Without curvature and damping there is nothing to solve: x would be rounding.
    finite &= jnp.all(mean_curvature > 0)
    return jnp.where(finite, x, safe), ~finite


def _merge_info(
    info: SolveInfo,
    paths: Iterable[Path],
    infos: dict[Path, _Solved],
    dropped: dict[Path, Array],
) -> SolveInfo:
    columns = []
    for index, path in enumerate(paths):
        column = SolveInfo(*(x[index] for x in info))
        if path in infos:
            solved = infos[path]
            column = SolveInfo(
                num_steps=solved.num_steps,
                residual=solved.residual,
                num_replaced=column.num_replaced + solved.failed,
                reason=solved.reason,
                num_dropped=dropped.get(path, column.num_dropped),
            )
        columns.append(column)
    stacked = [jnp.stack(x) for x in zip(*columns, strict=True)]
    return SolveInfo(*(x.astype(y.dtype) for x, y in zip(stacked, info, strict=True)))


def _check_shapes(tag: LayerTag, leaves: dict[Path, Array]) -> None:
    expected = dict(zip(tag.leaves, tag.shapes, strict=True))
    for path, leaf in leaves.items():
        if leaf.shape != expected[path]:
            raise ValueError(
                f"Gradient {text(path)!r} has shape {leaf.shape}, but the curvature "
                f"was initialised for {expected[path]} there: it belongs to another "
                "model. Call estimator.init(params, inputs) again."
            )
