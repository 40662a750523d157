r"""The exact Fisher of a layer, or of several together, from rows by example.

The gradient of an example (for one drawn target) is the sum of its rows' outer
products, :math:`d_m = \sum_p a_{mp} g_{mp}ᵀ`. With these ``M`` gradients as the rows of
a matrix ``D``, the Fisher is ``F = s DᵀD``, and a solve needs only the ``M x M`` matrix
``K = DDᵀ``; with one row per example, ``K = (a aᵀ) ∘ (g gᵀ)``.

See Ren & Goldfarb (2019), "Efficient subsampled Gauss-Newton and natural gradient
methods for training neural networks", section 3.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from optax_cgfac.operators.kronecker import check_matrix
from optax_cgfac.operators.rows import (
    Rows,
    StackedRows,
    cross_gram,
    num_features,
    num_rows,
    per_example,
    split_rows,
    times,
    to_dense,
    transpose_times,
)
from optax_cgfac.utils.linalg import matmul
from optax_cgfac.utils.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockFisherOperator:
    """The exact Fisher block ``s Σ_m vec(d_m) vec(d_m)ᵀ`` of a layer.

    Attributes:
      a: Input activations, shape ``(*stack, R, n_in)``, rows of an example adjacent.
      g: Output cotangents, shape ``(*stack, R, n_out)``.
      num_samples: ``M``, the number of gradients; ``R`` with one row per example.
      scale: ``s``; ``1/M`` for a mean.

    Example:
      >>> import jax.numpy as jnp
      >>> a, g = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> print(BlockFisherOperator(a, g, num_samples=1).to_dense())
      [[1. 2.]
       [2. 4.]]
    """

    a: Rows
    g: Array
    num_samples: int = dataclasses.field(metadata={"static": True})
    scale: Array | float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix ``(n_in, n_out)`` of one layer."""
        return num_features(self.a), num_features(self.g)

    def matvec(self, vector: Array) -> Array:
        """Returns ``F V`` for ``V`` of shape ``(*stack, n_in, n_out)``."""
        return self._scaled(self.lift(self.project(vector)))

    def diagonal(self) -> Array:
        """Returns the diagonal as a matrix of shape ``(*stack, n_in, n_out)``."""
        return self._scaled(jnp.sum(self.sample_gradients() ** 2, -3))

    def trace(self) -> Array:
        """Returns ``tr F``, of shape ``stack``."""
        return self._scaled(jnp.trace(self.gram(), axis1=-2, axis2=-1))

    def to_dense(self) -> Array:
        """Returns the matrix acting on row-major ``V``; for small layers only."""
        gradients = self.sample_gradients()
        flat = gradients.reshape(*gradients.shape[:-2], -1)
        return self._scaled(matmul(flat.mT, flat))

    def project(self, vector: Array) -> Array:
        """Returns ``D V``, the inner products with the gradients, ``(*stack, M)``."""
        check_matrix(self, vector, *self.shape)
        return sum(
            jnp.sum(times(a, vector) * g, -1).reshape(*g.shape[:-2], -1, count).sum(-1)
            for a, g, count in self._parts()
        )  # pyright: ignore[reportReturnType]

    def lift(self, coefficients: Array) -> Array:
        """Returns ``Dᵀ z``, shape ``(*stack, n_in, n_out)``; ``z`` may lack a stack."""
        return sum(
            transpose_times(a, jnp.repeat(coefficients, count, -1)[..., None] * g)
            for a, g, count in self._parts()
        )  # pyright: ignore[reportReturnType]

    def gram(self) -> Array:
        """Returns ``K = D Dᵀ``, shape ``(*stack, M, M)``, without forming ``D``."""
        if self.g.ndim > 2:
            return jax.vmap(
                lambda a, g: BlockFisherOperator(a, g, self.num_samples).gram()
            )(self.a, self.g)
        total = jnp.zeros((self.num_samples, self.num_samples), self.g.dtype)
        for one, other in itertools.product(self._parts(), repeat=2):
            total += _sample_products(*one, *other)
        return total

    def sample_gradients(self) -> Array:
        """Returns the gradients ``d_m``, shape ``(*stack, M, n_in, n_out)``."""
        outer = functools.partial(
            jnp.einsum, "...pi,...po->...io", precision=jax.lax.Precision.HIGHEST
        )
        return sum(
            outer(per_example(to_dense(a), count), per_example(g, count))
            for a, g, count in self._parts()
        )  # pyright: ignore[reportReturnType]

    def _parts(self) -> Iterator[tuple[Rows, Array, int]]:
        """Yields rows of one form, and how many of them one gradient has."""
        one_form = [self.a]
        if isinstance(self.a, StackedRows):
            one_form = [self.a.top, self.a.bottom]
        for a, g in zip(one_form, split_rows(self.a, self.g), strict=True):
            yield a, g, num_rows(a) // self.num_samples

    def _scaled(self, x: Array) -> Array:
        return x * jnp.asarray(self.scale, x.dtype)


