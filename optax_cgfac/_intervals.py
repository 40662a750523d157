"""Updates between two fits of the quadratic model and between two looks."""

import math

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.problem.batch import num_kept
from optax_cgfac.utils.devices import axis_size

# Updates at the beginning, where step size and damping change most, that all fit the
# model and look at the loss.
FIRST = 10


# Below this many examples the loss is noisy, and a single look at it worth little.
_MANY_EXAMPLES = 512


def damping_interval(given: int | None, curvature: Curvature) -> int:
    """Returns the updates between two adaptations of the damping.

    Args:
      given: What the user says, or None.
      curvature: The curvature, which knows the size of the batch.

    Returns:
      Their number.
    """
    if given is not None:
        return given
    return 10 if curvature.spec.batch_size >= _MANY_EXAMPLES else 5


def model_interval(given: int | None, curvature: Curvature) -> int:
    """Returns the updates between two fits.

    Args:
      given: What the user says, or None for as many as make them cost little beside
        the gradient.
      curvature: The curvature, which knows the examples and the size of the batch.

    Returns:
      Their number.
    """
    if given is not None:
        return given
    spec = curvature.spec
    kept = num_kept(curvature.model_inputs, spec.batched) if spec.batched else 1
    # A forward pass and two tangents are five products with every kernel, a gradient
    # three.
    axis_name = None if spec.criterion is None else spec.criterion.axis_name
    share = 5 / 3 * kept * axis_size(axis_name) / spec.batch_size
    most = 0.06 if spec.few_outputs else 0.12
    return max(1, min(math.ceil(share / most), 10))
