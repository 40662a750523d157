"""A debugging aid: do the captured rows add up to the gradient?"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.curvature.single_pass import value_and_grad
from optax_cgfac.layers.layer import leaves_from_matrix
from optax_cgfac.operators.rows import transpose_times
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """Relative errors of gradients rebuilt from rows; larger ones are mismatches.

    Attributes:
      errors: By parameter, the norm of the difference over that of the gradient.
      uncovered: Parameters without rows, with the reason.
      rtol: Larger errors are mismatches.
    """

    errors: Mapping[str, float]
    uncovered: Mapping[str, str]
    rtol: float

    @property
    def mismatches(self) -> tuple[str, ...]:
        """Parameters whose rows do not add up to their gradient."""
        # Every comparison with NaN is false.
        return tuple(p for p, e in self.errors.items() if not e <= self.rtol)

    def __str__(self) -> str:
        """Returns a line per parameter."""
        lines = [
            f"{path}: {'MISMATCH' if path in self.mismatches else 'ok'}, {error:.1e}"
            for path, error in self.errors.items()
        ]
        lines += [f"{path}: uncovered, {why}" for path, why in self.uncovered.items()]
        return "\n".join(lines)


def check_gradients(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    rtol: float = 1e-3,
    **options: Any,
) -> GradientCheck:
    """Rebuilds every gradient from the captured rows and compares.

    ``aᵀ g / N`` must be the gradient of the mean loss. It is not if the loss depends on
    a parameter in another way than through its layer, such as by weights that are
    normalised, masked, regularised or transformed.

    Args:
      loss_fn: As in `value_and_grad`.
      params: The parameters.
      *args: Further arguments of ``loss_fn``.
      rtol: Larger errors are mismatches; use more in half precision.
      **options: As in `value_and_grad`.

    Returns:
      A report to print. Its ``mismatches`` are the names of the parameters whose rows
      do not add up to their gradient.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model = nn.Dense(2)
      >>> x = jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, decay):
      ...     fit = jnp.mean(jnp.sum(model.apply({"params": params}, x) ** 2, -1))
      ...     return fit + decay * jnp.sum(params["kernel"] ** 2)
      >>> check_gradients(loss_fn, params, 0.0).mismatches
      ()
      >>> check_gradients(loss_fn, params, 1.0).mismatches
      ('kernel',)
    """
    options = {"fallback": True} | options
    run = value_and_grad(loss_fn, **options)
    # A loss may change the state of a module, a check may not.
    params = nnx.clone(params) if isinstance(params, nnx.Module) else params
    _, grads, curvature = run(params, *args)
    found = gradient_errors(grads, curvature, options.get("loss_reduction", "mean"))
    errors = {name: float(error) for name, error in found.items()}
    uncovered = {text(path): reason for path, reason in curvature.spec.uncovered}
    return GradientCheck(errors, uncovered, rtol)


# Errors are relative to at least this fraction of the sum of the terms' magnitudes: a
# gradient that cancels (a bias before a softmax over keys, or before a BatchNorm) is
# rounding alone, in proportion to its terms.
_CANCELLED = 1e-2


def gradient_errors(
    grads: PyTree, curvature: Curvature, reduction: str = "mean"
) -> dict[str, Array]:
    """Returns by parameter the relative error of the gradient rebuilt from rows."""
    leaves = leaves_by_path(grads)
    errors = {}
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        scale = curvature.spec.examples if reduction == "mean" else 1
        like = {path: leaves[path] for path in tag.leaves}
        rebuilt, terms = (
            leaves_from_matrix(tag, transpose_times(x.a, x.g) / scale, like)
            for x in (rows, jax.tree.map(jnp.abs, rows))
        )
        for path, gradient in like.items():
            size = jnp.maximum(_norm(gradient), _CANCELLED * _norm(terms[path]))
            difference = _norm(rebuilt[path] - gradient)
            error = difference / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
            errors[text(path)] = jnp.where(difference == 0, 0.0, error)
    return errors


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x.ravel().astype(jnp.promote_types(x.dtype, jnp.float32)))
