"""Damping and step control as pure functions: Levenberg-Marquardt, KL clip."""

import jax.numpy as jnp

from optax_cgfac.utils.arrays import safe_divide
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
