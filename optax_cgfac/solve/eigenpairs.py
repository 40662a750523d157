r"""Leading eigenpairs of the Kronecker factors, and solves with them.

With orthonormal columns ``V``, eigenvalues ``λ`` and everything else of a factor taken
for zero,

.. math:: (A + αI)^{-1} ≈ \frac1α\Big(I - V \frac{λ}{λ + α} Vᵀ\Big).

Activations and cotangents have a few large eigenvalues and many that are small against
the damping, where the approximation changes nothing. It costs ``2r`` multiplications
for each entry of a layer's matrix and side instead of ``2R``, takes any damping without
a factorisation, and may be a few updates old.

The eigenpairs come from subspace iteration, warm-started with the previous ones
(Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithm 4.4),
on the Gram matrix ``a aᵀ``, whose size is the window's whatever the features are. Of a
factor with at most as many features as the rank they all come from ``aᵀ a`` itself.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.operators.kronecker import KroneckerOperator
from optax_cgfac.solve.factored import split_damping
from optax_cgfac.utils.arrays import safe_divide, scaled
from optax_cgfac.utils.linalg import matmul, orthonormal, over_batch
from optax_cgfac.utils.types import Array

# Features of small factors are padded to this, twice this, four times, ... so that
# they share a batch.
_BLOCK = 32

# Products with the factor per refresh; warm-started, one would nearly do.
_POWER_STEPS = 1


class Eigenpairs(NamedTuple):
    """Leading eigenpairs of one factor."""

    vectors: Array  # orthonormal columns, or zero, (*stack, n, r)
    values: Array  # (*stack, r)
    trace: Array  # the whole factor's, stack


class LayerEigenpairs(NamedTuple):
    """Leading eigenpairs of a layer's two factors ``A`` and ``G``."""

    a: Eigenpairs
    g: Eigenpairs

    @property
    def ranks(self) -> tuple[int, int]:
        """How many there are of either."""
        return self.a.values.shape[-1], self.g.values.shape[-1]


def empty_eigenpairs(
    stack: tuple[int, ...], rows: int, n: int, rank: int, dtype: str
) -> Eigenpairs:
    """Returns zeros in the shapes of a factor's eigenpairs."""
    r = min(rank, rows, n)
    return Eigenpairs(
        jnp.zeros((*stack, n, r), dtype),
        jnp.zeros((*stack, r), dtype),
        jnp.zeros(stack, dtype),
    )


class _Side(NamedTuple):
    rows: Array  # (*stack, R, n)
    scale: Array
    old: Eigenpairs


def refresh(
    operators: Sequence[KroneckerOperator], old: Sequence[LayerEigenpairs]
) -> list[LayerEigenpairs]:
    """Computes the leading eigenpairs of many layers' factors.

    All Gram matrices of equally many rows are one batch, and so are all small factors
    of about the same size: a program of few large products compiles faster than one of
    many.
    """
    sides = [
        _Side(rows, jnp.asarray(scale, rows.dtype), spectrum)
        for operator, eigenpairs in zip(operators, old, strict=True)
        for rows, scale, spectrum in (
            (operator.a, operator.a_scale, eigenpairs.a),
            (operator.g, operator.g_scale, eigenpairs.g),
        )
    ]
    groups: dict[tuple[int, int, jnp.dtype], list[int]] = {}
    for index, side in enumerate(sides):
        (count, n), rank = side.rows.shape[-2:], side.old.values.shape[-1]
        width = 0  # unused when we decompose the R×R Gram matrix
        while rank == n > width:
            width = 2 * width or _BLOCK
        groups.setdefault((count, width, side.rows.dtype), []).append(index)
    found: dict[int, Eigenpairs] = {}
    token = jnp.zeros(())
    for (_, width, _), members in groups.items():
        # One after the other, by a dependence that is there for nothing else: XLA's CPU
        # backend runs two batches of LAPACK calls at once, which then wait for each
        # other's threads for ever (seen with jaxlib 0.10.2 on two cores).
        rows = [
            _flat(scaled(sides[i].rows, jnp.sqrt(sides[i].scale)))
            + token.astype(sides[i].rows.dtype)
            for i in members
        ]
        starts = [_flat(sides[i].old.vectors) for i in members]
        eigenpairs = _all_pairs(rows, width) if width else _leading_pairs(rows, starts)
        for i, spectrum in zip(members, eigenpairs, strict=True):
            shapes = zip(spectrum, sides[i].old, strict=True)
            found[i] = Eigenpairs(*(new.reshape(old.shape) for new, old in shapes))
        first = eigenpairs[0]
        token = jnp.minimum(jnp.abs(first.trace[0]), 0) * first.values[0, 0]
        token = jnp.where(jnp.isfinite(token), token, 0)
    return [
        LayerEigenpairs(found[2 * index], found[2 * index + 1])
        for index in range(len(operators))
    ]


