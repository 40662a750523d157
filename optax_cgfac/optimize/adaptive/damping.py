r"""The damping from the data, and how it adapts.

A damping has the unit of the curvature: a loss that is ten times larger has ten times
the Fisher matrix and needs ten times the damping. Measured in the mean curvature

.. math:: \bar F = \frac{\sum_l \mathrm{tr} A_l \, \mathrm{tr} G_l}{\sum_l n_l},

with ``n`` the entries of a layer's parameters, one number serves all losses and models
but the smallest: of a few parameters all directions are about as curved as their mean,
and are known from a few examples. These start lower, and end no lower: on small batches
a damping far below the mean curvature lets their weights drift.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.problem.batch import num_kept
from optax_cgfac.utils.arrays import safe_divide
from optax_cgfac.utils.devices import axis_size
from optax_cgfac.utils.types import Array
from optax_cgfac.utils.validate import (
    INSIDE_ONE,
    NOT_NEGATIVE,
    check_number,
    check_positive,
)

# Thresholds of the trust-region literature (Moré 1978; Nocedal & Wright 2006,
# algorithm 4.1), used for K-FAC by Martens & Grosse (2015), section 6.5.
_GOOD, _BAD = 0.75, 0.25


def reduction_ratio(actual: Array, predicted: Array) -> Array:
    """Returns ``ρ = (h(θ + δ) - h(θ)) / M(δ)``.

    It is 1 where nothing was predicted and the loss has not risen (a zero step), and
    minus infinity where a number is not finite or no descent was predicted.
    """
    ratio = jnp.where(predicted < 0, safe_divide(actual, predicted), -jnp.inf)
    ratio = jnp.where((predicted == 0) & (actual <= 0), 1.0, ratio)
    return jnp.where(jnp.isfinite(actual), ratio, -jnp.inf).astype(predicted.dtype)


def levenberg_marquardt(
    damping: Array,
    ratio: Array,
    *,
    decay: Array | float,
    minimum: Array | float,
    maximum: Array | float,
) -> Array:
    """Lowers the damping after good predictions and raises it after bad ones.

    The new ``λ`` is ``ω λ`` for ``ρ > 3/4``, ``λ / ω`` for ``ρ < 1/4``, otherwise
    ``λ``, clipped; ``ω < 1`` is the decay (Martens & Grosse 2015, section 6.5).
    """
    factor = jnp.where(ratio > _GOOD, decay, jnp.where(ratio < _BAD, 1 / decay, 1.0))
    return jnp.clip(damping * factor, minimum, maximum).astype(damping.dtype)


_FEW_PARAMETERS = 1000

# The damping may fall to this part of the typical one. On small batches a good ratio
# rewards fitting the batch, and without a floor the damping falls until the loss
# diverges.
LOWEST_FRACTION = 1e-2


def mean_curvature(curvature: Curvature) -> Array:
    """Returns the mean of the Fisher matrix's diagonal over all tagged parameters."""
    traces, size = [], 0
    for tag in curvature.tags:
        eigenpairs = curvature.eigenpairs.get(tag.name)
        if eigenpairs is None:
            rows = curvature.layers[tag.name]
            trace = curvature.kronecker_operator(tag, rows).trace()
        else:
            trace = eigenpairs.a.trace * eigenpairs.g.trace
        traces.append(jnp.sum(jnp.where(jnp.isfinite(trace), trace, 0)))
        size += max(trace.size, 1) * tag.n_in * tag.n_out
    return sum(traces, start=jnp.zeros((), jnp.float32)) / size


def typical_damping(curvature: Curvature, multiple: float) -> Array:
    """Returns a multiple of the mean curvature; 0 where that is not finite."""
    damping = multiple * mean_curvature(curvature)
    return jnp.where(jnp.isfinite(damping), damping, 0)


def initial_fraction(curvature: Curvature) -> float:
    """Returns the part of the typical damping to start from, 1 but for small models."""
    size = sum(math.prod(shape) for tag in curvature.tags for shape in tag.shapes)
    return min(max(size / _FEW_PARAMETERS, LOWEST_FRACTION), 1.0)


# In the first updates step size and damping change most: all of them fit the model and
# look at the loss.
FIRST = 10
# Below this many examples the loss is noisy, and a single look at it says little.
_MANY_EXAMPLES = 512
# The damping is adapted within these multiples of the initial one.
_BOUNDS = (LOWEST_FRACTION, 1e5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The options of `cgfac` that concern the adapted damping; see there."""

    damping_decay: Any = None
    damping_interval: Any = None
    model_interval: Any = None
    min_damping: Any = None
    max_damping: Any = None

    def __post_init__(self):
        """Validates the numbers."""
        numbers = {
            "damping_decay": (INSIDE_ONE, 0.9),
            "min_damping": (NOT_NEGATIVE, 1e-3),
        }
        for name, (allowed, example) in numbers.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), allowed, example)
        for name in ("damping_interval", "model_interval"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), may_be_array=True)

    @property
    def decay(self) -> Any:
        """The factor ``ω`` per update."""
        return 0.9 if self.damping_decay is None else self.damping_decay

    def is_early(self, count: Array) -> Any:
        """Whether this update looks at the loss as one of the first."""
        return count <= FIRST if self.damping_interval is None else False

    def interval(self, curvature: Curvature) -> Any:
        """Updates between two adaptations of the damping."""
        if self.damping_interval is not None:
            return self.damping_interval
        return 10 if curvature.spec.batch_size >= _MANY_EXAMPLES else 5

    def fit_interval(self, curvature: Curvature) -> Any:
        """Updates between two fits; by default a small part of the gradients' cost.

        A forward pass and two tangents are five products with every kernel, a gradient
        is three.
        """
        if self.model_interval is not None:
            return self.model_interval
        spec = curvature.spec
        kept = num_kept(curvature.model_inputs, spec.batched) if spec.batched else 1
        axis_name = None if spec.objective is None else spec.objective.axis_name
        fraction = 5 / 3 * kept * axis_size(axis_name) / spec.batch_size
        most = 0.06 if spec.few_outputs else 0.12
        return max(1, min(math.ceil(fraction / most), 10))

    def bounds(self, initial: Array) -> tuple[Array | float, Array | float]:
        """The ends between which a damping with this initial value is adapted."""
        low, high = (factor * initial for factor in _BOUNDS)
        high = jnp.where(initial > 0, high, jnp.inf)
        high = high if self.max_damping is None else self.max_damping
        low = low if self.min_damping is None else self.min_damping
        return low, jnp.minimum(high, jnp.finfo(initial.dtype).max)

    def adapted(
        self, damping: Array, initial: Array, ratio: Array, steps: Array
    ) -> Array:
        """The damping after ``steps`` updates and a look with this reduction ratio."""
        low, high = self.bounds(initial)
        decay = self.decay**steps
        bounds = {"minimum": low, "maximum": high}
        return levenberg_marquardt(damping, ratio, decay=decay, **bounds)

    def raised(self, damping: Array, initial: Array, curvature: Curvature) -> Array:
        """The damping after a step that is taken back."""
        # In the damping's precision: a long interval overflows to infinity in silence.
        decay = jnp.asarray(self.decay, damping.dtype)
        _, high = self.bounds(initial)
        return jnp.minimum(damping * decay ** -self.interval(curvature), high)
