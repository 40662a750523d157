r"""Leading eigenpairs of the Kronecker factors, and solves with them.

With orthonormal columns ``V``, eigenvalues ``λ`` and everything else of a factor taken
for zero,

.. math:: (A + αI)^{-1} ≈ \frac1α\Big(I - V \frac{λ}{λ + α} Vᵀ\Big).

Activations and cotangents have a few large eigenvalues and many that are small beside
the damping, where the approximation changes nothing. It costs ``2r`` multiplications
for each entry of a layer's matrix and side instead of ``2R``, takes any damping without
a factorisation, and may be a few updates old.

The eigenpairs come from subspace iteration, warm-started with the previous ones
(Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithm 4.4),
on the smaller of the Gram matrix ``a aᵀ`` and the factor ``aᵀ a``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._factored import split_damping
from optax_cgfac._numerics import matmul, safe_divide, scaled
from optax_cgfac._operators import KroneckerOperator
from optax_cgfac._types import Array

# Sides are padded to a multiple of this, so that most of them share one batch.
_BLOCK = 32
# Products with the factor per refresh; warm-started, one would nearly do.
_POWER_STEPS = 2


class Spectrum(NamedTuple):
    """Leading eigenpairs of one factor.

    Attributes:
      vectors: Orthonormal columns, or zero, shape ``(*stack, n, r)``.
      values: Eigenvalues, shape ``(*stack, r)``.
      trace: The whole factor's, shape ``stack``.
    """

    vectors: Array
    values: Array
    trace: Array


class LayerSpectra(NamedTuple):
    """Leading eigenpairs of a layer's two factors.

    Attributes:
      a: Of ``A``.
      g: Of ``G``.
    """

    a: Spectrum
    g: Spectrum


def empty_spectrum(
    stack: tuple[int, ...], rows: int, n: int, rank: int, dtype: str
) -> Spectrum:
    """Returns the spectrum of a factor of which nothing is known yet.

    Args:
      stack: Sizes of stacked layers.
      rows: Rows ``R`` that the factor is made of.
      n: Features.
      rank: The largest number of eigenpairs.
      dtype: That of the layer's solves.

    Returns:
      A `Spectrum` of zeros.
    """
    r = min(rank, rows, n)
    return Spectrum(
        jnp.zeros((*stack, n, r), dtype),
        jnp.zeros((*stack, r), dtype),
        jnp.zeros(stack, dtype),
    )


class _Side(NamedTuple):
    rows: Array  # (*stack, R, n)
    scale: Array
    old: Spectrum

    @property
    def is_wide(self) -> bool:
        """Whether the Gram matrix of the rows is smaller than the factor."""
        return self.rows.shape[-2] < self.rows.shape[-1]

    def matrix(self) -> Array:
        """The smaller of the Gram matrix and the factor."""
        rows = self.rows
        product = matmul(rows, rows.mT) if self.is_wide else matmul(rows.mT, rows)
        return scaled(product, self.scale)

    def start(self) -> Array:
        """The old eigenvectors in the space of `matrix`."""
        old = self.old.vectors
        if self.is_wide:
            old = matmul(self.rows, old)
        return jnp.where(jnp.isfinite(old), old, 0)

    def lift(self, values: Array, vectors: Array) -> Array:
        """Eigenvectors of the factor from those of `matrix`."""
        # Directions below rounding are no eigenvectors: they count as zero.
        rounding = jnp.finfo(values.dtype).eps * 10 * self.rows.shape[-2]
        good = values > rounding * values[..., -1:]
        if self.is_wide:
            root = jnp.sqrt(jnp.where(good, values, 1))[..., None, :]
            vectors = matmul(self.rows.mT, vectors) / root
            vectors = vectors * scaled(jnp.ones_like(values), self.scale**0.5)[
                ..., None, :
            ]
        return jnp.where(good[..., None, :], vectors, 0)


def refresh(
    operators: Sequence[KroneckerOperator], old: Sequence[LayerSpectra]
) -> list[LayerSpectra]:
    """Computes the leading eigenpairs of many layers' factors.

    Args:
      operators: The layers' ``A ⊗ G`` with dense rows.
      old: The previous eigenpairs, which give shapes and a start.

    Returns:
      For each layer its new eigenpairs.
    """
    sides = [
        _Side(rows, jnp.asarray(scale, rows.dtype), spectrum)
        for operator, spectra in zip(operators, old, strict=True)
        for rows, scale, spectrum in (
            (operator.a, operator.a_scale, spectra.a),
            (operator.g, operator.g_scale, spectra.g),
        )
    ]
    matrices = [side.matrix() for side in sides]
    groups: dict[tuple[int, int, jnp.dtype], list[int]] = {}
    for index, (side, matrix) in enumerate(zip(sides, matrices, strict=True)):
        size = -(-matrix.shape[-1] // _BLOCK) * _BLOCK
        rank = side.old.values.shape[-1]
        if rank == matrix.shape[-1]:
            rank = size  # padded too, and cut off again
        groups.setdefault((size, rank, matrix.dtype), []).append(index)
    found: dict[int, Spectrum] = {}
    for (size, rank, _), members in groups.items():
        batch = jnp.concatenate([_padded(matrices[i], size, size) for i in members])
        start = None
        if rank < size:
            starts = [_padded(sides[i].start(), size, rank) for i in members]
            start = jnp.concatenate(starts)
        values, vectors = _leading_eigenpairs(batch, start)
        first = 0
        for i in members:
            side, stack = sides[i], matrices[i].shape[:-2]
            kept, dim = side.old.values.shape[-1], matrices[i].shape[-1]
            last = first + _count(matrices[i])
            own_values = values[first:last, -kept:].reshape(*stack, kept)
            own = vectors[first:last, :dim, -kept:].reshape(*stack, dim, kept)
            trace = jnp.trace(matrices[i], axis1=-2, axis2=-1)
            found[i] = Spectrum(side.lift(own_values, own), own_values, trace)
            first = last
    return [
        LayerSpectra(found[2 * index], found[2 * index + 1])
        for index in range(len(operators))
    ]


def _leading_eigenpairs(
    matrices: Array, start: Array | None
) -> tuple[Array, Array]:
    """Eigenvalues ``(k, r)``, ascending, and eigenvectors of a batch ``(k, n, n)``.

    Args:
      matrices: Positive semidefinite.
      start: About the leading eigenvectors, ``(k, n, r)``; None for all of them.

    Returns:
      The eigenpairs, negative values of rounding replaced by zero.
    """
    trace = jnp.trace(matrices, axis1=-2, axis2=-1)[:, None, None]
    scaled_down = safe_divide(matrices, trace)
    if start is None:
        values, vectors = jnp.linalg.eigh(scaled_down)
    else:
        # Random directions beside the old ones find what is new.
        noise = jax.random.normal(jax.random.key(0), start.shape[1:], start.dtype)
        norm = jnp.sqrt(jnp.sum(start**2, (-2, -1), keepdims=True))
        basis = safe_divide(start, norm) + 0.1 / noise.size**0.5 * noise
        for _ in range(_POWER_STEPS):
            basis = jnp.linalg.qr(matmul(scaled_down, basis))[0]
        small = matmul(basis.mT, matmul(scaled_down, basis))
        values, rotation = jnp.linalg.eigh(small)
        vectors = matmul(basis, rotation)
    return jnp.maximum(values, 0) * trace[..., 0], vectors


def solve_low_rank(spectra: LayerSpectra, damping: Array, b: Array) -> Array:
    r"""Returns ``(A + αI)⁻¹ b (G + βI)⁻¹`` with the kept eigenpairs.

    Args:
      spectra: The eigenpairs.
      damping: The scalar ``γ = αβ``.
      b: The right-hand side, shape ``(*stack, n_in, n_out)``.

    Returns:
      The solution, like ``b``.
    """
    a, g = spectra
    alpha, beta = split_damping(a.trace, g.trace, b.shape[-2:], damping)
    a_share = a.values / (a.values + alpha[..., None])
    g_share = g.values / (g.values + beta[..., None])
    # x αβ = (I - V_a s_a V_aᵀ) b (I - V_g s_g V_gᵀ), in one product of rank 2r.
    left = matmul(a.vectors.mT, b)
    right = matmul(b, g.vectors) * g_share[..., None, :]
    both = matmul(left, g.vectors) * g_share[..., None, :]
    left = a_share[..., None] * (left - matmul(both, g.vectors.mT))
    columns = jnp.concatenate([a.vectors, right], -1)
    rows = jnp.concatenate([left, g.vectors.mT], -2)
    return (b - matmul(columns, rows)) / (alpha * beta)[..., None, None]


def _count(x: Array) -> int:
    """The matrices in a stack."""
    count = 1
    for size in x.shape[:-2]:
        count *= size
    return count


def _padded(x: Array, rows: int, columns: int) -> Array:
    """Returns ``(k, rows, columns)``, zero beyond the matrices."""
    flat = x.reshape(-1, *x.shape[-2:])
    pad = (rows - x.shape[-2], columns - x.shape[-1])
    return jnp.pad(flat, ((0, 0), (0, pad[0]), (0, pad[1])))
