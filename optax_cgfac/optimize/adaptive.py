"""How far to go along the preconditioned direction, and the next damping."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.nnx.module import MERGE_STATE, explaining_states
from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.damping import (
    FIRST,
    LOWEST_FRACTION,
    damping_interval,
    initial_fraction,
    kl_clip_scale,
    levenberg_marquardt,
    model_interval,
    reduction_ratio,
    typical_damping,
)
from optax_cgfac.optimize.quadratic_model import (
    QuadraticModel,
    Step,
    minimize_in_box,
    quadratic_model,
    within_loss,
    within_promise,
)
from optax_cgfac.optimize.scale_by import ScalarOrSchedule, check_moved_value, current
from optax_cgfac.solve.info import SolveInfo
from optax_cgfac.utils.arrays import narrowed, tree_dot, tree_is_finite
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import is_number

# Damping is adapted within these multiples of the initial one.
_BOUNDS = (LOWEST_FRACTION, 1e5)


# How many times what the last fitted step promised, in parts of the loss, a step that
# keeps its size may promise. With few outputs single examples that are misfit make
# gradients large, and there is nothing to gain below 4 (benchmarks/LOG.md, 26).
_MANY_TIMES, _MANY_TIMES_OF_FEW_OUTPUTS = 2.0, 4.0


# With a curvature so many times that of the first update the damping begins anew: far
# above what a batch of outliers has for once.
_OUTGROWN = 1e8


# Until there are data to tell the damping.
_DAMPING_WITHOUT_DATA = 0.1


class CGFACState(NamedTuple):
    """State of `cgfac`.

    Attributes:
      cgfac_count: Updates so far, int32.
      damping: The damping ``λ`` of the next update; 0 until the data tell it.
      initial_damping: The first one, by which its bounds go; 0 until the data tell it.
        Models of fewer than a thousand parameters start with less than this.
      step_size: The last step size ``α``.
      momentum: The last momentum ``μ``.
      reduction_ratio: The last reduction ratio ``ρ``.
      promise: ``-α ∇hᵀΔ`` of the last step that was fitted to the quadratic model, in
        parts of the loss if that is never negative.
      num_rejected: Updates so far that were not finite, had a model that was not, or
        raised the loss of their batch, and became zero; int32.
      velocity: The previous update, like the parameters.
      warm_start: The previous solution, like the parameters; None if unused.
      info: How the last solves went.
      fallback: State of the fallback transformation; empty without one.
    """

    cgfac_count: Array
    damping: Array
    initial_damping: Array
    step_size: Array
    momentum: Array
    reduction_ratio: Array
    promise: Array
    num_rejected: Array
    velocity: PyTree
    warm_start: PyTree | None
    info: SolveInfo
    fallback: Any


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The options of `cgfac` that concern the step; see there."""

    momentum: float | None
    l2: float
    kl_clip: float | None
    damping_decay: float
    damping_interval: int | None
    model_interval: int | None
    min_damping: float | None
    max_damping: float | None


class LossAt(NamedTuple):
    """The user's loss.

    Attributes:
      value: Its value at the current parameters.
      value_fn: The loss of the same batch as a function of the parameters.
    """

    value: Array
    value_fn: Callable[[PyTree], Array]


def with_initial_damping(state: CGFACState, curvature: Curvature) -> CGFACState:
    """Returns the state with a damping from the data, where it has none yet."""
    typical = typical_damping(curvature).astype(state.damping.dtype)
    # The first curvature may be next to nothing, as that of a saturated softmax is.
    is_new = state.initial_damping == 0
    is_new |= typical > _OUTGROWN * state.initial_damping
    first = initial_fraction(curvature) * typical
    start = jnp.where(first > 0, first, _DAMPING_WITHOUT_DATA)
    return state._replace(
        damping=jnp.where(is_new, start, state.damping),
        initial_damping=jnp.where(is_new, typical, state.initial_damping),
    )


def has_l2(options: StepOptions) -> bool:
    """Whether the regularizer may be non-zero."""
    return not (is_number(options.l2) and options.l2 == 0)


