"""One step of `cgfac`: its size, adaptive or scheduled, and the verdict on it.

The adaptive step takes step size and momentum from the quadratic model and adapts the
damping by the model's success; the scheduled step takes a given learning rate. Both end
in `settle`, which takes the step, leaves it out, or takes the previous one back.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.damping import (
    FIRST,
    Adaptation,
    initial_fraction,
    kl_clip_scale,
    reduction_ratio,
    typical_damping,
)
from optax_cgfac.optimize.quadratic_model import (
    Step,
    minimize_in_box,
    model_value,
    quadratic_model,
    within_loss,
    within_promise,
)
from optax_cgfac.solve.info import SolveInfo
from optax_cgfac.utils.arrays import narrowed, tree_dot, tree_is_finite
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    check_number,
    is_number,
    is_real_scalar,
    summarize,
)

# A step that keeps its size may promise at most this many times what the last fitted
# step promised, relative to the loss. With few outputs a single misfit example makes
# gradients large, and factors below 4 gain nothing.
_MANY_TIMES, _MANY_TIMES_OF_FEW_OUTPUTS = 2.0, 4.0
# The damping starts anew when the curvature has grown by this factor since the first
# update: far more than one batch of outliers causes.
_OUTGROWN = 1e8
_DAMPING_WITHOUT_DATA = 0.1


class CGFACState(NamedTuple):
    """State of `cgfac`.

    Attributes:
      cgfac_count: Updates so far, int32.
      damping: The damping ``λ`` of the next update; 0 until it is set from the data.
      initial_damping: The first damping, from which its bounds follow; 0 until it is
        set from the data. Models of fewer than a thousand parameters start lower.
      step_size: The last step size ``α``.
      momentum: The last momentum ``μ``.
      reduction_ratio: The last reduction ratio ``ρ``.
      promise: ``-α ∇hᵀΔ`` of the last step that was fitted to the quadratic model,
        relative to the loss if that is never negative.
      num_rejected: Updates so far that became zero: not finite, with a model that was
        not finite, or raising the loss of their batch; int32.
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
    """The options of `cgfac` that concern every step; see there."""

    momentum: Any
    l2: Any
    kl_clip: Any

    def __post_init__(self):
        """Validates the numbers."""
        check_number("l2", self.l2, NOT_NEGATIVE, 1e-4)
        if self.momentum is not None:
            check_number("momentum", self.momentum, BELOW_ONE, 0.9)
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, POSITIVE, 1e-2)

    @property
    def has_l2(self) -> bool:
        """Whether the regularizer may be non-zero."""
        return not (is_number(self.l2) and self.l2 == 0)


class Start(NamedTuple):
    """Where a step starts.

    Attributes:
      params: The parameters ``θ``.
      grads: ``∇h``, with the ``l2`` term.
      direction: ``Δ``, like the parameters.
      value: The loss of the batch, without the ``l2`` term; None if not given.
      value_fn: The loss of the same batch as a function of the parameters, or None.
      others_finite: Whether the gradients left to the fallback are finite.
    """

    params: PyTree
    grads: PyTree
    direction: PyTree
    value: Any
    value_fn: Any
    others_finite: Array | bool


class Verdict(NamedTuple):
    """What is wrong with a step, if anything.

    Attributes:
      finite: Whether gradients, direction, step size and loss are finite.
      blown_up: Whether the loss is not finite.
      undone: Whether the previous step is to be taken back: the loss is not finite now
        and was finite before that step.
    """

    finite: Array
    blown_up: Array
    undone: Array


def with_initial_damping(state: CGFACState, curvature: Curvature) -> CGFACState:
    """Sets the damping from the data, where it is not set yet."""
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