def _leading_pairs(rows: Sequence[Array], starts: Sequence[Array]) -> list[Eigenpairs]:
    """Some of the eigenpairs of ``rᵀr`` from the Gram matrices ``r rᵀ``."""
    count, rank = rows[0].shape[1], starts[0].shape[2]
    matrices = jnp.concatenate([matmul(r, r.mT) for r in rows])
    start = None
    if rank < count:
        products = [matmul(r, v) for r, v in zip(rows, starts, strict=True)]
        start = jnp.concatenate(products)
        start = jnp.where(jnp.isfinite(start), start, 0)
    values, vectors = _leading_eigenpairs(matrices, start)
    good = _above_rounding(values, count)
    vectors = vectors * jnp.where(good, jax.lax.rsqrt(values), 0)[:, None, :]
    traces = jnp.trace(matrices, axis1=1, axis2=2)
    eigenpairs, first = [], 0
    for r in rows:
        of_side = slice(first, first + len(r))
        lifted = matmul(r.mT, vectors[of_side])
        eigenpairs.append(Eigenpairs(lifted, values[of_side], traces[of_side]))
        first += len(r)
    return eigenpairs


def _all_pairs(rows: Sequence[Array], width: int) -> list[Eigenpairs]:
    """All eigenpairs of ``rᵀr``, with features padded to ``width``."""
    padded = [jnp.pad(r, ((0, 0), (0, 0), (0, width - r.shape[-1]))) for r in rows]
    matrices = jnp.concatenate([matmul(r.mT, r) for r in padded])
    values, vectors = _leading_eigenpairs(matrices, None)
    good = _above_rounding(values, rows[0].shape[1])
    vectors = jnp.where(good[:, None, :], vectors, 0)
    traces = jnp.trace(matrices, axis1=1, axis2=2)
    eigenpairs, first = [], 0
    for r in rows:
        of_side, n = slice(first, first + len(r)), r.shape[-1]
        pairs = vectors[of_side, :n, -n:], values[of_side, -n:]
        eigenpairs.append(Eigenpairs(*pairs, traces[of_side]))
        first += len(r)
    return eigenpairs


def _above_rounding(values: Array, count: int) -> Array:
    """Whether ascending eigenvalues are more than rounding: others count as zero."""
    return values > jnp.finfo(values.dtype).eps * 10 * count * values[:, -1:]


def _leading_eigenpairs(matrices: Array, start: Array | None) -> tuple[Array, Array]:
    """Eigenvalues ``(k, r)``, ascending, and eigenvectors of a batch ``(k, n, n)``.

    Args:
      matrices: Positive semidefinite.
      start: About the leading eigenvectors, ``(k, n, r)``; None for all of them.
    """
    trace = jnp.trace(matrices, axis1=-2, axis2=-1)[:, None, None]
    scaled_down = safe_divide(matrices, trace)
    if start is None:
        values, vectors = over_batch(jnp.linalg.eigh, scaled_down)
    else:
        # Directions other than the old ones find what is new.
        noise = _scattered(*start.shape[1:]).astype(start.dtype)
        norm = jnp.sqrt(jnp.sum(start**2, (-2, -1), keepdims=True))
        basis = safe_divide(start, norm) + 0.1 / noise.size**0.5 * noise
        for _ in range(_POWER_STEPS):
            basis = orthonormal(matmul(scaled_down, basis))
        small = matmul(basis.mT, matmul(scaled_down, basis))
        values, rotation = over_batch(jnp.linalg.eigh, small)
        vectors = matmul(basis, rotation)
    return jnp.maximum(values, 0) * trace[..., 0], vectors


class SplitDamping(NamedTuple):
    """``α``, ``β`` and ``γ`` of a layer; shape ``stack``.

    ``αβ = γ``, or more where ``γ`` is too small for a factorisation.
    """

    a: Array
    g: Array
    whole: Array


