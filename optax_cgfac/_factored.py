r"""Factored damping: ``(A + αI) ⊗ (G + βI)``, two separate systems.

``x = (A + αI)⁻¹ b (G + βI)⁻¹``. A side with more features than rows is solved on
its rows (the matrix inversion lemma): with ``K = a aᵀ``,

.. math:: (A + αI)^{-1} b = (b - aᵀ Z / R) / α, \qquad (K / R + αI) Z = a b,

and a side with fewer features than rows in its own space.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._cg import CGInfo, cg_loop
from optax_cgfac._numerics import gram, matmul, tiny_shift
from optax_cgfac._operators import FactoredDampedOperator, KroneckerOperator
from optax_cgfac._types import Array

Solver = Literal["cholesky", "cg"]

# π² compares the mean eigenvalues of the two factors. Beyond 1e6 one side is
# numerically zero (a dead layer), and no split of the damping is meaningful.
_MAX_PI_SQUARED = 1e6


def factored_damping(
    operator: KroneckerOperator, damping: Array | float
) -> FactoredDampedOperator:
    r"""Splits ``γ`` into ``α = π√γ`` and ``β = √γ/π``.

    ``π² = (tr A / n_A) / (tr G / n_G)``, clipped to ``[1e-6, 1e6]``.

    Args:
      operator: The layer's ``A ⊗ G``; leading axes of its rows are stacked
        layers, each with its own ``π``.
      damping: The scalar ``γ``.

    Returns:
      The damped operator. Both dampings are kept large enough for a
      factorisation in the rows' precision.

    Example:
      >>> import jax.numpy as jnp
      >>> op = KroneckerOperator(jnp.array([[2.0]]), jnp.array([[1.0]]))
      >>> damped = factored_damping(op, 0.01)
      >>> print(damped.a_damping, damped.g_damping)
      0.2 0.05

    References:
      Martens & Grosse (2015), sections 6.3 and 6.6.
    """
    dtype = operator.a.dtype
    a_trace = jnp.sum(operator.a**2, (-2, -1)) * jnp.asarray(operator.a_scale, dtype)
    g_trace = jnp.sum(operator.g**2, (-2, -1)) * jnp.asarray(operator.g_scale, dtype)
    a_mean = a_trace / operator.a.shape[-1]
    g_mean = g_trace / operator.g.shape[-1]
    both = (a_mean > 0) & (g_mean > 0)
    pi_squared = jnp.where(both, a_mean / jnp.where(both, g_mean, 1), 1)
    pi = jnp.sqrt(jnp.clip(pi_squared, 1 / _MAX_PI_SQUARED, _MAX_PI_SQUARED))
    root = jnp.sqrt(jnp.asarray(damping, dtype))
    return FactoredDampedOperator(
        operator,
        jnp.maximum(root * pi, tiny_shift(a_trace)),
        jnp.maximum(root / pi, tiny_shift(g_trace)),
    )


class _Side(NamedTuple):
    rows: Array  # (R, n)
    scale: Array
    damping: Array


def solve_factored(
    operator: FactoredDampedOperator,
    b: Array,
    x0: Array | None = None,
    *,
    solver: Solver = "cholesky",
    max_steps: int | Array = 10,
    rtol: float | Array = 1e-5,
) -> tuple[Array, CGInfo]:
    """Solves ``(A + αI) x (G + βI) = b`` one side after the other.

    Args:
      operator: The damped operator; its rows have shapes ``(R, n_in)`` and
        ``(R, n_out)``.
      b: The right-hand side, shape ``(n_in, n_out)``.
      x0: The warm start for ``solver="cg"``, like ``b``; zero if omitted.
      solver: ``"cholesky"`` factors one matrix of size ``min(R, n)`` per side;
        ``"cg"`` iterates on it, with a step size for every column.
      max_steps: The largest number of CG iterations on each side.
      rtol: CG's tolerance relative to the norm of each column.

    Returns:
      The solution, like ``b``, and a `CGInfo` of both sides: the iterations of
      the two together, and the relative residual of the sides multiplied by
      ``‖b‖``.

    Example:
      >>> import jax.numpy as jnp
      >>> kronecker = KroneckerOperator(jnp.array([[1.0]]), jnp.array([[1.0]]))
      >>> op = FactoredDampedOperator(kronecker, jnp.array(1.0), jnp.array(1.0))
      >>> print(solve_factored(op, jnp.array([[8.0]]))[0])
      [[2.]]
    """
    dtype = b.dtype
    kron = operator.operator
    left = _Side(kron.a, jnp.asarray(kron.a_scale, dtype), operator.a_damping)
    right = _Side(kron.g, jnp.asarray(kron.g_scale, dtype), operator.g_damping)
    if solver == "cholesky":
        x = _cholesky_side(right, _cholesky_side(left, b).mT).mT
        zero = jnp.zeros((), dtype)
        return x, CGInfo(jnp.zeros((), jnp.int32), zero, jnp.array(True))
    if x0 is None:
        left_start = right_start = None
    else:
        left_start, right_start = _apply_side(right, x0.mT).mT, x0.mT
    kwargs = {"max_steps": max_steps, "rtol": rtol}
    y, left_info = _cg_side(left, b, left_start, **kwargs)
    x, right_info = _cg_side(right, y.mT, right_start, **kwargs)
    return x.mT, CGInfo(
        left_info.num_steps + right_info.num_steps,
        jnp.hypot(left_info.residual_norm, right_info.residual_norm)
        * jnp.sqrt(jnp.sum(b * b)),
        left_info.converged & right_info.converged,
    )


def _apply_side(side: _Side, x: Array) -> Array:
    product = matmul(side.rows.mT, matmul(side.rows, x))
    return side.scale * product + side.damping * x


def _in_row_space(side: _Side) -> bool:
    """Whether the side has fewer rows than features."""
    return side.rows.shape[0] < side.rows.shape[1]


def _system(side: _Side) -> Array:
    """The side's smaller matrix: the Gram matrix or the factor, damped."""
    rows = side.rows if _in_row_space(side) else side.rows.mT
    matrix = side.scale * gram(rows)
    return matrix + side.damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def _cholesky_side(side: _Side, b: Array) -> Array:
    # An explicit inverse and a product: triangular solves against many
    # right-hand sides are slower than both together on every backend.
    factor = (jnp.linalg.cholesky(_system(side)), True)
    size = factor[0].shape[0]
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(size, dtype=b.dtype))
    if not _in_row_space(side):
        return matmul(inverse, b)
    z = matmul(inverse, matmul(side.rows, b))
    return (b - side.scale * matmul(side.rows.mT, z)) / side.damping


