"""Conjugate gradients in a `jax.lax.while_loop`, for any operator and inner product.

The residual of the recurrence and the true one drift apart by rounding (Greenbaum 1997,
"Estimating the attainable accuracy of recursively computed residual methods"). So every
solve ends with one more product, which gives the true residual and shows whether the
quadratic model ``½ xᵀFx - bᵀx`` fell on the way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.solve.info import AGREEMENT, CGInfo, StopReason
from optax_cgfac.utils.arrays import tree_dot
from optax_cgfac.utils.types import Array, LinearOperator, PyTree
from optax_cgfac.utils.validate import (
    NOT_NEGATIVE,
    check_number,
    check_positive,
    summarize,
)

MAX_STEPS, RTOL = 10, 1e-2
"""The limits of the optimizers' solves by default."""


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
    curvature), where it returns the last good iterate. The quadratic model
    ``½ xᵀFx - bᵀx`` of the solution is never above that of the start, rounding
    included: the start is returned where it would be.

    Args:
      operator: Provides ``matvec``.
      b: The right-hand side, any pytree of floating-point arrays.
      x0: The warm start, like ``b``; zero if omitted.
      max_steps: The largest number of iterations.
      rtol: Tolerance relative to ``‖b‖``.
      atol: Absolute tolerance.
      preconditioner: An operator whose ``matvec`` applies ``M⁻¹``.

    Returns:
      The solution, like ``b``, and a `CGInfo`, whose residual costs one more product
      than the iterations.

    Raises:
      ValueError: If ``x0`` does not have the structure, shapes and dtypes of
        ``b``, ``max_steps`` is not positive, a tolerance is negative, or an operator
        returns something of another shape.
      TypeError: If ``b`` is not real floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cgfac import DampedOperator, KroneckerOperator
      >>> kronecker = KroneckerOperator(jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
      >>> op, b = DampedOperator(kronecker, 1.0), jnp.array([[1.0], [1.0]])
      >>> x, info = conjugate_gradient(op, b, max_steps=5)
      >>> print(x.T, int(info.num_steps), StopReason(int(info.reason)).name)
      [[0.5 1. ]] 2 CONVERGED

    References:
      Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving
      linear systems"; Chen (2021), Algorithm 2.
    """
    check_positive("max_steps", max_steps, may_be_array=True)
    for name, number, example in (("rtol", rtol, 1e-5), ("atol", atol, 0.0)):
        check_number(name, number, NOT_NEGATIVE, example)
    _check_system(operator, b, x0, preconditioner)
    precondition = None if preconditioner is None else preconditioner.matvec
    space = Space(operator.matvec, tree_dot, precondition)
    return _solve(space, b, x0, tolerances=(rtol, atol), max_steps=max_steps)


def solve_in_parameter_space(
    operator: LinearOperator,
    b: PyTree,
    x0: PyTree | None,
    *,
    max_steps: int | Array,
    rtol: float | Array,
) -> tuple[PyTree, CGInfo]:
    """`conjugate_gradient` of the optimizers: a start worse than zero is not used."""
    space, limits = Space(operator.matvec, tree_dot), {"max_steps": max_steps}
    return _solve(space, b, x0, tolerances=(rtol, 0.0), **limits, doubts_start=True)


def _solve(
    space: "Space",
    b: PyTree,
    x0: PyTree | None,
    *,
    tolerances: tuple[float | Array, float | Array],
    max_steps: int | Array,
    doubts_start: bool = False,
) -> tuple[PyTree, CGInfo]:
    def residual_of(x: PyTree) -> PyTree:
        return jax.tree.map(jnp.subtract, b, space.matvec(x))

    if x0 is None:
        x0, residual = jax.tree.map(jnp.zeros_like, b), b
    else:
        residual = residual_of(x0)
        if doubts_start:
            x0, residual = no_worse_than_zero(x0, residual, b, space.dot)
    # In the precision of the dot: half has no range for squares.
    b_squared = space.dot(b, b)
    relative, absolute = (jnp.asarray(x) ** 2 for x in tolerances)
    end = iterate(
        space,
        x0,
        residual,
        lambda x: (x, residual_of(x)),
        squared_tolerance=jnp.maximum(relative * b_squared, absolute).astype(
            b_squared.dtype
        ),
        max_steps=max_steps,
    )
    return end.x, end.info()


def no_worse_than_zero(
    x0: PyTree,
    residual: PyTree,
    b: PyTree,
    dot: Callable[[PyTree, PyTree], Array],
) -> tuple[PyTree, PyTree]:
    """Returns the start and its residual, or zero's where the model is lower there.

    The last solution is worse than zero where gradients or damping have changed by
    much since. The model ``½ x₀ᵀFx₀ - bᵀx₀`` is ``-½ ⟨x₀, b + r₀⟩``, and 0 at zero.
    """
    # A number that is not finite compares false.
    helps = dot(x0, jax.tree.map(jnp.add, b, residual)) >= 0
    return (
        jax.tree.map(lambda x: jnp.where(helps, x, 0), x0),
        jax.tree.map(lambda r, b: jnp.where(helps, r, b), residual, b),
    )


class Space(NamedTuple):
    """The vectors that the iteration works on, and its operator on them.

    ``dot`` may return an array of shape ``(k,)`` for vectors whose leaves have ``k``
    columns: these are then ``k`` independent systems, each with its own step size and
    its own stop.

    Attributes:
      matvec: The operator ``F``.
      dot: The inner product in which ``F`` is symmetric.
      precondition: The action of ``M⁻¹``; None for none.
      rounding: The size of the rounding errors of ``dot``, where they matter: no step
        is taken on a curvature or a residual below them.
    """

    matvec: Callable[[Any], Any]
    dot: Callable[[Any, Any], Array]
    precondition: Callable[[Any], Any] | None = None
    rounding: Callable[[Any, Any], Array] | None = None


class LoopEnd(NamedTuple):
    """Where the iteration ended, one system or ``k`` columns of them."""

    x: PyTree  # the last iterate
    squared_norm: Array  # of its residual
    num_steps: Array  # of the slowest system
    reason: Array  # why each of them ended, a `StopReason` as int32

    def info(self) -> CGInfo:
        """Returns the info of one system."""
        converged = self.reason == StopReason.CONVERGED.value
        norm = jnp.sqrt(self.squared_norm)
        return CGInfo(self.num_steps, norm, converged, self.reason)


def iterate(
    space: Space,
    x0: PyTree,
    residual: PyTree,
    recompute: Callable[[PyTree], tuple[PyTree, PyTree]],
    *,
    squared_tolerance: Array,
    max_steps: int | Array,
) -> LoopEnd:
    """Runs CG from ``x0`` and judges its end by the true residual.

    ``recompute(x)`` returns ``x`` and its residual ``b - F x``, computed anew.
    """
    tolerance = {"squared_tolerance": squared_tolerance}
    end = cg_loop(space, residual, x0, **tolerance, max_steps=max_steps)
    x, true = recompute(end.x)
    start = x0, residual
    return certified(space, end._replace(x=x), start=start, residual=true, **tolerance)


class _LoopState(NamedTuple):
    step: Array
    x: PyTree
    residual: PyTree
    direction: PyTree
    rz: Array  # <residual, M⁻¹ residual>
    rr: Array  # <residual, residual>, at least its rounding error
    reason: Array  # UNSOLVED while the iteration goes on


def cg_loop(
    space: Space,
    residual: PyTree,
    x: PyTree,
    *,
    squared_tolerance: Array,
    max_steps: int | Array,
) -> LoopEnd:
    """The iteration itself; the `LoopEnd` has the residual of the recurrence."""
    dot = space.dot
    precondition = space.precondition or (lambda vector: vector)
    rounding = space.rounding or (lambda u, v: jnp.zeros((), squared_tolerance.dtype))

    def judged(residual: PyTree) -> tuple[Array, Array]:
        return _judged(
            dot(residual, residual), rounding(residual, residual), squared_tolerance
        )

    z = precondition(residual)
    rr, reason = judged(residual)
    state = _LoopState(
        step=jnp.zeros((), jnp.int32),
        x=x,
        residual=residual,
        direction=z,
        rz=dot(residual, z),
        rr=rr,
        reason=reason,
    )

    def keep_going(state: _LoopState) -> Array:
        active = state.reason == StopReason.UNSOLVED.value
        return jnp.any(active) & (state.step < max_steps)

    def body(state: _LoopState) -> _LoopState:
        active = state.reason == StopReason.UNSOLVED.value
        product = space.matvec(state.direction)
        curvature = dot(state.direction, product)
        noise = rounding(state.direction, product)
        usable = active & (curvature > noise) & (state.rz > 0)
        step_size = jnp.where(usable, state.rz / jnp.where(usable, curvature, 1), 0)
        residual = _axpy(-step_size, product, state.residual)
        z = precondition(residual)
        (rr, reason), rz = judged(residual), dot(residual, z)
        # A step whose residual overflows is not taken.
        taken = usable & jnp.isfinite(rr) & jnp.isfinite(rz)
        momentum = jnp.where(taken, rz / jnp.where(taken, state.rz, 1), 0)
        refused = _refusal(state.rz, curvature, noise, usable)
        reason = jnp.where(taken, reason, refused).astype(jnp.int32)
        return _LoopState(
            step=state.step + 1,
            x=_select(taken, _axpy(step_size, state.direction, state.x), state.x),
            residual=_select(taken, residual, state.residual),
            direction=_select(
                taken, _axpy(momentum, state.direction, z), state.direction
            ),
            rz=jnp.where(taken, rz, state.rz),
            rr=jnp.where(taken, rr, state.rr),
            reason=jnp.where(active, reason, state.reason),
        )

    state = jax.lax.while_loop(keep_going, body, state)
    ran_out = state.reason == StopReason.UNSOLVED.value
    reason = jnp.where(ran_out, StopReason.STEP_LIMIT.value, state.reason)
    return LoopEnd(state.x, state.rr, state.step, reason.astype(jnp.int32))


def _judged(rr: Array, noise: Array, squared_tolerance: Array) -> tuple[Array, Array]:
    """Returns a squared residual norm, at least its rounding error, and a reason."""
    certain = jnp.maximum(rr, noise)
    reason = jnp.where(
        certain <= squared_tolerance,
        StopReason.CONVERGED.value,
        jnp.where(rr <= noise, StopReason.STAGNATED.value, StopReason.UNSOLVED.value),
    )
    finite = jnp.isfinite(certain) & jnp.isfinite(squared_tolerance)
    reason = jnp.where(finite, reason, StopReason.NOT_FINITE.value)
    return certain, reason.astype(jnp.int32)


def _refusal(rz: Array, curvature: Array, noise: Array, usable: Array) -> Array:
    """Returns why a step is not taken."""
    refused = jnp.where(
        (curvature + noise > 0) & (rz > 0),
        StopReason.STAGNATED.value,
        StopReason.INDEFINITE.value,
    )
    blown_up = usable | ~jnp.isfinite(curvature) | ~jnp.isfinite(rz)
    return jnp.where(blown_up, StopReason.NOT_FINITE.value, refused)


def certified(
    space: Space,
    end: LoopEnd,
    *,
    start: tuple[PyTree, PyTree],
    residual: PyTree,
    squared_tolerance: Array,
) -> LoopEnd:
    """Judges the end of the iteration by its true residual.

    The fall of the quadratic model from ``x₀`` to ``x`` is
    ``½ ⟨x - x₀, r₀ + r⟩``, without a difference of large numbers. Where it is
    negative, by rounding or an operator that is not symmetric, the start is returned.
    """
    x0, r0 = start
    moved = jax.tree.map(jnp.subtract, end.x, x0)
    # A number that is not finite compares false.
    falls = space.dot(moved, jax.tree.map(jnp.add, r0, residual)) >= 0
    residual = _select(falls, residual, r0)
    rr = space.dot(residual, residual)
    if space.rounding is not None:
        rr = jnp.maximum(rr, space.rounding(residual, residual))
    # Where the recurrence alone is within the tolerance, rounding has the last word.
    stagnates = ~falls | (
        (end.reason == StopReason.CONVERGED.value)
        & ~(rr <= AGREEMENT**2 * squared_tolerance)
    )
    worse = jnp.maximum(end.reason, StopReason.STAGNATED.value)
    reason = jnp.where(stagnates, worse, end.reason).astype(jnp.int32)
    return LoopEnd(_select(falls, end.x, x0), rr, end.num_steps, reason)


def _select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _axpy(scale: Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda u, v: (scale * u + v).astype(v.dtype), x, y)


def _check_system(operator: Any, b: PyTree, x0: PyTree, preconditioner: Any) -> None:
    """Checks that operators map vectors like ``b`` to vectors like ``b``."""
    leaves = jax.tree.leaves(b)
    for leaf in leaves or [b]:
        is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"b must hold real floating-point arrays, got {summarize(leaf)}. "
                "Convert with jnp.asarray(b, jnp.float32)."
            )
    if x0 is not None and _shapes(x0) != _shapes(b):
        raise ValueError(
            "The warm start x0 must have the structure, shapes and dtypes of b.\n"
            f"  expected: {_shapes(b)}\n  got:      {_shapes(x0)}\n"
            "Start from jax.tree.map(jnp.zeros_like, b) or omit x0."
        )
    _check_operator("operator", operator, b)
    if preconditioner is not None:
        _check_operator("preconditioner", preconditioner, b)


def _check_operator(name: str, operator: Any, b: PyTree) -> None:
    expected, got = (
        jax.tree.map(jnp.shape, x) for x in (b, jax.eval_shape(operator.matvec, b))
    )
    if expected != got:
        raise ValueError(
            f"{name}.matvec must return vectors like the one that it is given.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Return the product in the structure and shapes of b."
        )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x).name), tree)
