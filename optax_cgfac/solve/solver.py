"""Solves the damped systems of the layers as planned, and reports how that went."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.operators.exact_fisher import FullFisherOperator
from optax_cgfac.operators.kronecker import DampedOperator, FactoredDampedOperator
from optax_cgfac.operators.rows import num_features, num_rows
from optax_cgfac.solve.cg import solve_in_parameter_space
from optax_cgfac.solve.choose import Plan, SolveSpec, make_plan
from optax_cgfac.solve.direct import solve_by_eigendecomposition
from optax_cgfac.solve.eigenpairs import (
    LayerEigenpairs,
    solve_with_eigenpairs,
    split_dampings,
)
from optax_cgfac.solve.factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac.solve.info import UNKNOWN, CGInfo, StopReason, direct_info
from optax_cgfac.solve.sample_space import cg_on_rows, solve_among_samples
from optax_cgfac.utils.arrays import (
    power_of_two,
    safe_divide,
    scaled,
    tree_dot,
    tree_dtype,
)
from optax_cgfac.utils.types import Array


class System(NamedTuple):
    """One layer's system ``(F + γI) x = b``.

    Attributes:
      operator: ``F``, a `KroneckerOperator` or a `BlockFisherOperator`.
      blocks: ``b``, one block of rows below the other. With eigenpairs there may be
        several, so that a kernel and a bias need not be copied into one matrix.
      x0: The warm start, like ``b`` in one block, or None.
      eigenpairs: Those of the factors, or None to solve with all rows.
    """

    operator: Any
    blocks: list[Array]
    x0: Array | None
    eigenpairs: LayerEigenpairs | None


class Solved(NamedTuple):
    """A layer's solution in the blocks of its system; of stacked layers, the worst."""

    blocks: list[Array]
    num_steps: Array  # CG iterations
    residual: Array  # norm of the true one relative to that of b; -1 if unknown
    replaced: Array  # 1 where the solution was not finite and was replaced, else 0
    reason: Array  # a `StopReason` as int32


def damped_operator(
    operator: Any, damping: Array | float, damping_form: str
) -> DampedOperator | FactoredDampedOperator:
    """Returns the operator under either form of damping."""
    if damping_form == "tikhonov":
        return DampedOperator(operator, damping)
    return factored_damping(operator, damping)


def solve_systems(
    spec: SolveSpec, systems: Sequence[System], damping: Array
) -> list[Solved]:
    """Solves the systems of the layers, each as `make_plan` chooses.

    A solution that is not finite is replaced by the right-hand side over the damped
    mean curvature, without what is not finite in it.
    """
    solved: dict[int, Solved] = {}
    pairs = [
        (i, s, s.eigenpairs) for i, s in enumerate(systems) if s.eigenpairs is not None
    ]
    dampings = split_dampings([eigenpairs for _, _, eigenpairs in pairs], damping)
    for (index, system, eigenpairs), split in zip(pairs, dampings, strict=True):
        blocks, finite = solve_with_eigenpairs(eigenpairs, split, system.blocks)
        info = direct_info(blocks[0].dtype, StopReason.EIGENPAIRS)
        solved[index] = _as_solved(blocks, info, system.blocks[0], ~finite)
    others = [(i, s) for i, s in enumerate(systems) if s.eigenpairs is None]
    results = _solve_with_rows(spec, [system for _, system in others], damping)
    for (index, _), result in zip(others, results, strict=True):
        solved[index] = result
    return [solved[index] for index in range(len(systems))]


def _solve_with_rows(
    spec: SolveSpec, systems: Sequence[System], damping: Array
) -> list[Solved]:
    """Solves with all rows, CG for right-hand sides of about one.

    CG compares squares: those of a gradient of 1e-25 are zero in float32, and those of
    one of 1e25 are infinite. Direct solves are linear in the right-hand side.
    """
    bs, x0s = [system.blocks[0] for system in systems], [s.x0 for s in systems]
    units = [jnp.ones((), b.dtype) for b in bs]
    if spec.is_iterative and bs:
        largest = [jnp.max(jnp.abs(b), (-2, -1)) for b in bs]
        if spec.structure == "full":  # one system
            of_all = jnp.max(jnp.stack([jnp.max(x) for x in largest]))
            largest = [of_all.astype(b.dtype) for b in bs]
        units = [power_of_two(x) for x in largest]
        bs = [scaled(b, 1 / unit) for b, unit in zip(bs, units, strict=True)]
        # The solution for zero is zero, wherever the last one was.
        x0s = [
            None if x0 is None else scaled(x0, jnp.where(x == 0, 0, 1 / unit))
            for x0, x, unit in zip(x0s, largest, units, strict=True)
        ]
    operators = [system.operator for system in systems]
    results = solve_layers(spec, operators, damping, bs, x0s)
    solved = []
    for system, b, unit, (x, info) in zip(systems, bs, units, results, strict=True):
        # CG returns its start where the residual is not finite.
        finite = jnp.all(jnp.isfinite(info.residual_norm))
        x, replaced = _replace_non_finite(system, scaled(x, unit), damping, finite)
        solved.append(_as_solved([x], info, b, replaced))
    return solved


