"""Small numerical helpers on arrays and trees of arrays."""

import jax
import jax.numpy as jnp

from optax_cgfac.utils.devices import with_auto_axes
from optax_cgfac.utils.types import Array, PyTree


def tree_dot(x: PyTree, y: PyTree) -> Array:
    """Returns the Euclidean inner product of two pytrees of equal structure."""
    # Sums of squares leave the range of half precision.
    dtype = jnp.promote_types(tree_dtype((x, y)), jnp.float32)

    def dot(x: PyTree, y: PyTree) -> Array:
        products = jax.tree.map(
            lambda u, v: jnp.vdot(
                u,
                v,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            ),
            x,
            y,
        )
        return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))

    return with_auto_axes(dot, x, y)


def tree_dtype(tree: PyTree) -> jnp.dtype:
    """Returns the dtype that the leaves of ``tree`` promote to together."""
    return jnp.result_type(*jax.tree.leaves(tree))


def tree_is_finite(tree: PyTree) -> Array:
    """Returns a scalar that is true when every entry of ``tree`` is finite."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Returns ``numerator / denominator``, and zero where the denominator is zero."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))


def scaled(x: Array, scale: Array | float) -> Array:
    """Returns ``scale x``, the axes of ``scale`` being the first ones of ``x``."""
    scale = jnp.asarray(scale, x.dtype)
    return x * scale.reshape(*scale.shape, *([1] * (x.ndim - scale.ndim)))


def power_of_two(largest: Array) -> Array:
    """Returns powers of two that bring nonnegative numbers into ``[1, 4)``."""
    # Squaring very large or small values over- or underflows; dividing by a power of
    # two first is exact. It is 1 where a number is zero or not finite.
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    most = jnp.finfo(largest.dtype).maxexp - 2  # the inverse must be representable too
    exponent = jnp.clip(exponent - 1, -most, most)
    return jnp.ldexp(jnp.ones_like(largest), exponent)


def narrowed(x: Array, dtype: jnp.dtype | str) -> Array:
    """Casts ``x`` and clips it to the range of ``dtype``."""
    most = float(jnp.finfo(dtype).max)
    if most < float(jnp.finfo(x.dtype).max):
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)
