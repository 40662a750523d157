"""Conjugate gradients in a `jax.lax.while_loop`, for any operator and inner product."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._checks import check_positive, is_number
from optax_cgfac._numerics import tree_dot, tree_dtype
from optax_cgfac._types import Array, LinearOperator, PyTree


class CGInfo(NamedTuple):
    """How a solve ended.

    Attributes:
      num_steps: Iterations done, int32.
      residual_norm: Euclidean norm of the residual ``b - F x`` as carried by the
        recurrence.
      converged: Whether ``residual_norm`` fell to the tolerance.
    """

    num_steps: Array
    residual_norm: Array
    converged: Array


def conjugate_gradient(
    operator: LinearOperator,
    b: PyTree,
    x0: PyTree | None = None,
    *,
    max_steps: int | Array,
    rtol: float | Array = 1e-5,
    atol: float | Array = 0.0,
    preconditioner: LinearOperator | None = None,
) -> tuple[PyTree, CGInfo]:
    """Solves ``F x = b`` for a symmetric positive definite operator ``F``.

    Stops when ``‖b - F x‖ ≤ max(rtol ‖b‖, atol)``, after ``max_steps``
    iterations, or at a breakdown (a direction of non-positive or non-finite
    curvature), where it returns the last good iterate.

    Args:
      operator: Provides ``matvec``.
      b: The right-hand side, any pytree of floating-point arrays.
      x0: The warm start, like ``b``; zero if omitted.
      max_steps: The largest number of iterations.
      rtol: Tolerance relative to ``‖b‖``.
      atol: Absolute tolerance.
      preconditioner: An operator whose ``matvec`` applies ``M⁻¹``.

    Returns:
      The solution, like ``b``, and a `CGInfo`.

    Raises:
      ValueError: If ``x0`` does not have the structure, shapes and dtypes of
        ``b``, ``max_steps`` is not positive, or a tolerance is negative.
      TypeError: If ``b`` is not real floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cgfac import DiagonalOperator
      >>> op = DiagonalOperator(jnp.array([1.0, 2.0]))
      >>> x, info = conjugate_gradient(op, jnp.array([1.0, 1.0]), max_steps=5)
      >>> print(x, int(info.num_steps), bool(info.converged))
      [1.  0.5] 2 True

    References:
      Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving
      linear systems"; Chen (2021), Algorithm 2.
    """
    if not jnp.issubdtype(tree_dtype(b), jnp.floating):
        raise TypeError(
            "b must hold real floating-point arrays, got dtype "
            f"{tree_dtype(b).name}. Convert with jnp.asarray(b, jnp.float32)."
        )
    check_positive("max_steps", max_steps, may_be_array=True)
    for name, number in (("rtol", rtol), ("atol", atol)):
        if is_number(number) and not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}.")
    if x0 is None:
        x0, residual = jax.tree.map(jnp.zeros_like, b), b
    else:
        _check_like_b(x0, b)
        residual = jax.tree.map(jnp.subtract, b, operator.matvec(x0))
    tolerance = jnp.maximum(
        jnp.asarray(rtol) ** 2 * tree_dot(b, b), jnp.asarray(atol) ** 2
    ).astype(tree_dtype(b))
    x, squared_norm, num_steps = cg_loop(
        operator.matvec,
        residual,
        x0,
        dot=tree_dot,
        squared_tolerance=tolerance,
        max_steps=max_steps,
        precondition=None if preconditioner is None else preconditioner.matvec,
    )
    converged = (squared_norm <= tolerance) & jnp.isfinite(tolerance)
    return x, CGInfo(num_steps, jnp.sqrt(squared_norm), converged)


class _LoopState(NamedTuple):
    step: Array
    x: PyTree
    residual: PyTree
    direction: PyTree
    rz: Array  # <residual, M⁻¹ residual>
    rr: Array  # <residual, residual>
    active: Array


def cg_loop(
    matvec: Callable[[PyTree], PyTree],
    residual: PyTree,
    x: PyTree,
    *,
    dot: Callable[[PyTree, PyTree], Array],
    squared_tolerance: Array,
    max_steps: int | Array,
    precondition: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, Array, Array]:
    """The iteration itself, in the inner product ``dot``.

    ``dot`` may return an array of shape ``(k,)`` for vectors whose leaves have
    ``k`` columns: these are then ``k`` independent systems, each with its own
    step size and its own stop.

    Args:
      matvec: The operator.
      residual: ``b - F x``.
      x: The first iterate.
      dot: The inner product in which ``F`` is symmetric.
      squared_tolerance: The squared residual norm at which a system is done.
      max_steps: The largest number of iterations.
      precondition: The action of ``M⁻¹``.

    Returns:
      The last iterate, its squared residual norm, and the number of iterations
      of the slowest system.
    """
    precondition = precondition or (lambda vector: vector)
    z = precondition(residual)
    rr = dot(residual, residual)
    state = _LoopState(
        step=jnp.zeros((), jnp.int32),
        x=x,
        residual=residual,
        direction=z,
        rz=dot(residual, z),
        rr=rr,
        # A non-finite residual compares false: such a system is never entered.
        active=(rr > squared_tolerance) & jnp.isfinite(rr),
    )

    def keep_going(state: _LoopState) -> Array:
        return jnp.any(state.active) & (state.step < max_steps)

    def body(state: _LoopState) -> _LoopState:
        product = matvec(state.direction)
        curvature = dot(state.direction, product)
        usable = state.active & (curvature > 0) & (state.rz > 0)
        step_size = jnp.where(usable, state.rz / jnp.where(usable, curvature, 1), 0)
        residual = _axpy(-step_size, product, state.residual)
        z = precondition(residual)
        rr, rz = dot(residual, residual), dot(residual, z)
        # A step whose residual overflows is not taken.
        usable = usable & jnp.isfinite(rr) & jnp.isfinite(rz)
        momentum = jnp.where(usable, rz / jnp.where(usable, state.rz, 1), 0)

        def select(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, old)

        return _LoopState(
            step=state.step + 1,
            x=select(_axpy(step_size, state.direction, state.x), state.x),
            residual=select(residual, state.residual),
            direction=select(_axpy(momentum, state.direction, z), state.direction),
            rz=jnp.where(usable, rz, state.rz),
            rr=jnp.where(usable, rr, state.rr),
            active=usable & (rr > squared_tolerance),
        )

    state = jax.lax.while_loop(keep_going, body, state)
    return state.x, state.rr, state.step


def _axpy(scale: Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda u, v: (scale * u + v).astype(v.dtype), x, y)


def _check_like_b(x0: PyTree, b: PyTree) -> None:
    def describe(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name), tree
        )

    expected, got = describe(b), describe(x0)
    if expected != got:
        raise ValueError(
            "The warm start x0 must have the structure, shapes and dtypes of b.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Start from jax.tree.map(jnp.zeros_like, b) or omit x0."
        )
