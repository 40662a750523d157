"""A step of `cgfac` with a learning rate: KL clip and heavy-ball momentum."""

import jax.numpy as jnp

from optax_cgfac.optimize.safeguards import Verdict
from optax_cgfac.optimize.state import CGFACState, Start, Step, StepOptions
from optax_cgfac.utils.arrays import tree_dot, tree_is_finite
from optax_cgfac.utils.types import Array


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


def kl_clip_scale(inner_product: Array, learning_rate: Array, clip: float) -> Array:
    r"""Returns ``ν`` such that the scaled step changes the model by at most ``clip``.

    The step ``-η ν x`` with ``F x ≈ ∇L`` has squared Fisher norm
    ``η² ν² xᵀ∇L``, twice the KL divergence to second order;
    ``ν = min(1, √(κ / (η² xᵀ∇L)))`` (Ba et al. 2017, section 5).
    """
    size = learning_rate**2 * inner_product
    ratio = jnp.where(size > 0, clip / jnp.where(size > 0, size, 1), 1.0)
    return jnp.sqrt(jnp.minimum(ratio, 1.0))
