"""The state of `cgfac`, its step options, and a step with its starting point."""

import dataclasses
from typing import Any, NamedTuple

from optax_cgfac.solve.info import SolveInfo
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    check_number,
    is_number,
)


class CGFACState(NamedTuple):
    """State of `cgfac`.

    Attributes:
      cgfac_count: Updates so far, int32.
      damping: The damping ``λ`` of the next update; 0 until it is set from the data.
      initial_damping: The damping from which its bounds follow; 0 until it is set from
        the data. Models of fewer than a thousand parameters start below it.
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
    """Where a step starts."""

    params: PyTree  # θ
    grads: PyTree  # ∇h, with the l2 term
    direction: PyTree  # Δ
    value: Any  # the loss of the batch, without the l2 term, or None
    value_fn: Any  # the loss of the same batch as a function of the parameters, or None
    others_finite: Array | bool  # whether the gradients left to the fallback are


class Step(NamedTuple):
    """A step ``α Δ + μ δ₀`` by its coefficients."""

    step_size: Array  # α
    momentum: Array  # μ