def _cg_side(
    side: _Side,
    b: Array,
    x0: Array | None,
    *,
    max_steps: int | Array,
    rtol: float | Array,
) -> tuple[Array, CGInfo]:
    """CG on the side's smaller system, one step size per column of ``b``."""
    system = _system(side)
    in_rows = _in_row_space(side)
    rhs = matmul(side.rows, b) if in_rows else b
    if x0 is None:
        start, residual = jnp.zeros_like(rhs), rhs
    else:
        # At the solution Z = a x, so a x₀ starts Z from x₀.
        start = matmul(side.rows, x0) if in_rows else x0
        residual = rhs - matmul(system, start)
    rhs_squared = jnp.sum(rhs * rhs, 0)
    tolerance = (jnp.asarray(rtol, b.dtype) ** 2) * rhs_squared
    z, squared_norms, num_steps = cg_loop(
        lambda v: matmul(system, v),
        residual,
        start,
        dot=lambda u, v: jnp.sum(u * v, 0),
        squared_tolerance=tolerance,
        max_steps=max_steps,
    )
    x = (b - side.scale * matmul(side.rows.mT, z)) / side.damping if in_rows else z
    total = jnp.sum(rhs_squared)
    relative = jnp.where(
        total > 0, jnp.sum(squared_norms) / jnp.where(total > 0, total, 1), 0
    )
    return x, CGInfo(
        num_steps, jnp.sqrt(relative), jnp.all(squared_norms <= tolerance)
    )
