"""Safeguards of a step: takes it, leaves it out, or takes the previous one back.

NaN and infinity in gradients, direction or loss end here: they never reach parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.optimize.state import CGFACState, Start, Step
from optax_cgfac.utils.arrays import narrowed
from optax_cgfac.utils.types import Array, PyTree


class Verdict(NamedTuple):
    """What is wrong with a step, if anything."""

    finite: Array  # whether gradients, direction, step size and loss are finite
    blown_up: Array  # whether the loss is not finite
    undone: Array  # whether to take the last step back


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
