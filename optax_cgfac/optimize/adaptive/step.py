"""The adaptive step: a quadratic model fits it and adapts the damping."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.adaptive.damping import (
    FIRST,
    Adaptation,
    initial_fraction,
    reduction_ratio,
    typical_damping,
)
from optax_cgfac.optimize.adaptive.quadratic_model import (
    minimize_in_box,
    model_value,
    quadratic_model,
    within_loss,
    within_promise,
)
from optax_cgfac.optimize.safeguards import Verdict, combine
from optax_cgfac.optimize.state import CGFACState, Start, Step, StepOptions
from optax_cgfac.utils.arrays import tree_dot
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
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


def with_initial_damping(
    state: CGFACState, curvature: Curvature, multiple: float, without_data: float
) -> CGFACState:
    """Sets the damping from the data, where it is not set yet."""
    typical = typical_damping(curvature, multiple).astype(state.damping.dtype)
    # The first curvature may be next to nothing, as that of a saturated softmax is.
    is_new = state.initial_damping == 0
    is_new |= typical > _OUTGROWN * state.initial_damping
    first = initial_fraction(curvature) * typical
    start = jnp.where(first > 0, first, without_data)
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
