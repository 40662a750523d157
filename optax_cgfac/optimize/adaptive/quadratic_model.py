r"""The quadratic model of the loss that picks step size and momentum.

For ``δ = α Δ + μ δ₀``, with ``Δ`` the preconditioned descent direction and ``δ₀``
the previous update,

.. math:: M(δ) = ½ δᵀ (F + (λ + η) I) δ + ∇hᵀ δ ,

where ``F`` is the exact Gauss-Newton matrix on a few examples, applied through
one Jacobian-vector product each for ``Δ`` and ``δ₀`` (Martens & Grosse 2015,
section 7). Computed from the captured rows instead, ``M`` is badly wrong: ``Δ``
was fitted to them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.state import Step
from optax_cgfac.utils.arrays import power_of_two, safe_divide, tree_dot
from optax_cgfac.utils.devices import mean_over, with_auto_axes
from optax_cgfac.utils.types import Array, PyTree, user_inputs

# Of a slope: with less curvature a step ends at the sides of its box.
_TINY_CURVATURE = 2.0**-40


class QuadraticModel(NamedTuple):
    """The model restricted to the span of ``Δ`` and ``δ₀``.

    Attributes:
      curvature: ``vᵢᵀ (F + (λ + η) I) vⱼ``, shape ``(2, 2)``.
      undamped: ``vᵢᵀ (F + η I) vⱼ``, shape ``(2, 2)``.
      slope: ``∇hᵀ vᵢ``, shape ``(2,)``.
    """

    curvature: Array
    undamped: Array
    slope: Array


def model_value(slope: Array, matrix: Array, coefficients: Array) -> Array:
    """Returns the quadratic with this slope and matrix at ``Σ cᵢ vᵢ``."""
    return slope @ coefficients + coefficients @ matrix @ coefficients / 2


def gauss_newton_products(
    curvature: Curvature, params: PyTree, directions: Sequence[PyTree]
) -> Array:
    """Returns ``vᵢᵀ F vⱼ``, shape ``(k, k)``, for directions ``vᵢ`` like ``params``.

    ``F`` is the exact Gauss-Newton matrix on the kept examples. The products are in
    float32, or the outputs' precision if higher.
    """
    model_fn, objective = curvature.spec.model_fn, curvature.spec.objective
    if model_fn is None or objective is None:
        raise ValueError(
            "Gauss-Newton products need the curvature of fisher_estimator, which keeps "
            "the model and examples. With value_and_grad pass cgfac(learning_rate=...)."
        )
    returned, push_forward = jax.linearize(
        lambda p: model_fn(p, curvature.model_inputs), params
    )
    outputs = objective.outputs(returned)
    dtype = jnp.result_type(*outputs, jnp.float32)
    outputs = [output.astype(dtype) for output in outputs]
    tangents = [
        [x.astype(dtype) for x in objective.outputs(push_forward(direction))]
        for direction in directions
    ]
    scales = objective.scales(user_inputs(curvature.model_inputs), outputs)
    products = objective.hessian_products(outputs, scales, tangents)
    # Every device has as many examples of its own.
    factor = objective.factor(curvature.spec.batch_size)
    return mean_over(products, objective.axis_name) * factor


def quadratic_model(
    curvature: Curvature,
    params: PyTree,
    slope: Array,
    directions: tuple[PyTree, PyTree],
    *,
    damping: Array,
    l2: float,
) -> QuadraticModel:
    """Builds the model for ``Δ`` and ``δ₀``; the slope contains the ``l2`` term."""
    fisher = with_auto_axes(gauss_newton_products, curvature, params, directions)
    dtype = fisher.dtype
    norms = jnp.array([[tree_dot(u, v) for v in directions] for u in directions])
    norms = norms.astype(dtype)
    undamped = fisher + jnp.asarray(l2, dtype) * norms
    damped = undamped + jnp.asarray(damping, dtype) * norms
    return QuadraticModel(damped, undamped, slope.astype(dtype))


def within_loss(slope: Array, step: Step, value: Array) -> Step:
    """Shortens a step that promises to take away more than the whole loss.

    A loss that is never negative cannot fall by more than its value ``f``. Where a few
    examples dominate the gradient and the model's own examples are fitted already, the
    quadratic model is flat and promises that; as for Polyak's step, the slope along
    the step is then limited to ``2 f``, which a quadratic that ends at zero would have.
    There is no limit where ``f`` is not positive.

    References:
      Polyak (1969), "Minimization of unsmooth functionals".
    """
    promised = -slope @ jnp.stack(step)
    limit = 2 * jnp.asarray(value, promised.dtype)
    is_too_long = (limit > 0) & (promised > limit)
    factor = jnp.where(is_too_long, limit / jnp.where(is_too_long, promised, 1), 1)
    return Step(step.step_size * factor, step.momentum * factor)


def within_promise(step_size: Array, descent: Array, most: Array) -> Array:
    """Shortens a step size that is kept from an earlier direction.

    The curvature along a direction grows with its slope, about as the square: what is
    rare in the captured rows makes both large, and the step size that fitted the last
    direction is too long for this one by as much.

    ``descent`` is ``∇hᵀΔ`` of this direction, ``most`` the largest promise
    ``-α ∇hᵀΔ`` of its step.
    """
    promised = -descent * step_size
    is_too_long = promised > most
    factor = jnp.where(is_too_long, most / jnp.where(is_too_long, promised, 1), 1)
    return step_size * factor


def minimize_in_box(
    model: QuadraticModel, *, min_momentum: float = 0.0, max_momentum: float = 0.95
) -> Step:
    """Returns the step size and momentum that minimize the model in a box.

    Where the Gauss-Newton product is nearly flat along ``δ₀`` the unconstrained
    momentum runs away. A convex quadratic has its minimum over a box inside, or on
    one of the four edges, where it is a clipped one-dimensional minimum. The step is
    zero where the model is not finite.
    """
    finite = jnp.all(jnp.isfinite(model.curvature)) & jnp.all(jnp.isfinite(model.slope))
    # Products of two entries have the range of neither.
    steepest = _TINY_CURVATURE * jnp.max(jnp.abs(model.slope))
    unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(model.curvature)), steepest))
    model = QuadraticModel(*(x / unit for x in model))
    (q11, q12), (_, q22) = model.curvature
    s1, s2 = model.slope
    dtype = q11.dtype

    def best_step_size(momentum: Array) -> Array:
        return jnp.clip(-safe_divide(s1 + q12 * momentum, q11), 0, 1)

    def best_momentum(step_size: Array) -> Array:
        best = -safe_divide(s2 + q12 * step_size, q22)
        return jnp.clip(best, min_momentum, max_momentum)

    determinant = q11 * q22 - q12**2
    # Below rounding the two directions are parallel: the momentum is undefined.
    solvable = determinant > 10 * jnp.finfo(dtype).eps * q11 * q22
    inside = (q12 * s1 - q11 * s2) / jnp.where(solvable, determinant, 1)
    inside = jnp.clip(jnp.where(solvable, inside, 0), min_momentum, max_momentum)
    momenta = (inside, *(jnp.asarray(x, dtype) for x in (min_momentum, max_momentum)))
    steps = [(best_step_size(momentum), momentum) for momentum in momenta]
    ends = jnp.zeros((), dtype), jnp.ones((), dtype)
    steps += [(step_size, best_momentum(step_size)) for step_size in ends]
    candidates = jnp.array(steps)
    value_of = functools.partial(model_value, model.slope, model.curvature)
    values = jax.vmap(value_of)(candidates)
    # The first candidate, the one inside, wins ties.
    step_size, momentum = candidates[jnp.argmin(values)]
    return Step(jnp.where(finite, step_size, 0), jnp.where(finite, momentum, 0))
