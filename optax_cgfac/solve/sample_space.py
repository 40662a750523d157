r"""The iterates of Algorithm 2 in sample space: coefficients instead of parameters.

Every vector of the Krylov space of ``F + γI`` with ``F V = s aᵀ(a V gᵀ)g`` and
start ``x₀`` lies in ``span{d} + {aᵀ Θ g}``, where ``d = b - γ x₀``. The pair
``(c, Θ)``, a scalar and an ``R x R`` matrix, stands for ``c d + aᵀ Θ g``. With
``K_a = a aᵀ``, ``K_g = g gᵀ`` and ``T = a d gᵀ``,

.. math::
  (F + γI)(c, Θ) &= (γ c,\; γ Θ + s (c T + K_a Θ K_g)) \\
  ⟨(c,Θ), (e,Φ)⟩ &= c e ‖d‖² + c⟨T,Φ⟩ + e⟨T,Θ⟩ + ⟨Θ, K_a Φ K_g⟩ .

An iteration costs ``4R³`` flops instead of the ``8Rn`` of parameter space (the
idea of Ren & Goldfarb 2019, section 3, carried from a direct solve to CG).

Attainable accuracy: the inner product of a small vector is a difference of terms of the
size of ``‖d‖²``, so that residuals below about ``√eps ‖d‖`` are rounding. No step is
taken on such numbers, and the solve ends as `StopReason.STAGNATED`; solve in parameter
space, or directly, where a smaller tolerance is needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.operators.exact_fisher import BlockFisherOperator, FullFisherOperator
from optax_cgfac.operators.kronecker import KroneckerOperator
from optax_cgfac.operators.rows import gram, times, transpose_times
from optax_cgfac.solve.cg import Space, iterate
from optax_cgfac.solve.info import CGInfo, direct_info
from optax_cgfac.utils.arrays import tree_dot, tree_dtype
from optax_cgfac.utils.linalg import matmul, spd_inverses, tiny_shift
from optax_cgfac.utils.types import Array, PyTree

# Rounding errors of an inner product in units of eps times the sum of its terms'
# magnitudes. Each term is a sum of R² products, and the products with the Gram matrices
# are rounded too.
_ROUNDING = 8.0


class _Coefficients(NamedTuple):
    """The vector ``c d + aᵀ Θ g``.

    ``q = K_a Θ K_g`` travels along by the recurrences of CG, so that an
    iteration needs one such product, not one for the operator and one for the
    inner product.
    """

    c: Array
    theta: Array
    q: Array


def cg_on_rows(
    operator: KroneckerOperator,
    damping: Array | float,
    b: Array,
    x0: Array | None = None,
    *,
    max_steps: int | Array,
    rtol: float | Array = 1e-5,
    doubts_start: bool = False,
) -> tuple[Array, CGInfo]:
    """Solves ``(A ⊗ G + γI) x = b`` with the iterates of `conjugate_gradient`.

    ``operator`` has rows of shapes ``(R, n_in)`` and ``(R, n_out)``; ``b`` and ``x0``
    have shape ``(n_in, n_out)``. With ``doubts_start`` a start that is worse than zero
    is not used.
    """
    a, g = operator.a, operator.g
    a_gram, g_gram = gram(a), gram(g)
    space = SampleSpace(
        project=lambda matrix: matmul(times(a, matrix), g.mT),
        gram=lambda theta: matmul(matmul(a_gram, theta), g_gram),
        lift=lambda theta: transpose_times(a, matmul(theta, g)),
        scale=operator.a_scale * operator.g_scale,
    )
    limits = {"max_steps": max_steps, "rtol": rtol, "doubts_start": doubts_start}
    return cg_in_sample_space(space, damping, b, x0, **limits)


class SampleSpace(NamedTuple):
    """The samples, rows of a matrix ``D``, that span ``F = s DᵀD``."""

    project: Callable[[PyTree], Array]  # V -> D V
    gram: Callable[[Array], Array]  # θ -> D Dᵀ θ
    lift: Callable[[Array], PyTree]  # θ -> Dᵀ θ
    scale: Array | float  # s


def cg_in_sample_space(
    space: SampleSpace,
    damping: Array | float,
    b: PyTree,
    x0: PyTree | None = None,
    *,
    max_steps: int | Array,
    rtol: float | Array = 1e-5,
    doubts_start: bool = False,
) -> tuple[PyTree, CGInfo]:
    """Solves ``(F + γI) x = b`` on coefficients of the samples; see `cg_on_rows`."""
    dtype = tree_dtype(b)
    damping = jnp.asarray(damping, dtype)
    s = jnp.asarray(space.scale, dtype)
    one = jnp.ones((), dtype)
    if x0 is None:
        d, t = b, space.project(b)
        theta = jnp.zeros_like(t)
        residual = _Coefficients(one, theta, theta)
    else:
        t0 = space.project(x0)
        if doubts_start:
            # ½ x₀ᵀ(F + γI)x₀ - bᵀx₀; a number that is not finite compares false.
            square = s * jnp.sum(t0 * t0) + damping * tree_dot(x0, x0)
            helps = square / 2 <= tree_dot(b, x0)
            x0 = jax.tree.map(lambda x: jnp.where(helps, x, 0), x0)
            t0 = jnp.where(helps, t0, 0)
        d = jax.tree.map(lambda b, x: b - damping * x, b, x0)
        t = space.project(b) - damping * t0
        residual = _Coefficients(one, -s * t0, -s * space.gram(t0))

    def matvec(vector: _Coefficients) -> _Coefficients:
        image = vector.c * t + vector.q
        return _Coefficients(
            damping * vector.c,
            damping * vector.theta + s * image,
            damping * vector.q + s * space.gram(image),
        )

    def recompute(x: _Coefficients) -> tuple[_Coefficients, _Coefficients]:
        # The coefficients are the solution, and what travelled along is computed anew.
        c, theta = x.c, x.theta
        q = space.gram(theta)
        left = residual.theta - damping * theta - s * (c * t + q)
        return _Coefficients(c, theta, q), _Coefficients(
            residual.c - damping * c, left, space.gram(left)
        )

    zeros = jnp.zeros_like(t)
    end = iterate(
        _inner_product(matvec, t, tree_dot(d, d)),
        _Coefficients(jnp.zeros((), dtype), zeros, zeros),
        residual,
        recompute,
        squared_tolerance=(jnp.asarray(rtol) ** 2 * tree_dot(b, b)).astype(dtype),
        max_steps=max_steps,
    )
    back = space.lift(end.x.theta)
    x = jax.tree.map(lambda d, back: end.x.c * d + back, d, back)
    x = x if x0 is None else jax.tree.map(jnp.add, x0, x)
    return x, end.info()


def _inner_product(
    matvec: Callable[[_Coefficients], _Coefficients], t: Array, d_squared: Array
) -> Space:
    """Returns the operator with the inner product of the coefficients."""
    dtype = t.dtype

    def terms(x: _Coefficients, y: _Coefficients) -> tuple[Array, ...]:
        return (
            x.c * y.c * d_squared,
            x.c * jnp.sum(t * y.theta),
            y.c * jnp.sum(t * x.theta),
            jnp.sum(x.theta * y.q),
        )

    def dot(x: _Coefficients, y: _Coefficients) -> Array:
        return sum(terms(x, y), start=jnp.zeros((), dtype))

    def rounding(x: _Coefficients, y: _Coefficients) -> Array:
        sizes = [jnp.abs(term) for term in terms(x, y)]
        return _ROUNDING * jnp.finfo(dtype).eps * sum(sizes, start=jnp.zeros((), dtype))

    return Space(matvec, dot, rounding=rounding)


def solve_among_samples(
    operator: BlockFisherOperator | FullFisherOperator,
    damping: Array,
    b: PyTree,
    x0: PyTree | None,
    *,
    direct: bool,
    max_steps: int | Array,
    rtol: float | Array,
) -> tuple[PyTree, CGInfo]:
    """Solves ``(s DᵀD + γI) x = b`` for the samples ``D`` of one layer or of several.

    ``b`` and ``x0`` are a matrix, or one for each layer. A direct solve factorises the
    ``M x M`` Gram matrix; an iteration of CG takes ``M²`` operations.
    """
    k = operator.gram()
    if not direct:
        space = SampleSpace(
            operator.project,
            lambda z: matmul(k, z[:, None])[:, 0],
            operator.lift,
            operator.scale,
        )
        limits = {"max_steps": max_steps, "rtol": rtol, "doubts_start": True}
        return cg_in_sample_space(space, damping, b, x0, **limits)
    scaled = k * jnp.asarray(operator.scale, k.dtype)
    damping = jnp.maximum(damping, tiny_shift(jnp.trace(scaled)))
    system = scaled + damping * jnp.eye(len(k), dtype=k.dtype)
    z = matmul(spd_inverses([system])[0], operator.project(b)[:, None])[:, 0]
    back = operator.lift(z * jnp.asarray(operator.scale, z.dtype))
    x = jax.tree.map(lambda b, back: (b - back) / damping, b, back)
    return x, direct_info(k.dtype)
