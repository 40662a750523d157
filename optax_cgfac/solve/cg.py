"""Conjugate gradients in a `jax.lax.while_loop`, for any operator and inner product.

The residual of the recurrence and the true one drift apart by rounding (Greenbaum 1997,
"Estimating the attainable accuracy of recursively computed residual methods"). So every
solve ends with one more product, which tells the true residual and whether the
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
      TypeError: If ``b`` is not real floating point, a tolerance is no number, or an
        operator none.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cgfac import KroneckerOperator
      >>> op = KroneckerOperator(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones((1, 1)))
      >>> x, info = conjugate_gradient(op, jnp.ones((2, 1)), max_steps=5)
      >>> print(x[:, 0], int(info.num_steps), StopReason(int(info.reason)).name)
      [1.   0.25] 2 CONVERGED

    References:
      Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving
      linear systems"; Chen (2021), Algorithm 2.
    """
    check_positive("max_steps", max_steps, may_be_array=True)
    for name, number, example in (("rtol", rtol, 1e-5), ("atol", atol, 0.0)):
        check_number(name, number, NOT_NEGATIVE, example)
    check_system(operator, b, x0, preconditioner)
    return solve_by_cg_in_parameters(
        operator,
        b,
        x0,
        max_steps=max_steps,
        rtol=rtol,
        atol=atol,
        preconditioner=preconditioner,
    )


def solve_by_cg_in_parameters(
    operator: LinearOperator,
    b: PyTree,
    x0: PyTree | None,
    *,
    max_steps: int | Array,
    rtol: float | Array,
    atol: float | Array = 0.0,
    preconditioner: LinearOperator | None = None,
    doubts_start: bool = False,
) -> tuple[PyTree, CGInfo]:
    """Does what `conjugate_gradient` promises, without its checks.

    Args:
      operator: As there.
      b: As there.
      x0: As there.
      max_steps: As there.
      rtol: As there.
      atol: As there.
      preconditioner: As there.
      doubts_start: Whether to start from zero where the quadratic model of ``x0`` is
        larger than that of zero.

    Returns:
      The solution, like ``b``, and a `CGInfo`.
    """
    if x0 is None:
        x0, residual = jax.tree.map(jnp.zeros_like, b), b
    else:
        residual = jax.tree.map(jnp.subtract, b, operator.matvec(x0))
        if doubts_start:
            x0, residual = no_worse_than_zero(x0, residual, b, tree_dot)
    # In the precision of the dot: half has no range for squares.
    b_squared = tree_dot(b, b)
    tolerance = jnp.maximum(
        jnp.asarray(rtol) ** 2 * b_squared, jnp.asarray(atol) ** 2
    ).astype(b_squared.dtype)
    end = cg_loop(
        operator.matvec,
        residual,
        x0,
        dot=tree_dot,
        squared_tolerance=tolerance,
        max_steps=max_steps,
        precondition=None if preconditioner is None else preconditioner.matvec,
    )
    end = certified(
        end,
        start=x0,
        start_residual=residual,
        residual=jax.tree.map(jnp.subtract, b, operator.matvec(end.x)),
        dot=tree_dot,
        squared_tolerance=tolerance,
    )
    return end.x, end.info()


def no_worse_than_zero(
    x0: PyTree,
    residual: PyTree,
    b: PyTree,
    dot: Callable[[PyTree, PyTree], Array],
) -> tuple[PyTree, PyTree]:
    """Returns the start and its residual, or zero's where the model is lower there.

    The last solution is worse than nothing where gradients or damping have changed by
    much since. The model ``½ x₀ᵀFx₀ - bᵀx₀`` is ``-½ ⟨x₀, b + r₀⟩``, and 0 at zero.

    Args:
      x0: The start, or ``k`` columns of starts.
      residual: ``b - F x₀``.
      b: The right-hand side.
      dot: As in `cg_loop`.

    Returns:
      The start and its residual.
    """
    # A number that is not finite compares false.
    helps = dot(x0, jax.tree.map(jnp.add, b, residual)) >= 0
    return (
        jax.tree.map(lambda x: jnp.where(helps, x, 0), x0),
        jax.tree.map(lambda r, b: jnp.where(helps, r, b), residual, b),
    )


