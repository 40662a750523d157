"""Linear operators on a layer's matrix: Kronecker factors kept as rows, damped or not.

A layer's parameters are one matrix ``V`` of shape ``(n_in, n_out)``, a bias its last
row. No ``matvec`` forms an ``n_in x n_in`` or ``n_out x n_out`` matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.operators.rows import (
    Rows,
    column_squares,
    num_features,
    squared_norm,
    times,
    to_dense,
    transpose_times,
)
from optax_cgfac.utils.arrays import scaled
from optax_cgfac.utils.linalg import matmul
from optax_cgfac.utils.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerOperator:
    r"""The Kronecker-factored curvature ``A ⊗ G`` of a layer, kept as rows.

    With ``A = a_scale aᵀa`` and ``G = g_scale gᵀg``,

    .. math:: (A ⊗ G)\, V = A V G = a\_scale · g\_scale · aᵀ (a V gᵀ) g .

    With one row and unit scales this is the product ``FV`` of Chen (2021),
    Algorithm 2. Leading axes of ``a`` and ``g``, if any, are stacked layers.

    Attributes:
      a: Input activations, shape ``(*stack, R, n_in)``; one-hot rows as indices.
      g: Output cotangents, shape ``(*stack, R, n_out)``.
      a_scale: Weight of ``aᵀa``, a scalar or of shape ``stack``; ``1/R`` for a mean.
      g_scale: Weight of ``gᵀg``; ``T/R`` where an example has ``T`` positions (expand
        setting of Eschenhagen et al. 2023, section 3.1).

    Example:
      >>> import jax.numpy as jnp
      >>> op = KroneckerOperator(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
      >>> print(op.matvec(jnp.array([[1.0], [1.0]])))
      [[27.]
       [54.]]
    """

    a: Rows
    g: Array
    a_scale: Array | float = 1.0
    g_scale: Array | float = 1.0

    def matvec(self, vector: Array) -> Array:
        """Returns ``A V G`` for ``V`` of shape ``(*stack, n_in, n_out)``."""
        check_matrix(self, vector, num_features(self.a), num_features(self.g))
        weights = matmul(times(self.a, vector), self.g.mT)
        return self._scale(transpose_times(self.a, matmul(weights, self.g)))

    def diagonal(self) -> Array:
        """Returns the diagonal as a matrix of shape ``(*stack, n_in, n_out)``."""
        a, g = column_squares(self.a), column_squares(self.g)
        return self._scale(a[..., :, None] * g[..., None, :])

    def trace(self) -> Array:
        """Returns ``tr A · tr G``, of shape ``stack``."""
        return self._scale(squared_norm(self.a) * squared_norm(self.g))

    def factors(self) -> tuple[Array, Array]:
        """Returns the dense ``A`` and ``G``, for inspection and `scale_by_kfac`."""
        dense = to_dense(self.a)
        a = scaled(matmul(dense.mT, dense), self.a_scale)
        g = scaled(matmul(self.g.mT, self.g), self.g_scale)
        return a, g

    def to_dense(self) -> Array:
        """Returns the matrix acting on row-major ``V``; for small layers only."""
        return _kron(*self.factors())

    def _scale(self, x: Array) -> Array:
        return scaled(x, self.a_scale * self.g_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DampedOperator:
    """``F + γ I`` (Tikhonov damping) for an operator ``F``.

    Attributes:
      operator: The undamped operator ``F``.
      damping: The scalar ``γ``.

    Example:
      >>> import jax.numpy as jnp
      >>> kronecker = KroneckerOperator(jnp.array([[1.0]]), jnp.array([[2.0]]))
      >>> print(DampedOperator(kronecker, 0.5).matvec(jnp.ones((1, 1))))
      [[4.5]]
    """

    operator: Any
    damping: Array | float

    def matvec(self, vector: Array) -> Array:
        """Returns ``F V + γ V``."""
        image = self.operator.matvec(vector)
        return jax.tree.map(lambda y, x: y + self._damping(x) * x, image, vector)

    def diagonal(self) -> Array:
        """Returns the diagonal of ``F`` plus ``γ``."""
        return jax.tree.map(lambda x: x + self._damping(x), self.operator.diagonal())

    def trace(self) -> Array:
        """Returns ``tr F + γ n`` with ``n`` the number of parameters."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.operator.diagonal()))
        trace = self.operator.trace()
        return trace + self._damping(trace) * (size // max(trace.size, 1))

    def to_dense(self) -> Array:
        """Returns the dense ``F + γ I``."""
        dense = self.operator.to_dense()
        identity = jnp.eye(dense.shape[-1], dtype=dense.dtype)
        return dense + self._damping(dense) * identity

    def _damping(self, like: Array) -> Array:
        return jnp.asarray(self.damping, like.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredDampedOperator:
    """``(A + αI) ⊗ (G + βI)`` (Martens & Grosse 2015, section 6.3).

    Attributes:
      operator: The undamped ``A ⊗ G``.
      a_damping: The scalar ``α`` (shape ``stack`` for stacked layers).
      g_damping: The scalar ``β``.

    Example:
      >>> import jax.numpy as jnp
      >>> kronecker = KroneckerOperator(jnp.array([[1.0]]), jnp.array([[2.0]]))
      >>> op = FactoredDampedOperator(kronecker, jnp.array(1.0), jnp.array(0.5))
      >>> print(op.matvec(jnp.ones((1, 1))))
      [[9.]]
    """

    operator: KroneckerOperator
    a_damping: Array
    g_damping: Array

    def matvec(self, vector: Array) -> Array:
        """Returns ``(A + αI) V (G + βI)``."""
        op = self.operator
        check_matrix(op, vector, num_features(op.a), num_features(op.g))
        left = transpose_times(op.a, times(op.a, vector))
        left = scaled(left, op.a_scale) + scaled(vector, self.a_damping)
        if op.g.shape[-1] <= op.g.shape[-2]:
            right = matmul(left, matmul(op.g.mT, op.g))
        else:
            right = matmul(matmul(left, op.g.mT), op.g)
        return scaled(right, op.g_scale) + scaled(left, self.g_damping)

    def diagonal(self) -> Array:
        """Returns the diagonal as a matrix of shape ``(*stack, n_in, n_out)``."""
        op = self.operator
        a = scaled(column_squares(op.a), op.a_scale) + self.a_damping[..., None]
        g = scaled(column_squares(op.g), op.g_scale) + self.g_damping[..., None]
        return a[..., :, None] * g[..., None, :]

    def trace(self) -> Array:
        """Returns ``tr(A + αI) · tr(G + βI)``."""
        return jnp.sum(self.diagonal(), (-2, -1))

    def to_dense(self) -> Array:
        """Returns the matrix acting on row-major ``V``; for small layers only."""
        a, g = self.operator.factors()
        a = a + self.a_damping[..., None, None] * jnp.eye(a.shape[-1], dtype=a.dtype)
        g = g + self.g_damping[..., None, None] * jnp.eye(g.shape[-1], dtype=g.dtype)
        return _kron(a, g)


def _kron(a: Array, g: Array) -> Array:
    dense = jnp.einsum("...ij,...kl->...ikjl", a, g)
    size = a.shape[-1] * g.shape[-1]
    return dense.reshape(*a.shape[:-2], size, size)


def check_matrix(operator: object, vector: Array, n_in: int, n_out: int) -> None:
    """Checks that an operator is applied to a matrix of its layer."""
    if jnp.shape(vector)[-2:] != (n_in, n_out):
        raise ValueError(
            f"{type(operator).__name__} acts on the layer's parameters as one matrix, "
            "a bias its last row.\n"
            f"  expected: (..., {n_in}, {n_out})\n  got:      {jnp.shape(vector)}\n"
            "Pass jnp.concatenate([kernel.reshape(-1, n_out), bias[None]])."
        )