def _as_solved(blocks: list[Array], info: CGInfo, b: Array, replaced: Array) -> Solved:
    norm = jnp.sqrt(jnp.sum(b**2, (-2, -1)))
    reason = jnp.where(replaced, StopReason.NOT_FINITE.value, jnp.max(info.reason))
    return Solved(
        blocks,
        jnp.max(info.num_steps),
        jnp.max(_relative_residual(info, norm)),
        replaced.astype(jnp.int32),
        reason.astype(jnp.int32),
    )


def _replace_non_finite(
    system: System, x: Array, damping: Array, finite: Array
) -> tuple[Array, Array]:
    [b] = system.blocks
    mean_curvature = system.operator.trace() / (b.shape[-2] * b.shape[-1])
    mean_curvature = mean_curvature + damping.astype(b.dtype)
    safe = b / mean_curvature[..., None, None]
    safe = jnp.where(jnp.all(jnp.isfinite(safe)), safe, 0)
    finite = finite & jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(b))
    # Without curvature and damping the system is zero, and x is rounding.
    finite &= jnp.all(mean_curvature > 0)
    return jnp.where(finite, x, safe), ~finite


def solve_layers(
    spec: SolveSpec,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    """Solves the damped systems of many layers with all rows.

    Args:
      spec: The options.
      operators: Rows of shapes ``(*stack, R, n_in)`` and ``(*stack, R, n_out)``: a
        `KroneckerOperator` each, or for the other structures a `BlockFisherOperator`.
      damping: The scalar ``γ``.
      bs: The right-hand sides, shapes ``(*stack, n_in, n_out)``.
      x0s: The warm starts, like ``bs``, or None.

    Returns:
      For each layer the solution, like its ``b``, and a `CGInfo` with entries of
      shape ``stack`` (scalars for direct solves).
    """
    plans = [
        make_plan(spec, num_rows(x.a), num_features(x.a), num_features(x.g))
        for x in operators
    ]
    if spec.structure == "full":
        return _solve_jointly(plans[0], spec, operators, damping, bs, x0s)
    if spec.structure == "kronecker" and {p.solver for p in plans} == {"cholesky"}:
        # All layers' small factorisations are one batch.
        damped = [factored_damping(operator, damping) for operator in operators]
        return [(x, direct_info(x.dtype)) for x in solve_directly(damped, bs)]
    return [
        _solve_layer(plan, spec, operator, jnp.asarray(damping, b.dtype), b, x0)
        for plan, operator, b, x0 in zip(plans, operators, bs, x0s, strict=True)
    ]


def _solve_layer(
    plan: Plan, spec: SolveSpec, operator: Any, damping: Array, b: Array, x0: Any
) -> tuple[Array, CGInfo]:
    """One layer's solve, vectorised over stacked layers."""
    if b.ndim > 2:

        def solve_one(operator, b, x0):
            return _solve_layer(plan, spec, operator, damping, b, x0)

        # A scale that all of them share gets the axis that the rows have.
        operator = jax.tree.map(
            lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, b.shape[:1]), operator
        )
        return jax.vmap(solve_one)(operator, b, x0)
    if spec.structure == "block":
        return _solve_samples(plan, spec, operator, damping, b, x0)
    damped = damped_operator(operator, damping, spec.damping_form)
    if plan.solver == "eigendecomposition":
        return solve_by_eigendecomposition(damped, b), direct_info(b.dtype)
    if plan.space == "parameter":
        return solve_in_parameter_space(damped, b, x0, **spec.limits)
    if isinstance(damped, FactoredDampedOperator):
        return solve_by_cg(damped, b, x0, **spec.limits, doubts_start=True)
    return cg_on_rows(operator, damping, b, x0, **spec.limits, doubts_start=True)


def _solve_samples(
    plan: Plan, spec: SolveSpec, operator: Any, damping: Array, b: Any, x0: Any
) -> tuple[Any, CGInfo]:
    """The solve with an exact Fisher, of one layer or of all."""
    if plan.space == "parameter":
        damped = DampedOperator(operator, damping)
        return solve_in_parameter_space(damped, b, x0, **spec.limits)
    direct = plan.solver == "cholesky"
    return solve_among_samples(operator, damping, b, x0, direct=direct, **spec.limits)


def _solve_jointly(
    plan: Plan,
    spec: SolveSpec,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    b = list(bs)
    x0 = None if any(x is None for x in x0s) else list(x0s)
    damping = jnp.asarray(damping, tree_dtype(b))
    full = FullFisherOperator(tuple(operators))
    xs, info = _solve_samples(plan, spec, full, damping, b, x0)
    # Every layer reports the residual of the whole system, relative to its gradient.
    relative = _relative_residual(info, jnp.sqrt(tree_dot(b, b)))
    norms = [jnp.sqrt(jnp.sum(leaf**2, (-2, -1))) for leaf in b]
    return [
        (x, info._replace(residual_norm=jnp.where(relative < 0, UNKNOWN, relative * n)))
        for x, n in zip(xs, norms, strict=True)
    ]


def _relative_residual(info: CGInfo, b_norm: Array) -> Array:
    relative = safe_divide(info.residual_norm, b_norm)
    return jnp.where(info.residual_norm < 0, UNKNOWN, relative)