def adaptive_step(
    options: StepOptions,
    state: CGFACState,
    curvature: Curvature,
    params: PyTree,
    grads: PyTree,
    direction: PyTree,
    loss_at: LossAt,
) -> tuple[Step, Array, Array, CGFACState]:
    """Step size and momentum from the quadratic model, damping by its success.

    Args:
      options: The options.
      state: The state before the step.
      curvature: Holds the model and the examples of the quadratic model.
      params: The parameters ``θ``.
      grads: ``∇h``, with the ``l2`` term.
      direction: ``Δ``, like ``params``.
      loss_at: The loss, to measure the reduction ratio.

    Returns:
      ``α`` and ``μ``, whether gradients and directions are finite, whether the loss is
      not and was so before the last step, and the state with the new scalars.
    """
    directions = (direction, state.velocity)
    descent = tree_dot(grads, direction)
    dtype = descent.dtype
    fixed = options.momentum
    box = {} if fixed is None else {"min_momentum": fixed, "max_momentum": fixed}
    spec = curvature.spec
    is_nonnegative = spec.objective is not None and spec.objective.is_nonnegative
    value = _regularized(loss_at.value, params, options)
    unit = jnp.ones((), dtype)
    if is_nonnegative:
        usable = (value > 0) & jnp.isfinite(value)
        unit = jnp.where(usable, value, 1).astype(dtype)

    def fit() -> tuple[Array, Array, Array]:
        slope = jnp.stack([descent, tree_dot(grads, state.velocity).astype(dtype)])
        model = quadratic_model(
            curvature, params, slope, directions, damping=state.damping, l2=options.l2
        )
        best = jnp.stack(minimize_in_box(model, **box))
        return best.astype(dtype), slope, model.undamped.astype(dtype)

    def keep() -> tuple[Array, Array, Array]:
        times = _MANY_TIMES_OF_FEW_OUTPUTS if spec.few_outputs else _MANY_TIMES
        step_size = within_promise(
            state.step_size.astype(dtype), descent, times * state.promise * unit
        )
        last = jnp.stack([step_size, state.momentum.astype(dtype)])
        # What the old velocity promises is a pass over the parameters to know.
        slope = jnp.stack([descent, jnp.zeros_like(descent)])
        return last, slope, jnp.zeros((2, 2), dtype)

    count = state.cgfac_count + 1
    every = damping_interval(options.damping_interval, curvature)
    is_early = count <= FIRST if options.damping_interval is None else False
    # A loss that is not finite: was it the last step, or is it the batch?
    blown_up = ~jnp.isfinite(loss_at.value)
    due = is_early | (count % every == 0) | blown_up
    interval = model_interval(options.model_interval, curvature)
    fits: Any = True
    if isinstance(interval, int) and interval == 1:
        coefficients, slope, undamped = fit()
    else:
        # No step was taken: nothing is to be kept.
        fits = due | (count <= FIRST) | (count % interval == 0)
        fits |= state.step_size == 0
        coefficients, slope, undamped = jax.lax.cond(fits, fit, keep)
    promise = (-descent * coefficients[0] / unit).astype(state.promise.dtype)
    fitted = fits & jnp.isfinite(promise)
    model = QuadraticModel(undamped, undamped, slope)
    step = Step(coefficients[0], coefficients[1])
    if is_nonnegative:
        step = within_loss(model, step, value)
    coefficients = jnp.stack(step)
    # The undamped model: the damping is there to restrict the step, not to
    # predict its effect.
    predicted = model.value(coefficients, damped=False)

    def move(p: Array, d: Array, v: Array) -> Array:
        return p + jnp.where(blown_up, -v, combine(step, d, v))

    def loss_change() -> Array:
        moved = jax.tree.map(move, params, direction, state.velocity)
        with explaining_states("value_fn", moved, MERGE_STATE):
            moved_value = loss_at.value_fn(moved)
        check_moved_value(moved_value)
        change = _regularized(moved_value, moved, options)
        change -= jnp.where(blown_up, 0, value)
        return jnp.asarray(change, predicted.dtype)

    def adapt() -> tuple[Array, Array, Array, Array]:
        change = loss_change()
        ratio = reduction_ratio(change, predicted)
        low, high = _damping_bounds(options, state)
        damping = levenberg_marquardt(
            state.damping,
            ratio,
            decay=options.damping_decay ** jnp.where(is_early, 1, every),
            minimum=low,
            maximum=high,
        )
        ratio = ratio.astype(state.reduction_ratio.dtype)
        # A step after which the same batch has a larger loss, or one that is not
        # finite, is not taken (Nocedal & Wright 2006, algorithm 4.1); damp more.
        return damping, ratio, ratio > 0, jnp.isfinite(change)

    yes = jnp.array(True)
    damping, ratio, taken, was_finite = jax.lax.cond(
        due, adapt, lambda: (state.damping, state.reduction_ratio, yes, yes)
    )
    taken &= jnp.all(jnp.isfinite(undamped))  # or the step is zero already
    state = state._replace(
        damping=damping,
        step_size=step.step_size.astype(jnp.float32),
        momentum=step.momentum.astype(jnp.float32),
        reduction_ratio=ratio,
        promise=jnp.where(fitted, promise, state.promise),
        num_rejected=state.num_rejected + (~taken).astype(jnp.int32),
    )
    # Not finite where a gradient or a direction is not: no further pass over them.
    finite = jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(coefficients))
    step = Step(*(jnp.where(taken, x, 0) for x in step))
    return step, finite, blown_up & was_finite, state


