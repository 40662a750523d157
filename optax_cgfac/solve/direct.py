"""Algorithm 1 of Chen (2021): K-FAC by eigendecompositions of dense factors."""

from typing import Any

import jax.numpy as jnp

from optax_cgfac.operators.kronecker import (
    DampedOperator,
    FactoredDampedOperator,
)
from optax_cgfac.utils.linalg import matmul
from optax_cgfac.utils.types import Array


def solve_by_eigendecomposition(
    operator: DampedOperator | FactoredDampedOperator, b: Array
) -> Array:
    """Solves the damped Kronecker system in the factors' eigenbases.

    With ``A = U Λ Uᵀ`` and ``G = W M Wᵀ``, the solution is
    ``U ((Uᵀ b W) / D) Wᵀ`` where ``D_ij = Λ_i M_j + γ`` for Tikhonov damping and
    ``(Λ_i + α)(M_j + β)`` for factored damping.

    Args:
      operator: A damped `KroneckerOperator` with rows ``(R, n_in)``, ``(R, n_out)``.
      b: The right-hand side, shape ``(n_in, n_out)``.

    References:
      Chen (2021), Algorithm 1; Martens & Grosse (2015), section 6.3 and
      appendix B.
    """
    kronecker: Any = operator.operator
    a_factor, g_factor = kronecker.factors()
    a_values, a_vectors = jnp.linalg.eigh(a_factor)
    g_values, g_vectors = jnp.linalg.eigh(g_factor)
    # Rounding makes zero eigenvalues slightly negative.
    a_values, g_values = jnp.maximum(a_values, 0), jnp.maximum(g_values, 0)
    if isinstance(operator, DampedOperator):
        damping = jnp.asarray(operator.damping, b.dtype)
        denominator = a_values[:, None] * g_values[None, :] + damping
    else:
        a_values = a_values + operator.a_damping
        g_values = g_values + operator.g_damping
        denominator = a_values[:, None] * g_values[None, :]
    rotated = matmul(matmul(a_vectors.mT, b), g_vectors) / denominator
    return matmul(matmul(a_vectors, rotated), g_vectors.mT)
