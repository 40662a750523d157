"""Small numerical pieces: full-precision products, dots over trees, Gram matrices."""

import functools
import math

import jax
import jax.numpy as jnp

from optax_cgfac._types import Array, PyTree

# Accelerators round the operands of float32 products to tf32 or bfloat16 by
# default. Curvature solves divide by small eigenvalues of these products, so
# they need every bit; on CPUs the flag changes nothing.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def tree_dot(x: PyTree, y: PyTree) -> Array:
    """Returns the Euclidean inner product of two pytrees of equal structure.

    Args:
      x: A pytree of arrays.
      y: A pytree with the structure and shapes of ``x``.

    Returns:
      The scalar sum of the elementwise products.

    Example:
      >>> import jax.numpy as jnp
      >>> print(tree_dot({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}))
      11.0
    """
    products = jax.tree.map(
        lambda u, v: jnp.vdot(u, v, precision=jax.lax.Precision.HIGHEST), x, y
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros((), tree_dtype(x)))


def tree_dtype(tree: PyTree) -> jnp.dtype:
    """Returns the dtype that the leaves of ``tree`` promote to together."""
    return jnp.result_type(*jax.tree.leaves(tree))


def tree_is_finite(tree: PyTree) -> Array:
    """Returns a scalar that is true when every entry of ``tree`` is finite."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Returns ``numerator / denominator``, and zero where the denominator is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> print(safe_divide(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])))
      [0.5 0. ]
    """
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))


def gram(rows: Array) -> Array:
    """Returns ``rows @ rows.T`` of shape ``(R, R)`` for ``rows`` of shape ``(R, n)``."""
    return matmul(rows, rows.mT)


def tiny_shift(trace: Array) -> Array:
    """Returns the smallest diagonal shift that keeps a Gram matrix definite.

    Rounding perturbs the eigenvalues of a Gram matrix of trace ``t`` by about
    ``eps * t``, so a Cholesky factorisation with a smaller shift may meet a
    negative pivot (Higham, "Accuracy and Stability of Numerical Algorithms",
    section 10.1.1). The factor 10 covers the modest constants in that bound.
    """
    dtype = trace.dtype
    return jnp.maximum(
        10 * jnp.finfo(dtype).eps * trace, math.sqrt(jnp.finfo(dtype).tiny)
    )
