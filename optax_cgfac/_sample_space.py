r"""The iterates of Algorithm 2, computed on row coefficients instead of parameters.

Every vector of the Krylov space of ``F + γI`` with ``F V = s aᵀ(a V gᵀ)g`` and
start ``x₀`` lies in ``span{d} + {aᵀ Θ g}``, where ``d = b - γ x₀``. The pair
``(c, Θ)``, a scalar and an ``R x R`` matrix, stands for ``c d + aᵀ Θ g``. With
``K_a = a aᵀ``, ``K_g = g gᵀ`` and ``T = a d gᵀ``,

.. math::
  (F + γI)(c, Θ) &= (γ c,\; γ Θ + s (c T + K_a Θ K_g)) \\
  ⟨(c,Θ), (e,Φ)⟩ &= c e ‖d‖² + c⟨T,Φ⟩ + e⟨T,Θ⟩ + ⟨Θ, K_a Φ K_g⟩ .

An iteration costs ``4R³`` flops instead of the ``8Rn`` of parameter space (the
idea of Ren & Goldfarb 2019, section 3, carried from a direct solve to CG).
"""

from typing import NamedTuple

import jax.numpy as jnp

from optax_cgfac._cg import CGInfo, cg_loop
from optax_cgfac._numerics import gram, matmul
from optax_cgfac._operators import KroneckerOperator
from optax_cgfac._types import Array


class _Coefficients(NamedTuple):
    """The vector ``c d + aᵀ Θ g``.

    ``q = K_a Θ K_g`` travels along by the recurrences of CG, so that an
    iteration needs one such product, not one for the operator and one for the
    inner product.
    """

    c: Array
    theta: Array
    q: Array


def conjugate_gradient_on_rows(
    operator: KroneckerOperator,
    damping: Array | float,
    b: Array,
    x0: Array | None = None,
    *,
    max_steps: int | Array,
    rtol: float | Array = 1e-5,
    atol: float | Array = 0.0,
) -> tuple[Array, CGInfo]:
    """Solves ``(A ⊗ G + γI) x = b`` with the iterates of `conjugate_gradient`.

    Args:
      operator: The layer's ``A ⊗ G``, with rows of shape ``(R, n_in)`` and
        ``(R, n_out)``.
      damping: The scalar ``γ``.
      b: The right-hand side, shape ``(n_in, n_out)``.
      x0: The warm start, like ``b``; zero if omitted.
      max_steps: The largest number of iterations.
      rtol: Tolerance relative to ``‖b‖``.
      atol: Absolute tolerance.

    Returns:
      The solution, like ``b``, and a `CGInfo`.

    Example:
      >>> import jax.numpy as jnp
      >>> op = KroneckerOperator(jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
      >>> x, _ = conjugate_gradient_on_rows(op, 1.0, jnp.ones((2, 1)), max_steps=3)
      >>> print(x.T)
      [[0.5 1. ]]
    """
    a, g = operator.a, operator.g
    damping = jnp.asarray(damping, b.dtype)
    s = jnp.asarray(operator.a_scale * operator.g_scale, b.dtype)
    a_gram, g_gram = gram(a), gram(g)

    def project(matrix: Array) -> Array:
        return matmul(matmul(a, matrix), g.mT)

    def sandwich(theta: Array) -> Array:
        return matmul(matmul(a_gram, theta), g_gram)

    if x0 is None:
        d, t = b, project(b)
        theta = jnp.zeros_like(t)
        residual = _Coefficients(jnp.ones((), b.dtype), theta, theta)
    else:
        t0 = project(x0)
        d = b - damping * x0
        t = project(b) - damping * t0
        residual = _Coefficients(jnp.ones((), b.dtype), -s * t0, -s * sandwich(t0))
    d_squared = jnp.sum(d * d)

    def matvec(vector: _Coefficients) -> _Coefficients:
        image = vector.c * t + vector.q
        return _Coefficients(
            damping * vector.c,
            damping * vector.theta + s * image,
            damping * vector.q + s * sandwich(image),
        )

    def dot(x: _Coefficients, y: _Coefficients) -> Array:
        return (
            x.c * y.c * d_squared
            + x.c * jnp.sum(t * y.theta)
            + y.c * jnp.sum(t * x.theta)
            + jnp.sum(x.theta * y.q)
        )

    zeros = jnp.zeros_like(t)
    tolerance = jnp.maximum(
        jnp.asarray(rtol) ** 2 * jnp.sum(b * b), jnp.asarray(atol) ** 2
    ).astype(b.dtype)
    solution, squared_norm, num_steps = cg_loop(
        matvec,
        residual,
        _Coefficients(jnp.zeros((), b.dtype), zeros, zeros),
        dot=dot,
        squared_tolerance=tolerance,
        max_steps=max_steps,
    )
    x = solution.c * d + matmul(matmul(a.mT, solution.theta), g)
    # The inner product of a small vector is a difference of large terms and may
    # round to a negative number.
    norm = jnp.sqrt(jnp.maximum(squared_norm, 0))
    x = x if x0 is None else x0 + x
    converged = (squared_norm <= tolerance) & jnp.isfinite(tolerance)
    return x, CGInfo(num_steps, norm, converged)
