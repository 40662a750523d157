"""Damping and step control as pure functions: Levenberg-Marquardt, KL clip."""

import math

import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.problem.batch import num_kept
from optax_cgfac.utils.arrays import safe_divide
from optax_cgfac.utils.devices import axis_size
from optax_cgfac.utils.types import Array

# Thresholds of the trust-region literature (Moré 1978; Nocedal & Wright 2006,
# algorithm 4.1), used for K-FAC by Martens & Grosse (2015), section 6.5.
_GOOD, _BAD = 0.75, 0.25


def reduction_ratio(actual: Array, predicted: Array) -> Array:
    """Returns ``ρ``, the actual change of the loss over the predicted one.

    Args:
      actual: ``h(θ + δ) - h(θ)``.
      predicted: ``M(δ)``, negative for a descent step.

    Returns:
      The ratio; 1 where nothing was predicted and the loss has not risen (a zero
      step), and minus infinity where a number is not finite or no descent was
      predicted.

    Example:
      >>> import jax.numpy as jnp
      >>> print(reduction_ratio(jnp.array(-1.0), jnp.array(-2.0)))
      0.5
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

    Args:
      damping: The current ``λ``.
      ratio: The reduction ratio ``ρ``.
      decay: The factor ``ω < 1``.
      minimum: The smallest damping.
      maximum: The largest damping.

    Returns:
      ``ω λ`` for ``ρ > 3/4``, ``λ / ω`` for ``ρ < 1/4``, otherwise ``λ``, clipped.

    Example:
      >>> import jax.numpy as jnp
      >>> bounds = dict(decay=0.5, minimum=1e-8, maximum=1e8)
      >>> print(levenberg_marquardt(jnp.array(1.0), jnp.array(0.1), **bounds))
      2.0

    References:
      Martens & Grosse (2015), section 6.5.
    """
    factor = jnp.where(ratio > _GOOD, decay, jnp.where(ratio < _BAD, 1 / decay, 1.0))
    return jnp.clip(damping * factor, minimum, maximum).astype(damping.dtype)


def kl_clip_scale(inner_product: Array, learning_rate: Array, clip: float) -> Array:
    r"""Returns ``ν`` such that the scaled step changes the model by at most ``clip``.

    The step ``-η ν x`` with ``F x ≈ ∇L`` has squared Fisher norm
    ``η² ν² xᵀ∇L``, twice the KL divergence to second order;
    ``ν = min(1, √(κ / (η² xᵀ∇L)))``.

    Args:
      inner_product: ``xᵀ∇L``.
      learning_rate: ``η``.
      clip: ``κ``.

    Returns:
      The scalar ``ν``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(kl_clip_scale(jnp.array(4.0), jnp.array(1.0), 1.0))
      0.5

    References:
      Ba et al. (2017), section 5.
    """
    size = learning_rate**2 * inner_product
    ratio = jnp.where(size > 0, clip / jnp.where(size > 0, size, 1), 1.0)
    return jnp.sqrt(jnp.minimum(ratio, 1.0))


# Of the mean curvature: it gives 0.1 for the autoencoder on CURVES, and a tenth or ten
# times that is worse there (benchmarks/LOG.md).
_MULTIPLE = 10.0


_FEW_PARAMETERS = 1000


# The damping may fall to this share of the typical one. Without a lower end a good
# reduction ratio on small batches, which rewards fitting the batch, lowers it until the
# loss turns up.
LOWEST_FRACTION = 1e-2


def mean_curvature(curvature: Curvature) -> Array:
    """Returns the mean of the Fisher matrix's diagonal over all tagged parameters.

    Args:
      curvature: The curvature.

    Returns:
      A scalar, float32 or the layers' precision if higher; 0 without rows. A layer
      whose curvature is not finite counts as one without.
    """
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


def typical_damping(curvature: Curvature) -> Array:
    """Returns the damping to start from with a thousand parameters and more.

    Args:
      curvature: The curvature.

    Returns:
      Ten times the mean curvature; 0 where that is no number of use, as without rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optax_cgfac import fisher_estimator
      >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x),
      ...     "squared_error",
      ...     kind="exact",
      ...     examples=4,
      ... )
      >>> curvature = estimator.update(estimator.init(params, x), params, x)
      >>> print(f"{typical_damping(curvature):.3f}")  # the Hessian is 2 I
      20.000
    """
    damping = _MULTIPLE * mean_curvature(curvature)
    return jnp.where(jnp.isfinite(damping), damping, 0)


def initial_fraction(curvature: Curvature) -> float:
    """Returns the share of the typical damping to start from: 1 but for few parameters.

    Args:
      curvature: The curvature.

    Returns:
      A number in ``[LOWEST_FRACTION, 1]``, for fewer than a thousand parameters less in
      proportion.
    """
    size = sum(math.prod(shape) for tag in curvature.tags for shape in tag.shapes)
    return min(max(size / _FEW_PARAMETERS, LOWEST_FRACTION), 1.0)


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
    axis_name = None if spec.objective is None else spec.objective.axis_name
    share = 5 / 3 * kept * axis_size(axis_name) / spec.batch_size
    most = 0.06 if spec.few_outputs else 0.12
    return max(1, min(math.ceil(share / most), 10))