class LoopEnd(NamedTuple):
    """Where the iteration ended, one system or ``k`` columns of them.

    Attributes:
      x: The last iterate.
      squared_norm: Its squared residual norm.
      num_steps: Iterations of the slowest system.
      reason: Why each of them ended, a `StopReason` as int32.
    """

    x: PyTree
    squared_norm: Array
    num_steps: Array
    reason: Array

    def info(self) -> CGInfo:
        """Returns the info of one system."""
        converged = self.reason == StopReason.CONVERGED.value
        norm = jnp.sqrt(self.squared_norm)
        return CGInfo(self.num_steps, norm, converged, self.reason)


class _LoopState(NamedTuple):
    step: Array
    x: PyTree
    residual: PyTree
    direction: PyTree
    rz: Array  # <residual, M⁻¹ residual>
    rr: Array  # <residual, residual>, at least its rounding error
    reason: Array  # UNSOLVED while the iteration goes on


def cg_loop(
    matvec: Callable[[PyTree], PyTree],
    residual: PyTree,
    x: PyTree,
    *,
    dot: Callable[[PyTree, PyTree], Array],
    squared_tolerance: Array,
    max_steps: int | Array,
    precondition: Callable[[PyTree], PyTree] | None = None,
    rounding: Callable[[PyTree, PyTree], Array] | None = None,
) -> LoopEnd:
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
      rounding: The size of the rounding errors of ``dot``, where they matter: a
        curvature or a residual below them says nothing, and no step is taken on it.

    Returns:
      The `LoopEnd`, with the residual of the recurrence.
    """
    precondition = precondition or (lambda vector: vector)
    rounding = rounding or (lambda u, v: jnp.zeros((), squared_tolerance.dtype))

    def judged(residual: PyTree) -> tuple[Array, Array]:
        """Returns the squared norm and what it says."""
        rr, noise = dot(residual, residual), rounding(residual, residual)
        certain = jnp.maximum(rr, noise)
        reason = jnp.where(
            certain <= squared_tolerance,
            StopReason.CONVERGED.value,
            jnp.where(
                rr <= noise, StopReason.STAGNATED.value, StopReason.UNSOLVED.value
            ),
        )
        finite = jnp.isfinite(certain) & jnp.isfinite(squared_tolerance)
        reason = jnp.where(finite, reason, StopReason.NOT_FINITE.value)
        return certain, reason.astype(jnp.int32)

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
        product = matvec(state.direction)
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
        refused = jnp.where(
            (curvature + noise > 0) & (state.rz > 0),
            StopReason.STAGNATED.value,
            StopReason.INDEFINITE.value,
        )
        blown_up = usable | ~jnp.isfinite(curvature) | ~jnp.isfinite(state.rz)
        refused = jnp.where(blown_up, StopReason.NOT_FINITE.value, refused)
        reason = jnp.where(taken, reason, refused).astype(jnp.int32)

        def select(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)

        return _LoopState(
            step=state.step + 1,
            x=select(_axpy(step_size, state.direction, state.x), state.x),
            residual=select(residual, state.residual),
            direction=select(_axpy(momentum, state.direction, z), state.direction),
            rz=jnp.where(taken, rz, state.rz),
            rr=jnp.where(taken, rr, state.rr),
            reason=jnp.where(active, reason, state.reason),
        )

    state = jax.lax.while_loop(keep_going, body, state)
    ran_out = state.reason == StopReason.UNSOLVED.value
    reason = jnp.where(ran_out, StopReason.STEP_LIMIT.value, state.reason)
    return LoopEnd(state.x, state.rr, state.step, reason.astype(jnp.int32))


def certified(
    end: LoopEnd,
    *,
    start: PyTree,
    start_residual: PyTree,
    residual: PyTree,
    dot: Callable[[PyTree, PyTree], Array],
    squared_tolerance: Array,
    rounding: Callable[[PyTree, PyTree], Array] | None = None,
) -> LoopEnd:
    """Judges the end of the iteration by its true residual.

    The fall of the quadratic model from ``x₀`` to ``x`` is
    ``½ ⟨x - x₀, r₀ + r⟩``, without a difference of large numbers. Where it is
    negative, by rounding or an operator that is not symmetric, the start is returned.

    Args:
      end: What `cg_loop` returned.
      start: The first iterate.
      start_residual: Its residual.
      residual: That of ``end.x``, recomputed.
      dot: As in `cg_loop`.
      squared_tolerance: As in `cg_loop`.
      rounding: As in `cg_loop`.

    Returns:
      The `LoopEnd` with the squared norm of the true residual.
    """
    moved = jax.tree.map(jnp.subtract, end.x, start)
    # A number that is not finite compares false.
    falls = dot(moved, jax.tree.map(jnp.add, start_residual, residual)) >= 0

    def select(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(falls, n, o), new, old)

    residual = select(residual, start_residual)
    rr = dot(residual, residual)
    if rounding is not None:
        rr = jnp.maximum(rr, rounding(residual, residual))
    # Where the recurrence alone is within the tolerance, rounding has the last word.
    stagnates = ~falls | (
        (end.reason == StopReason.CONVERGED.value)
        & ~(rr <= AGREEMENT**2 * squared_tolerance)
    )
    worse = jnp.maximum(end.reason, StopReason.STAGNATED.value)
    reason = jnp.where(stagnates, worse, end.reason).astype(jnp.int32)
    return LoopEnd(select(end.x, start), rr, end.num_steps, reason)


def _axpy(scale: Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda u, v: (scale * u + v).astype(v.dtype), x, y)


def check_system(operator: Any, b: PyTree, x0: PyTree, preconditioner: Any) -> None:
    """Checks that an operator maps vectors like ``b`` to vectors like ``b``.

    Args:
      operator: Anything.
      b: The right-hand side.
      x0: The warm start, or None.
      preconditioner: Anything, None for none.

    Raises:
      ValueError: If a structure, a shape or the dtype of ``x0`` differs.
      TypeError: If ``b`` is not real floating point, or an operator none.
    """
    _check_real(b)
    if x0 is not None:
        _check_like_b(x0, b)
    _check_operator("operator", operator, b)
    if preconditioner is not None:
        _check_operator("preconditioner", preconditioner, b)


def _check_real(b: PyTree) -> None:
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise TypeError(
            f"b must hold real floating-point arrays, got {summarize(b)} without any. "
            "Pass the right-hand side, an array or a tree of arrays."
        )
    for leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(
                f"b must hold real floating-point arrays, got {summarize(leaf)}. "
                "Convert with jnp.asarray(b, jnp.float32)."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"b must hold real floating-point arrays, got dtype {leaf.dtype}. "
                "Convert with jnp.asarray(b, jnp.float32)."
            )


def _check_operator(name: str, operator: Any, b: PyTree) -> None:
    if not callable(getattr(operator, "matvec", None)):
        raise TypeError(
            f"{name} must have a matvec(vector), got {summarize(operator)}. Pass an "
            "operator of optax_cgfac, such as curvature.operator('hidden', "
            "damping=0.1), or an object with a method matvec of your own."
        )
    image = jax.eval_shape(operator.matvec, b)
    expected, got = _shapes(b), _shapes(image)
    if expected != got:
        raise ValueError(
            f"{name}.matvec must return vectors like the one that it is given.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Return the product in the structure and shapes of b."
        )


def _check_like_b(x0: PyTree, b: PyTree) -> None:
    def dtypes(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name), tree
        )

    expected, got = dtypes(b), dtypes(x0)
    if expected != got:
        raise ValueError(
            "The warm start x0 must have the structure, shapes and dtypes of b.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Start from jax.tree.map(jnp.zeros_like, b) or omit x0."
        )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, tree)
