"""Applies the damped inverse curvature to a gradient tree, layer by layer."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._cg import CGInfo
from optax_cgfac._curvature import Curvature, check_units
from optax_cgfac._layers import (
    LayerTag,
    blocks_from_leaves,
    leaves_from_blocks,
    leaves_from_matrix,
    matrix_from_leaves,
    rows_for_leaves,
)
from optax_cgfac._low_rank import LayerSpectra, solve_low_rank, split_dampings
from optax_cgfac._numerics import safe_divide
from optax_cgfac._paths import Path, leaves_by_path, map_with_path, text
from optax_cgfac._solve import SolveConfig, exact_info, solve_layers
from optax_cgfac._types import Array, PyTree


class SolveInfo(NamedTuple):
    """How the last solve of every layer went: vectors over the parameters' leaves.

    Vectors and not trees like the parameters: what Optax's tools find in such trees
    they take for one array per parameter, with its shape and sharding. A layer's
    kernel and bias hold the same numbers; of stacked layers, the worst.

    Attributes:
      num_steps: CG iterations, int32; 0 for direct solves.
      residual: Residual norm relative to the gradient's.
      num_fallbacks: Solves so far whose result was not finite and was replaced.
    """

    num_steps: Array
    residual: Array
    num_fallbacks: Array


def init_info(params: PyTree) -> SolveInfo:
    """Returns the info of before the first solve."""
    shape = (len(jax.tree.leaves(params)),)
    return SolveInfo(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )


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
    leaves = leaves_by_path(grads)
    starts = None if warm_start is None else leaves_by_path(warm_start)
    gamma = jnp.asarray(damping)
    problems = [
        _problem(config, curvature, tag, leaves, starts)
        for tag in curvature.tags
        if any(path in leaves for path in tag.leaves)
    ]
    if not problems:
        raise ValueError(
            "None of the curvature's layers is among the gradients: it belongs to "
            f"another model.\n  curvature: {', '.join(t.name for t in curvature.tags)}"
            f"\n  gradients: {', '.join(map(text, leaves)) or 'no leaves'}"
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
        check_units([p.operator for p in problems], [p.tag for p in problems])
    solutions: dict[Path, Array] = {}
    infos: dict[Path, tuple[CGInfo, Array]] = {}
    if config.takes_spectra:
        pairs = [(p, p.spectra) for p in problems if p.spectra is not None]
        problems = [problem for problem in problems if problem.spectra is None]
        dampings = split_dampings([spectra for _, spectra in pairs], gamma)
        for (problem, spectra), split in zip(pairs, dampings, strict=True):
            if problem.tag.is_elementwise:  # its leaves lie side by side
                [x], is_finite = solve_low_rank(spectra, split, [problem.b])
                solutions |= leaves_from_matrix(problem.tag, x, problem.leaves)
            else:
                blocks = blocks_from_leaves(problem.tag, problem.leaves)
                blocks, is_finite = solve_low_rank(spectra, split, blocks)
                solutions |= leaves_from_blocks(problem.tag, blocks, problem.leaves)
            exact = exact_info(problem.tag.dtype)
            infos |= dict.fromkeys(problem.leaves, (exact, ~is_finite))
    results = solve_layers(
        config,
        [problem.operator for problem in problems],
        gamma,
        [problem.b for problem in problems],
        [problem.x0 for problem in problems],
    )
    for problem, (x, cg_info) in zip(problems, results, strict=True):
        x, failed = _replace_non_finite(x, problem.b, problem.operator, gamma)
        solutions |= leaves_from_matrix(problem.tag, x, problem.leaves)
        norm = jnp.sqrt(jnp.sum(problem.b**2, (-2, -1)))
        relative = safe_divide(cg_info.residual_norm, norm)
        for path in problem.leaves:
            infos[path] = (cg_info._replace(residual_norm=relative), failed)
    updates = map_with_path(lambda path, leaf: solutions.get(path, leaf), grads)
    return updates, _merge_info(info, leaves, infos)


class _Problem(NamedTuple):
    tag: LayerTag
    leaves: dict[Path, Array]
    operator: Any
    b: Array
    x0: Array | None
    spectra: LayerSpectra | None


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
    # The eigenpairs are those of the layer with all of its parameters.
    is_whole = len(present) == len(tag.leaves)
    spectra = curvature.spectra.get(tag.name) if is_whole else None
    b = matrix_from_leaves(tag, present)
    return _Problem(tag, present, operator, b, x0, spectra)


def _replace_non_finite(
    x: Array, b: Array, operator: Any, damping: Array
) -> tuple[Array, Array]:
    mean_curvature = operator.trace() / (b.shape[-2] * b.shape[-1])
    mean_curvature = mean_curvature + damping.astype(b.dtype)
    safe = b / mean_curvature[..., None, None]
    safe = jnp.where(jnp.all(jnp.isfinite(safe)), safe, 0)
    # CG returns its start for a right-hand side that is not finite.
    finite = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(b))
    return jnp.where(finite, x, safe), ~finite


def _merge_info(
    info: SolveInfo, paths: Iterable[Path], infos: dict[Path, tuple[CGInfo, Array]]
) -> SolveInfo:
    columns = []
    for index, path in enumerate(paths):
        steps, residual, failed = (x[index] for x in info)
        if path in infos:
            cg_info, has_failed = infos[path]
            steps = jnp.max(cg_info.num_steps)
            residual = jnp.max(cg_info.residual_norm)
            failed = failed + has_failed
        columns.append((steps, residual, failed))
    stacked = [jnp.stack(x) for x in zip(*columns, strict=True)]
    return SolveInfo(*(x.astype(y.dtype) for x, y in zip(stacked, info, strict=True)))


def _check_shapes(tag: LayerTag, leaves: dict[Path, Array]) -> None:
    expected = dict(zip(tag.leaves, tag.shapes, strict=True))
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"Gradient {text(path)!r} has dtype {leaf.dtype}; expected a real "
                "floating-point array."
            )
        if leaf.shape != expected[path]:
            raise ValueError(
                f"Gradient {text(path)!r} has shape {leaf.shape}, but the curvature "
                f"was initialised for {expected[path]} there: it belongs to another "
                "model. Call estimator.init(params, inputs) again."
            )