def _sample_products(
    a: Rows, g: Array, count: int, other_a: Rows, other_g: Array, other_count: int
) -> Array:
    """Inner products of gradients, ``(M, M)``, from blocks of rows."""
    if count == other_count == 1:
        return cross_gram(a, other_a) * cross_gram(g, other_g)

    # All at once would need memory quadratic in the number of rows.
    def of_one(rows: tuple[Rows, Array]) -> Array:
        products = cross_gram(rows[0], other_a) * cross_gram(rows[1], other_g)
        return jnp.sum(products.reshape(count, -1, other_count), (0, 2))

    return jax.lax.map(of_one, (per_example(a, count), per_example(g, count)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullFisherOperator:
    """The Fisher of several layers together, with the blocks between them.

    It acts on a list of matrices, one per layer in the order of ``curvature.tags``.

    Attributes:
      blocks: Their own blocks, with equal ``num_samples`` and ``scale``.

    Example:
      >>> import jax.numpy as jnp
      >>> row = jnp.array([[1.0]])
      >>> block = BlockFisherOperator(row, row, num_samples=1)
      >>> print(FullFisherOperator((block, block)).to_dense())
      [[1. 1.]
       [1. 1.]]
    """

    blocks: tuple[BlockFisherOperator, ...]

    @property
    def scale(self) -> Array | float:
        """The common scale ``s``."""
        return self.blocks[0].scale

    def matvec(self, vector: Sequence[Array]) -> list[Array]:
        """Returns ``F V``, like ``vector``."""
        images = self.lift(self.project(vector))
        return [x * jnp.asarray(self.scale, x.dtype) for x in images]

    def diagonal(self) -> list[Array]:
        """Returns the diagonal, a matrix for each layer."""
        return [block.diagonal() for block in self.blocks]

    def trace(self) -> Array:
        """Returns ``tr F``."""
        return jnp.sum(jnp.stack([jnp.sum(block.trace()) for block in self.blocks]))

    def to_dense(self) -> Array:
        """Returns the matrix acting on the concatenated row-major matrices."""
        flat = [jnp.moveaxis(block.sample_gradients(), -3, 0) for block in self.blocks]
        rows = jnp.concatenate([x.reshape(x.shape[0], -1) for x in flat], -1)
        return matmul(rows.T, rows) * jnp.asarray(self.scale, rows.dtype)

    def project(self, vector: Sequence[Array]) -> Array:
        """Returns ``D V``, shape ``(M,)``, for a matrix per layer."""
        return sum(
            _over_stack(block.project(v), 1)
            for block, v in zip(self.blocks, vector, strict=True)
        )  # pyright: ignore[reportReturnType]

    def lift(self, coefficients: Array) -> list[Array]:
        """Returns ``Dᵀ z``, a matrix for each layer."""
        return [block.lift(coefficients) for block in self.blocks]

    def gram(self) -> Array:
        """Returns ``K``, the sum of the layers' own."""
        return sum(_over_stack(block.gram(), 2) for block in self.blocks)  # pyright: ignore[reportReturnType]


def _over_stack(x: Array, ndim: int) -> Array:
    return jnp.sum(x, tuple(range(x.ndim - ndim)))
