r"""Factored damping: ``(A + αI) ⊗ (G + βI)``, two separate systems.

``x = (A + αI)⁻¹ b (G + βI)⁻¹``. A side with more features than rows is solved on
its rows (the matrix inversion lemma): with ``K = a aᵀ``,

.. math:: (A + αI)^{-1} b = (b - aᵀ Z / R) / α, \qquad (K / R + αI) Z = a b,

and a side with fewer features than rows in its own space.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_cgfac.operators.kronecker import FactoredDampedOperator, KroneckerOperator
from optax_cgfac.operators.rows import (
    IndexRows,
    Rows,
    gram,
    num_features,
    num_rows,
    rows_dtype,
    squared_norm,
    times,
    to_dense,
    transpose_times,
)
from optax_cgfac.solve.cg import Space, iterate, no_worse_than_zero
from optax_cgfac.solve.info import CGInfo, StopReason
from optax_cgfac.utils.arrays import power_of_two, safe_divide, scaled
from optax_cgfac.utils.linalg import matmul, spd_inverses, tiny_shift
from optax_cgfac.utils.types import Array, LayerRows

# π² compares the mean eigenvalues of the two factors, which a loss or inputs in other
# units move by any number. Beyond this π leaves too little of float32 to the rest.
_MAX_PI = 1e18


def factored_damping(
    operator: KroneckerOperator, damping: Array | float
) -> FactoredDampedOperator:
    r"""Splits ``γ`` into ``α = π√γ`` and ``β = √γ/π``.

    ``π² = (tr A / n_A) / (tr G / n_G)``, with ``π`` clipped to ``[1e-18, 1e18]``.

    Stacked layers have a ``π`` each. Both dampings are kept large enough for a
    factorisation in the rows' precision (Martens & Grosse 2015, sections 6.3, 6.6).
    """
    dtype = operator.g.dtype
    a_trace = squared_norm(operator.a) * jnp.asarray(operator.a_scale, dtype)
    g_trace = squared_norm(operator.g) * jnp.asarray(operator.g_scale, dtype)
    sizes = num_features(operator.a), num_features(operator.g)
    return FactoredDampedOperator(
        operator, *split_damping(a_trace, g_trace, sizes, damping)
    )


def split_damping(
    a_trace: Array,
    g_trace: Array,
    sizes: tuple[int, ...] | tuple[np.ndarray, ...],
    damping: Array | float,
) -> tuple[Array, Array]:
    """Returns ``α`` and ``β`` from the factors' traces; see `factored_damping`."""
    a_mean, g_mean = a_trace / sizes[0], g_trace / sizes[1]
    both = (a_mean > 0) & (g_mean > 0)
    # Of the roots, since the ratio of two numbers of float32 may be none.
    a_root, g_root = (jnp.sqrt(jnp.where(both, x, 1)) for x in (a_mean, g_mean))
    pi = jnp.clip(a_root / g_root, 1 / _MAX_PI, _MAX_PI)
    root = jnp.sqrt(jnp.asarray(damping, g_trace.dtype))
    return (
        jnp.maximum(root * pi, tiny_shift(a_trace)),
        jnp.maximum(root / pi, tiny_shift(g_trace)),
    )


class _Side(NamedTuple):
    rows: Rows  # (*stack, R, n)
    scale: Array
    damping: Array  # stack
    in_sample_space: bool  # whether the system is that of the rows

    def system(self) -> Array:
        """The side's smaller matrix: the Gram matrix or the factor, damped."""
        if self.in_sample_space:
            matrix = scaled(gram(self.rows), self.scale)
        else:
            rows = to_dense(self.rows)
            matrix = scaled(matmul(rows.mT, rows), self.scale)
        identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
        return matrix + self.damping[..., None, None] * identity

    def project(self, x: Array) -> Array:
        """Brings a matrix ``(*stack, n, k)`` to the space of the system."""
        return times(self.rows, x) if self.in_sample_space else x

    def lift(self, b: Array, z: Array) -> Array:
        """Returns the solution for ``b`` from that of the system."""
        if not self.in_sample_space:
            return z
        back = scaled(transpose_times(self.rows, z), self.scale)
        return (b - back) / self.damping[..., None, None]

    def apply(self, x: Array) -> Array:
        """Returns the damped factor times ``x``."""
        if not self.in_sample_space:
            return matmul(self.system(), x)
        product = scaled(transpose_times(self.rows, times(self.rows, x)), self.scale)
        return product + self.damping[..., None, None] * x


def sides_in_sample_space(rows: LayerRows) -> tuple[bool, bool]:
    """Returns for either side whether it is solved among its rows.

    Beside a long vocabulary even ``R x n_in`` is too much: there the right side, as
    wide as the embedding's vectors, is solved among them.
    """
    count, n_in, n_out = num_rows(rows.a), num_features(rows.a), num_features(rows.g)
    tall = isinstance(rows.a, IndexRows) and count < n_in
    return count < n_in, count < n_out and not tall