def adaptive_step(
    options: StepOptions,
    adaptation: Adaptation,
    state: CGFACState,
    curvature: Curvature,
    start: Start,
) -> tuple[Step, Verdict, CGFACState]:
    """Step size and momentum from the quadratic model, damping by its success.

    Args:
      options: The options.
      adaptation: The options of the damping.
      state: The state before the step.
      curvature: Holds the model and the examples of the quadratic model.
      start: Where the step starts.

    Returns:
      The step, the verdict, and the state with the new scalars.
    """
    descent = tree_dot(start.grads, start.direction)
    value = _regularized(start.value, start.params, options)
    objective = curvature.spec.objective
    is_nonnegative = objective is not None and objective.is_nonnegative
    # The loss by which promises are measured, where it is never negative.
    unit = jnp.ones((), descent.dtype)
    if is_nonnegative:
        usable = (value > 0) & jnp.isfinite(value)
        unit = jnp.where(usable, value, 1).astype(descent.dtype)
    # Of a loss that is not finite: is the last step at fault, or the batch?
    blown_up = ~jnp.isfinite(start.value)
    count = state.cgfac_count + 1
    early, every = adaptation.is_early(count), adaptation.interval(curvature)
    due = early | (count % every == 0) | blown_up
    fits = _fits(adaptation, state, curvature, due)
    coefficients, slope, undamped = _coefficients(
        options, state, curvature, start, (descent, unit), fits
    )
    promise = (-descent * coefficients[0] / unit).astype(state.promise.dtype)
    step = Step(coefficients[0], coefficients[1])
    if is_nonnegative:
        step = within_loss(slope, step, value)
    coefficients = jnp.stack(step)
    # The undamped model: the damping is there to restrict the step, not to
    # predict its effect.
    predicted = model_value(slope, undamped, coefficients)

    def look() -> tuple[Array, Array, Array, Array]:
        change = _loss_change(options, state, start, step, (value, blown_up))
        change = jnp.asarray(change, predicted.dtype)
        ratio = reduction_ratio(change, predicted)
        damping = adaptation.adapted(
            state.damping, state.initial_damping, ratio, jnp.where(early, 1, every)
        )
        ratio = ratio.astype(state.reduction_ratio.dtype)
        # A step after which the same batch has a larger loss, or one that is not
        # finite, is not taken (Nocedal & Wright 2006, algorithm 4.1).
        return damping, ratio, ratio > 0, jnp.isfinite(change)

    yes = jnp.array(True)
    damping, ratio, taken, was_finite = jax.lax.cond(
        due, look, lambda: (state.damping, state.reduction_ratio, yes, yes)
    )
    taken &= jnp.all(jnp.isfinite(undamped))  # or the step is zero already
    # Not finite where a gradient or a direction is not: no further pass over them.
    finite = jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(coefficients))
    finite = finite & start.others_finite & ~blown_up
    undone = blown_up & was_finite
    raised = adaptation.raised(state.damping, state.initial_damping, curvature)
    raised = jnp.where(undone, raised, state.damping).astype(state.damping.dtype)
    state = state._replace(
        damping=jnp.where(finite, damping, raised),
        step_size=step.step_size.astype(jnp.float32),
        momentum=step.momentum.astype(jnp.float32),
        reduction_ratio=ratio,
        promise=jnp.where(fits & jnp.isfinite(promise), promise, state.promise),
        num_rejected=state.num_rejected + (~taken).astype(jnp.int32),
    )
    step = Step(*(jnp.where(taken, x, 0) for x in step))
    return step, Verdict(finite, blown_up, undone), state


def _fits(
    adaptation: Adaptation, state: CGFACState, curvature: Curvature, due: Array
) -> Any:
    """Returns whether the quadratic model is fitted in this update."""
    interval = adaptation.fit_interval(curvature)
    if isinstance(interval, int) and interval == 1:
        return True
    count = state.cgfac_count + 1
    fits = due | (count <= FIRST) | (count % interval == 0)
    # After a step that was not taken there is no step size to keep.
    return fits | (state.step_size == 0)


def _coefficients(
    options: StepOptions,
    state: CGFACState,
    curvature: Curvature,
    start: Start,
    descent_and_unit: tuple[Array, Array],
    fits: Any,
) -> tuple[Array, Array, Array]:
    """Returns ``(α, μ)``, fitted or kept, the slopes, and the undamped matrix."""
    descent, unit = descent_and_unit
    dtype = descent.dtype

    def fit() -> tuple[Array, Array, Array]:
        fixed = options.momentum
        box = {} if fixed is None else {"min_momentum": fixed, "max_momentum": fixed}
        along = tree_dot(start.grads, state.velocity).astype(dtype)
        slope = jnp.stack([descent, along])
        model = quadratic_model(
            curvature,
            start.params,
            slope,
            (start.direction, state.velocity),
            damping=state.damping,
            l2=options.l2,
        )
        best = jnp.stack(minimize_in_box(model, **box))
        return best.astype(dtype), slope, model.undamped.astype(dtype)

    def keep() -> tuple[Array, Array, Array]:
        few = curvature.spec.few_outputs
        times = _MANY_TIMES_OF_FEW_OUTPUTS if few else _MANY_TIMES
        step_size = within_promise(
            state.step_size.astype(dtype), descent, times * state.promise * unit
        )
        last = jnp.stack([step_size, state.momentum.astype(dtype)])
        # The slope along the velocity would be one more pass over the parameters.
        slope = jnp.stack([descent, jnp.zeros_like(descent)])
        return last, slope, jnp.zeros((2, 2), dtype)

    return fit() if fits is True else jax.lax.cond(fits, fit, keep)