def _damping_bounds(
    options: StepOptions, state: CGFACState
) -> tuple[Array | float, Array | float]:
    """Returns the ends between which the damping is adapted."""
    low, high = (factor * state.initial_damping for factor in _BOUNDS)
    high = jnp.where(state.initial_damping > 0, high, jnp.inf)
    high = high if options.max_damping is None else options.max_damping
    return (
        low if options.min_damping is None else options.min_damping,
        jnp.minimum(high, jnp.finfo(state.damping.dtype).max),
    )


def combine(step: Step, direction: Array, velocity: Array) -> Array:
    """Returns ``α Δ + μ δ₀`` in the dtype of ``δ₀``."""
    delta = step.step_size * direction + step.momentum * velocity
    return narrowed(delta, velocity.dtype)


def settle(
    options: StepOptions,
    old: CGFACState,
    state: CGFACState,
    params: PyTree,
    direction: PyTree,
    step: Step,
    finite: Array,
    undone: Array,
    value: Array | None,
    curvature: Curvature,
) -> tuple[PyTree, CGFACState, Array]:
    """Takes the step, or where a number is not finite a safe one in its place.

    With a bad gradient in one layer the others' is no descent direction, and momentum
    would carry half a step on: the whole step becomes zero. Where the loss itself is
    not finite, and was before the previous step, that one was bad: it is taken back. A
    parameter that would leave the range of its precision stays where it is.

    Args:
      options: The options.
      old: The state before the step.
      state: The state with the step's scalars.
      params: The parameters.
      direction: ``Δ``, like the parameters.
      step: ``α`` and ``μ``.
      finite: Whether gradients and direction are finite.
      undone: Whether the previous step is to be taken back.
      value: The loss, if the user gave it.
      curvature: The curvature.

    Returns:
      The update, the state with the velocity, and whether all numbers were finite.
    """
    blown_up = jnp.array(False) if value is None else ~jnp.all(jnp.isfinite(value))
    finite = finite & ~blown_up

    def choose(p: Array, d: Array, v: Array) -> Array:
        delta = combine(step, d, v)
        delta = jnp.where(finite & jnp.isfinite(p + delta), delta, 0).astype(v.dtype)
        return jnp.where(undone, -v, delta)

    def carry(u: Array, v: Array) -> Array:
        # A batch whose loss is never finite says nothing of the steps before it.
        rest = jnp.where(blown_up & ~undone, v, 0)
        return jnp.where(finite, u, rest).astype(u.dtype)

    update = jax.tree.map(choose, params, direction, old.velocity)
    velocity = jax.tree.map(carry, update, old.velocity)
    # In the damping's precision: a long interval overflows to infinity in silence.
    decay = jnp.asarray(options.damping_decay, old.damping.dtype)
    more = old.damping * decay ** -damping_interval(options.damping_interval, curvature)
    _, high = _damping_bounds(options, old)
    state = state._replace(
        damping=jnp.where(
            finite,
            state.damping,
            jnp.where(undone, jnp.minimum(more, high), old.damping).astype(
                old.damping.dtype
            ),
        ),
        reduction_ratio=jnp.where(finite, state.reduction_ratio, old.reduction_ratio),
        # A step that was not taken before is not counted once more.
        num_rejected=jnp.maximum(
            state.num_rejected, old.num_rejected + (~finite).astype(jnp.int32)
        ),
        velocity=velocity,
    )
    return update, state, finite


def _regularized(value: Array, params: PyTree, options: StepOptions) -> Array:
    """Returns the loss with the ``l2`` term."""
    if not has_l2(options):
        return jnp.asarray(value)
    return value + options.l2 / 2 * tree_dot(params, params)


def scheduled_step(
    options: StepOptions,
    state: CGFACState,
    grads: PyTree,
    direction: PyTree,
    learning_rate: ScalarOrSchedule,
    damping: Array,
) -> tuple[Step, Array, CGFACState]:
    """A given learning rate, with KL clip and heavy-ball momentum.

    Args:
      options: The options.
      state: The state before the step.
      grads: ``∇h``, with the ``l2`` term.
      direction: ``Δ = -x``, like ``grads``.
      learning_rate: ``η`` or its schedule.
      damping: The damping of ``x``, to be recorded.

    Returns:
      ``η ν`` and ``μ``, whether gradients and direction are finite, and the state with
      the new scalars.
    """
    rate = current("learning_rate", learning_rate, state.cgfac_count)
    rate = jnp.asarray(rate, jnp.float32)
    if options.kl_clip is not None:
        product = -tree_dot(grads, direction)
        rate = rate * kl_clip_scale(product, rate, options.kl_clip)
    momentum = jnp.asarray(
        0.0 if options.momentum is None else options.momentum, jnp.float32
    )
    finite = tree_is_finite(grads) & tree_is_finite(direction) & jnp.isfinite(rate)
    return (
        Step(rate, momentum),
        finite,
        state._replace(
            damping=damping,
            step_size=rate.astype(jnp.float32),
            momentum=momentum,
        ),
    )