def _sides(operator: FactoredDampedOperator) -> tuple[_Side, _Side]:
    kron = operator.operator
    dtype = rows_dtype(kron.a)
    left, right = sides_in_sample_space(LayerRows(kron.a, kron.g))
    a_scale, g_scale = (jnp.asarray(x, dtype) for x in (kron.a_scale, kron.g_scale))
    return (
        _Side(kron.a, a_scale, operator.a_damping, left),
        _Side(kron.g, g_scale, operator.g_damping, right),
    )


def solve_directly(
    operators: Sequence[FactoredDampedOperator], bs: Sequence[Array]
) -> list[Array]:
    """Solves ``(A + αI) x (G + βI) = b`` for many layers by Cholesky factorisation.

    Per side one matrix of size ``min(R, n)`` is inverted, those of all layers
    together. An explicit inverse and a product: triangular solves against many
    right-hand sides are slower than both.
    """
    sides = [side for operator in operators for side in _sides(operator)]
    inverses = spd_inverses([side.system() for side in sides])
    solutions = []
    for index, b in enumerate(bs):
        left, right = sides[2 * index : 2 * index + 2]
        left_inverse, right_inverse = inverses[2 * index : 2 * index + 2]
        y = left.lift(b, matmul(left_inverse, left.project(b))).mT
        x = right.lift(y, matmul(right_inverse, right.project(y)))
        solutions.append(x.mT)
    return solutions


def solve_by_cg(
    operator: FactoredDampedOperator,
    b: Array,
    x0: Array | None = None,
    *,
    max_steps: int | Array = 10,
    rtol: float | Array = 1e-5,
    doubts_start: bool = False,
) -> tuple[Array, CGInfo]:
    """Solves ``(A + αI) x (G + βI) = b`` by CG on one side after the other.

    Limits count for each side, the tolerance for each column. With ``doubts_start`` a
    column whose start is worse than zero starts from zero.

    Returns:
      The solution, like ``b``, and a `CGInfo` of both sides: the iterations of
      the two together, the relative residuals of the two systems, recomputed, as one
      norm, times ``‖b‖``, and the worse of the two reasons.
    """
    left, right = _sides(operator)
    limits = {"max_steps": max_steps, "rtol": rtol, "doubts_start": doubts_start}
    if x0 is None:
        left_start = right_start = None
    else:
        # The left system's solution is x (G + βI).
        left_start, right_start = right.apply(x0.mT).mT, x0.mT
    y, left_info = _cg_side(left, b, left_start, **limits)
    # b / α may be so large or small that its squares are no numbers.
    unit = power_of_two(jnp.max(jnp.abs(y)))
    right_start = None if right_start is None else right_start / unit
    x, right_info = _cg_side(right, y.mT / unit, right_start, **limits)
    return x.mT * unit, CGInfo(
        left_info.num_steps + right_info.num_steps,
        jnp.hypot(left_info.residual_norm, right_info.residual_norm)
        * jnp.sqrt(jnp.sum(b * b)),
        left_info.converged & right_info.converged,
        jnp.maximum(left_info.reason, right_info.reason),
    )


def _cg_side(
    side: _Side,
    b: Array,
    x0: Array | None,
    *,
    max_steps: int | Array,
    rtol: float | Array,
    doubts_start: bool,
) -> tuple[Array, CGInfo]:
    """CG on the side's smaller system, one step size per column of ``b``."""
    system = side.system()
    rhs = side.project(b)

    def dot(u: Array, v: Array) -> Array:
        return jnp.sum(u * v, 0)

    if x0 is None:
        start, residual = jnp.zeros_like(rhs), rhs
    else:
        # At the solution Z = a x, so a x₀ starts Z from x₀.
        start = side.project(x0)
        residual = rhs - matmul(system, start)
        if doubts_start:
            start, residual = no_worse_than_zero(start, residual, rhs, dot)
    rhs_squared = jnp.sum(rhs * rhs, 0)
    tolerance = jnp.asarray(rtol, b.dtype) ** 2 * rhs_squared
    end = iterate(
        Space(lambda v: matmul(system, v), dot),
        start,
        residual,
        lambda x: (x, rhs - matmul(system, x)),
        squared_tolerance=tolerance,
        max_steps=max_steps,
    )
    relative = safe_divide(jnp.sum(end.squared_norm), jnp.sum(rhs_squared))
    return side.lift(b, end.x), CGInfo(
        end.num_steps,
        jnp.sqrt(relative),
        jnp.all(end.reason == StopReason.CONVERGED.value),
        jnp.max(end.reason),
    )