def _loss_change(
    options: StepOptions,
    state: CGFACState,
    start: Start,
    step: Step,
    value_and_blown_up: tuple[Array, Array],
) -> Array:
    """``h(θ + δ) - h(θ)``, or ``h(θ - δ₀)`` where the loss is not finite."""
    value, blown_up = value_and_blown_up

    def move(p: Array, d: Array, v: Array) -> Array:
        return p + jnp.where(blown_up, -v, combine(step, d, v))

    moved = jax.tree.map(move, start.params, start.direction, state.velocity)
    moved_value = start.value_fn(moved)
    if not is_real_scalar(moved_value):
        raise ValueError(
            f"value_fn must return the scalar loss, a real number, got "
            f"{summarize(moved_value)}. For a loss with auxiliary outputs pass "
            "lambda p: loss_fn(p, batch)[0]."
        )
    change = _regularized(moved_value, moved, options)
    return change - jnp.where(blown_up, 0, value)


def _regularized(value: Array, params: PyTree, options: StepOptions) -> Array:
    """Returns the loss with the ``l2`` term."""
    if not options.has_l2:
        return jnp.asarray(value)
    return value + options.l2 / 2 * tree_dot(params, params)


def scheduled_step(
    options: StepOptions, state: CGFACState, start: Start, rate: Array, damping: Array
) -> tuple[Step, Verdict, CGFACState]:
    """A given learning rate, with KL clip and heavy-ball momentum."""
    rate = jnp.asarray(rate, jnp.float32)
    if options.kl_clip is not None:
        product = -tree_dot(start.grads, start.direction)
        rate = rate * kl_clip_scale(product, rate, options.kl_clip)
    momentum = jnp.asarray(
        0.0 if options.momentum is None else options.momentum, jnp.float32
    )
    finite = tree_is_finite(start.grads) & tree_is_finite(start.direction)
    finite &= jnp.isfinite(rate) & start.others_finite
    # Without the loss as a function the last step is taken to be at fault.
    blown_up = jnp.array(False)
    if start.value is not None:
        blown_up = ~jnp.isfinite(start.value)
    state = state._replace(
        damping=damping, step_size=rate.astype(jnp.float32), momentum=momentum
    )
    verdict = Verdict(finite & ~blown_up, blown_up, blown_up)
    return Step(rate, momentum), verdict, state


def combine(step: Step, direction: Array, velocity: Array) -> Array:
    """Returns ``α Δ + μ δ₀`` in the dtype of ``δ₀``."""
    delta = step.step_size * direction + step.momentum * velocity
    return narrowed(delta, velocity.dtype)


def settle(
    old: CGFACState, state: CGFACState, start: Start, step: Step, verdict: Verdict
) -> tuple[PyTree, CGFACState]:
    """Takes the step, or where a number is not finite a safe one instead.

    With a bad gradient in one layer the others' is no descent direction, and momentum
    would carry half a step on: the whole step becomes zero. A parameter that would
    leave the range of its precision stays where it is.

    Args:
      old: The state before the step.
      state: The state with the step's scalars.
      start: Where the step starts.
      step: ``α`` and ``μ``.
      verdict: What is wrong with the step.

    Returns:
      The update and the state with the velocity.
    """
    finite, blown_up, undone = verdict

    def choose(p: Array, d: Array, v: Array) -> Array:
        delta = combine(step, d, v)
        delta = jnp.where(finite & jnp.isfinite(p + delta), delta, 0).astype(v.dtype)
        return jnp.where(undone, -v, delta)

    def carry(u: Array, v: Array) -> Array:
        # A batch whose loss is never finite says nothing about the steps before it.
        rest = jnp.where(blown_up & ~undone, v, 0)
        return jnp.where(finite, u, rest).astype(u.dtype)

    update = jax.tree.map(choose, start.params, start.direction, old.velocity)
    state = state._replace(
        reduction_ratio=jnp.where(finite, state.reduction_ratio, old.reduction_ratio),
        # A step that was not taken before is not counted once more.
        num_rejected=jnp.maximum(
            state.num_rejected, old.num_rejected + (~finite).astype(jnp.int32)
        ),
        velocity=jax.tree.map(carry, update, old.velocity),
    )
    return update, state
