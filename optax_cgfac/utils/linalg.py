"""Dense linear algebra in full precision: products, inverses, orthonormal bases."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.utils.types import Array

# Accelerators round the operands of float32 products to tf32 or bfloat16 by
# default. Curvature solves divide by small eigenvalues of these products, so
# they need every bit; on CPUs the flag changes nothing.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def tiny_shift(trace: Array) -> Array:
    """Returns the smallest diagonal shift that keeps a Gram matrix definite."""
    # Rounding perturbs the eigenvalues of a Gram matrix of trace t by about eps t, so a
    # Cholesky factorisation with a smaller shift may meet a negative pivot (Higham,
    # "Accuracy and Stability of Numerical Algorithms", section 10.1.1); 10 covers the
    # constants of that bound. The floor for a zero trace has a finite inverse and lies
    # far below the curvature of any loss.
    dtype = trace.dtype
    return jnp.maximum(
        10 * jnp.finfo(dtype).eps * trace, float(jnp.finfo(dtype).tiny) ** 0.75
    )


# Sizes are padded to a multiple of this, so that most layers share one batch; the
# unblocked factorisation runs on matrices of this size or an eighth of the whole.
_BLOCK = 32


def spd_inverses(matrices: Sequence[Array]) -> list[Array]:
    """Returns the inverses of positive definite matrices, or non-finite ones."""
    # Matrices of about the same size are inverted as one batch, far faster on every
    # backend than one after the other.
    groups: dict[tuple[int, jnp.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        size = -(-matrix.shape[-1] // _BLOCK) * _BLOCK
        groups.setdefault((size, matrix.dtype), []).append(index)
    inverses: dict[int, Array] = {}
    for (size, _), members in groups.items():
        padded = [_pad_with_identity(matrices[index], size) for index in members]
        # On CPUs XLA calls LAPACK, whose threads and XLA's own wait for each other.
        batch = jax.lax.platform_dependent(
            jnp.concatenate(padded), cpu=blocked_inverse, default=cholesky_inverse
        )
        start = 0
        for index, members_batch in zip(members, padded, strict=True):
            shape, count = matrices[index].shape, members_batch.shape[0]
            inverse = batch[start : start + count, : shape[-1], : shape[-1]]
            inverses[index] = inverse.reshape(shape)
            start += count
    return [inverses[index] for index in range(len(matrices))]


def cholesky_inverse(matrices: Array) -> Array:
    """Inverts a batch ``(k, n, n)`` with the backend's own factorisation."""
    identity = jnp.broadcast_to(
        jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape
    )
    factor = jnp.linalg.cholesky(matrices)
    inverse = jax.lax.linalg.triangular_solve(
        factor, identity, left_side=True, lower=True
    )
    return matmul(inverse.mT, inverse)


def blocked_inverse(matrices: Array) -> Array:
    """Inverts a batch ``(k, n, n)`` by a blocked Cholesky factorisation in XLA."""
    # Nearly all of the work is matrix products, and it is as stable as the unblocked
    # factorisation (Higham, section 13.2).
    inverse = _inverse_factor(matrices, max(_BLOCK, matrices.shape[-1] // 8))
    return matmul(inverse.mT, inverse)


def _inverse_factor(matrices: Array, block: int) -> Array:
    """Returns ``L⁻¹`` for ``matrices = L Lᵀ``."""
    size = matrices.shape[-1]
    if size <= block:
        return _eliminate(matrices)
    half = size // 2
    first = _inverse_factor(matrices[..., :half, :half], block)
    below = matmul(matrices[..., half:, :half], first.mT)
    rest = matrices[..., half:, half:] - matmul(below, below.mT)
    second = _inverse_factor(rest, block)
    corner = -matmul(second, matmul(below, first))
    return jnp.block([[first, jnp.zeros_like(corner.mT)], [corner, second]])


def _eliminate(matrices: Array) -> Array:
    """Returns ``L⁻¹`` by elimination on ``[matrix, identity]``, a row at a time."""
    size = matrices.shape[-1]
    rows = jnp.arange(size)[:, None]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), matrices.shape)

    def body(j: Array, augmented: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(augmented, j, -2)
        column = jax.lax.dynamic_index_in_dim(augmented, j, -1)
        scale = jax.lax.rsqrt(jax.lax.dynamic_index_in_dim(column, j, -2))
        row = row * scale
        below = jnp.where(rows > j, column * scale, 0)
        return jnp.where(rows == j, row, augmented - below * row)

    augmented = jnp.concatenate([matrices, identity], -1)
    return jax.lax.fori_loop(0, size, body, augmented)[..., size:]


def _pad_with_identity(matrix: Array, size: int) -> Array:
    """Returns ``(k, size, size)`` with ones on the diagonal beyond the matrix."""
    pad = size - matrix.shape[-1]
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    padded = jnp.pad(flat, ((0, 0), (0, pad), (0, pad)))
    ones = jnp.where(jnp.arange(size) >= matrix.shape[-1], 1, 0)
    return padded + jnp.diag(ones.astype(matrix.dtype))


def orthonormal(matrices: Array) -> Array:
    """Returns orthonormal bases of the columns of a batch ``(k, m, n)``, ``m >= n``."""
    # GPU libraries factorise the matrices of a batch one after the other, by
    # Householder reflections, which are slow there.
    return jax.lax.platform_dependent(
        matrices,
        cpu=lambda x: over_batch(lambda y: jnp.linalg.qr(y)[0], x),
        default=cholesky_qr,
    )


def cholesky_qr(matrices: Array) -> Array:
    """Orthonormalizes the columns of a batch ``(k, m, n)`` by Cholesky factorisations.

    Three rounds, each with a shift that keeps the matrix definite: ``QᵀQ ≤ I`` always,
    and columns that depend on others come out shorter than one, where `jnp.linalg.qr`
    makes up directions. Fukaya et al. (2020), "Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices", algorithm 4.2, with the shift of its
    first round in all three.
    """
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    for _ in range(3):
        gram = matmul(matrices.mT, matrices)
        # From the largest entry, not the trace: the last shift shortens the columns.
        shift = tiny_shift(jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), -1))
        factor = jnp.linalg.cholesky(gram + shift[..., None, None] * identity)
        matrices = jax.lax.linalg.triangular_solve(
            factor, matrices, left_side=False, lower=True, transpose_a=True
        )
    return matrices


def over_batch(function: Callable[[Array], Any], matrices: Array) -> Any:
    """Calls a LAPACK function, such as `jnp.linalg.eigh`, on a batch ``(k, m, n)``."""
    # All CPU devices of a process share the threads in which XLA works on a batch, and
    # wait inside them: several devices at once wait for ever (seen with 8 devices on 2
    # cores, jaxlib 0.10.2). One matrix at a time needs no threads.
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        return jax.lax.map(function, matrices)
    return function(matrices)
