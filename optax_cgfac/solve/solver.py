"""Solves the damped systems of the layers, as planned, and says how that went."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.operators.exact_fisher import FullFisherOperator
from optax_cgfac.operators.kronecker import DampedOperator
from optax_cgfac.operators.rows import num_features, num_rows
from optax_cgfac.solve.cg import solve_by_cg_in_parameters
from optax_cgfac.solve.choose import SolveConfig, make_plan
from optax_cgfac.solve.direct import solve_by_eigendecomposition
from optax_cgfac.solve.factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac.solve.info import UNKNOWN, CGInfo, direct_info, with_residual
from optax_cgfac.solve.sample_space import cg_on_rows, solve_among_samples
from optax_cgfac.utils.arrays import safe_divide, tree_dot, tree_dtype
from optax_cgfac.utils.types import Array


def damped_operator(operator: Any, damping: Array | float, damping_form: str) -> Any:
    """Returns the operator under either form of damping."""
    if damping_form == "tikhonov":
        return DampedOperator(operator, damping)
    return factored_damping(operator, damping)


def solve_layers(
    config: SolveConfig,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    """Solves the damped systems of many layers.

    Args:
      config: The options.
      operators: Rows of shapes ``(*stack, R, n_in)`` and ``(*stack, R, n_out)``: a
        `KroneckerOperator` each, or for the other structures a `BlockFisherOperator`.
      damping: The scalar ``γ``.
      bs: The right-hand sides, shapes ``(*stack, n_in, n_out)``.
      x0s: The warm starts, like ``bs``, or None.

    Returns:
      For each layer the solution, like its ``b``, and a `CGInfo` with entries of
      shape ``stack`` (scalars for direct solves that are not certified).
    """
    if config.structure == "full":
        return _solve_jointly(config, operators, damping, bs, x0s)
    if config.method != "cholesky" or config.structure == "block":
        return [
            _solve_layer(config, operator, jnp.asarray(damping, b.dtype), b, x0)
            for operator, b, x0 in zip(operators, bs, x0s, strict=True)
        ]
    damped = [factored_damping(operator, damping) for operator in operators]
    return [
        (x, checked(config, operator, b, x, direct_info(x.dtype)))
        for x, operator, b in zip(solve_directly(damped, bs), damped, bs, strict=True)
    ]


def _solve_layer(
    config: SolveConfig,
    operator: Any,
    damping: Array,
    b: Array,
    x0: Array | None,
) -> tuple[Array, CGInfo]:
    """One layer's solve, stacked layers side by side."""
    if b.ndim > 2:

        def solve_one(operator, b, x0):
            return _solve_layer(config, operator, damping, b, x0)

        # A scale that all of them share gets the axis that the rows have.
        operator = jax.tree.map(
            lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, b.shape[:1]), operator
        )
        return jax.vmap(solve_one)(operator, b, x0)
    if config.structure == "block":
        return _solve_among_samples(config, operator, damping, b, x0)
    n_in, n_out = num_features(operator.a), num_features(operator.g)
    plan = make_plan(config, num_rows(operator.a), n_in, n_out)
    damped = damped_operator(operator, damping, config.damping_form)
    limits = _limits(config)
    if plan.space == "parameter":
        return solve_by_cg_in_parameters(damped, b, x0, **limits)
    if plan.solver == "eigendecomposition":
        x, info = solve_by_eigendecomposition(damped, b), direct_info(b.dtype)
    elif config.damping_form == "tikhonov":
        x, info = cg_on_rows(operator, damping, b, x0, **limits)
    else:
        x, info = solve_by_cg(damped, b, x0, **limits)
    return x, checked(config, damped, b, x, info)


def _limits(config: SolveConfig) -> dict[str, Any]:
    """What every solve by CG is told. Its start is the last step's solution."""
    limits = {"max_steps": config.max_steps, "rtol": config.rtol}
    return limits | {"doubts_start": True}


def _solve_among_samples(
    config: SolveConfig, operator: Any, damping: Array, b: Any, x0: Any
) -> tuple[Any, CGInfo]:
    """The solve with an exact Fisher, of one layer or of all."""
    limits = _limits(config)
    direct = config.solver == "cholesky"
    damped = DampedOperator(operator, damping)
    if config.space == "parameter" and not direct:
        return solve_by_cg_in_parameters(damped, b, x0, **limits)
    x, info = solve_among_samples(operator, damping, b, x0, direct=direct, **limits)
    return x, checked(config, damped, b, x, info)


def _solve_jointly(
    config: SolveConfig,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    b = list(bs)
    x0 = None if any(x is None for x in x0s) else list(x0s)
    damping = jnp.asarray(damping, tree_dtype(b))
    full = FullFisherOperator(tuple(operators))
    xs, info = _solve_among_samples(config, full, damping, b, x0)
    # Every layer reports the residual of the whole system, relative to its gradient.
    relative = relative_residual(info, jnp.sqrt(tree_dot(b, b)))
    norms = [jnp.sqrt(jnp.sum(leaf**2, (-2, -1))) for leaf in b]
    return [
        (x, info._replace(residual_norm=jnp.where(relative < 0, UNKNOWN, relative * n)))
        for x, n in zip(xs, norms, strict=True)
    ]


def relative_residual(info: CGInfo, b_norm: Array) -> Array:
    """Returns the residual relative to the right-hand side, -1 where it is unknown."""
    relative = safe_divide(info.residual_norm, b_norm)
    return jnp.where(info.residual_norm < 0, UNKNOWN, relative)


def checked(config: SolveConfig, damped: Any, b: Any, x: Any, info: CGInfo) -> CGInfo:
    """Computes the residual of ``damped x = b`` with one product, if asked for.

    Args:
      config: The options.
      damped: The damped operator.
      b: The right-hand side, a matrix (or stacked ones), or one for each layer.
      x: The solution, like ``b``.
      info: How the solve went.

    Returns:
      The `CGInfo` with the residual's norm, of shape ``stack``.
    """
    if not config.certify:
        return info

    def norm(v: Any) -> Array:
        squares = tree_dot(v, v) if isinstance(v, list) else jnp.sum(v**2, (-2, -1))
        return jnp.sqrt(squares)

    residual = jax.tree.map(jnp.subtract, b, damped.matvec(x))
    return with_residual(info, norm(residual), config.rtol * norm(b))