def split_dampings(
    eigenpairs: Sequence[LayerEigenpairs], damping: Array
) -> list[SplitDamping]:
    """Returns every layer's `SplitDamping`, all in one pass over short vectors."""
    if not eigenpairs:
        return []
    traces = [jnp.concatenate([x[i].trace.ravel() for x in eigenpairs]) for i in (0, 1)]
    counts = [x.a.trace.size for x in eigenpairs]
    sizes = [
        np.repeat([x[i].vectors.shape[-2] for x in eigenpairs], counts).astype(t.dtype)
        for i, t in enumerate(traces)
    ]
    alphas, betas = split_damping(traces[0], traces[1], (sizes[0], sizes[1]), damping)
    ends = np.cumsum(counts)[:-1]
    return [
        SplitDamping(
            alpha.reshape(x.a.trace.shape).astype(x.a.trace.dtype),
            beta.reshape(x.g.trace.shape).astype(x.g.trace.dtype),
            jnp.broadcast_to(damping, x.a.trace.shape).astype(x.a.trace.dtype),
        )
        for alpha, beta, x in zip(
            jnp.split(alphas, ends), jnp.split(betas, ends), eigenpairs, strict=True
        )
    ]


def solve_with_eigenpairs(
    eigenpairs: LayerEigenpairs, damping: SplitDamping, blocks: Sequence[Array]
) -> tuple[list[Array], Array]:
    """Returns ``(A + αI)⁻¹ b (G + βI)⁻¹`` with the kept eigenpairs.

    Args:
      eigenpairs: The eigenpairs.
      damping: The layer's ``α`` and ``β``.
      blocks: The blocks of ``b``, shapes ``(*stack, n, n_out)``.

    Returns:
      The blocks of the solution and whether it is finite. If not, the blocks are the
      right-hand side over the damped mean curvature, without what is not finite.
    """
    a, g = eigenpairs
    sizes = a.vectors.shape[-2], g.vectors.shape[-2]
    alpha, beta, gamma = damping
    a_share = a.values / (a.values + alpha[..., None])
    g_share = (g.values / (g.values + beta[..., None]))[..., None, :]
    ends = list(itertools.accumulate(block.shape[-2] for block in blocks))
    parts = jnp.split(a.vectors, ends[:-1], -2)
    # x αβ = (I - V_a s_a V_aᵀ) b (I - V_g s_g V_gᵀ), in one product of rank 2r.
    products = [matmul(v.mT, b) for v, b in zip(parts, blocks, strict=True)]
    left = functools.reduce(jnp.add, products)
    both = matmul(matmul(left, g.vectors) * g_share, g.vectors.mT)
    left = a_share[..., None] * (left - both)
    rows = jnp.concatenate([left, g.vectors.mT], -2)
    # What is not finite in b is not finite in these products either: their squares
    # are one product more, where a look at every entry is several passes. The factor
    # keeps the squares of large numbers finite.
    scale = 1 / (alpha * beta)
    squares = jnp.vdot(left, left * float(jnp.finfo(left.dtype).tiny))
    finite = jnp.isfinite(squares) & jnp.all(jnp.isfinite(scale))
    mean_curvature = a.trace * g.trace / (sizes[0] * sizes[1]) + gamma
    # Without curvature and damping the system is zero, and x is rounding.
    finite &= jnp.all(mean_curvature > 0)
    solution = []
    for v, b in zip(parts, blocks, strict=True):
        columns = jnp.concatenate([v, matmul(b, g.vectors) * g_share], -1)
        x = scaled(b - matmul(columns, rows), scale)
        safe = scaled(b, 1 / mean_curvature)
        safe = jnp.where(jnp.isfinite(safe), safe, 0)
        solution.append(jnp.where(finite & jnp.isfinite(x), x, safe))
    return solution, finite


def _scattered(rows: int, columns: int) -> Array:
    """A fixed matrix of full rank with entries in ``(-1, 1)``.

    A generator of random numbers would do, and takes as long to compile as all else.
    """
    i, j = jnp.arange(rows)[:, None], jnp.arange(columns)
    # Sines whose frequency and phase change from column to column.
    return jnp.sin(2.399963 * (i + 1) * (j + 1) + 0.7 * j**2 + i)


def _flat(x: Array) -> Array:
    """Returns a matrix, or a stack of any dimensions, as a batch of matrices."""
    return x.reshape(-1, *x.shape[-2:])
