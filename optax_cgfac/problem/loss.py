"""Losses with a known Hessian: value, sampling from the model, Hessian products."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    FINITE,
    NOT_NEGATIVE,
    check_function,
    check_number,
    summarize,
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of one output with its Hessian.

    The last axis of the outputs holds one prediction ``z`` (of length ``C``); the
    objective averages over all other axes. ``H(z)`` is the Hessian for one prediction.

    Attributes:
      name: For messages.
      value: ``value(outputs, targets)`` returns the loss of every prediction,
        the shape of ``outputs`` without its last axis.
      sample: ``sample(rng, outputs)`` draws targets such that the gradient of
        ``value`` has mean zero and covariance ``H(z)``.
      hessian_product: ``hessian_product(outputs, tangents)`` returns ``H(z) v``.
      hessian_columns: ``hessian_columns(outputs)`` returns ``B`` with
        ``H = Σ_c B[c] B[c]ᵀ``, shape ``(C, *outputs.shape)``, for ``kind="exact"``.
      weight: A factor of the loss, for outputs of different importance.
      lower_bound: A lower bound of ``value``, such as 0; None if unknown. If it is
        not negative, `cgfac` caps the predicted decrease.

    Example:
      A Poisson regression on log rates: the Hessian of ``exp(z) - t z`` is its rate.

      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> poisson = optax_cgfac.Loss(
      ...     name="poisson",
      ...     value=lambda z, t: jnp.sum(jnp.exp(z) - t * z, -1),
      ...     sample=lambda rng, z: jax.random.poisson(rng, jnp.exp(z)),
      ...     hessian_product=lambda z, v: jnp.exp(z) * v,
      ... )
      >>> print(poisson.value(jnp.zeros((2, 3)), jnp.ones((2, 3))))
      [3. 3.]

      One of Optax's losses, at a tenth of its size:

      >>> optax_cgfac.Loss.named("squared_error", weight=0.1).weight
      0.1
    """

    name: str
    value: Callable[[Array, PyTree], Array]
    sample: Callable[[Array, Array], PyTree]
    hessian_product: Callable[[Array, Array], Array]
    hessian_columns: Callable[[Array], Array] | None = None
    weight: float = 1.0
    lower_bound: float | None = None

    def __post_init__(self):
        """Checks the functions and the numbers."""
        for field, arguments in _FUNCTIONS.items():
            function = getattr(self, field)
            if function is not None or field != "hessian_columns":
                example = f"lambda {', '.join(arguments)}: ..."
                check_function(f"Loss.{field}", function, arguments, example)
        check_number("Loss.weight", self.weight, NOT_NEGATIVE, 0.1)
        if self.lower_bound is not None:
            check_number("Loss.lower_bound", self.lower_bound, FINITE, 0.0)

    @staticmethod
    def named(name: str, weight: float = 1.0) -> "Loss":
        """Returns one of the losses of `fisher_estimator` by its name, weighted."""
        return dataclasses.replace(get_loss(name), weight=weight)


_FUNCTIONS = {
    "value": ["outputs", "targets"],
    "sample": ["rng", "outputs"],
    "hessian_product": ["outputs", "tangents"],
    "hessian_columns": ["outputs"],
}


def _check_targets(name: str, targets: Array, *expected: tuple[int, ...]) -> None:
    # Broadcasting would accept other shapes in silence.
    if jnp.shape(targets) not in expected:
        raise ValueError(
            f"Targets of {name} have shape {jnp.shape(targets)}; expected "
            f"{' or '.join(map(str, expected))}. Reshape them, by targets[..., 0] or "
            "targets[..., None], say."
        )


def _softmax_value(logits: Array, targets: Array) -> Array:
    _check_targets("softmax_cross_entropy", targets, logits.shape[:-1], logits.shape)
    log_probs = jax.nn.log_softmax(logits)
    if targets.ndim == logits.ndim:  # one-hot or soft labels
        return -jnp.sum(targets * log_probs, -1)
    return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


def _softmax_sample(rng: Array, logits: Array) -> Array:
    # Inverts the distribution function with one random number per prediction; the
    # Gumbel trick of `jax.random.categorical` takes one per class.
    cumulative = jnp.cumsum(jax.nn.softmax(logits), -1)
    shape, last = logits.shape[:-1], logits.shape[-1] - 1
    draw = jax.random.uniform(rng, shape, logits.dtype) * cumulative[..., -1]
    return jnp.minimum(jnp.sum(draw[..., None] >= cumulative, -1), last)


def _softmax_hessian_product(logits: Array, tangents: Array) -> Array:
    probs = jax.nn.softmax(logits)
    centred = tangents - jnp.sum(probs * tangents, -1, keepdims=True)
    return probs * centred


def _softmax_hessian_columns(logits: Array) -> Array:
    # diag(p) - p pᵀ = Σ_c p_c (e_c - p)(e_c - p)ᵀ
    probs = jax.nn.softmax(logits)
    basis = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    basis = basis.reshape(-1, *([1] * (logits.ndim - 1)), logits.shape[-1])
    return jnp.sqrt(jnp.moveaxis(probs, -1, 0))[..., None] * (basis - probs)


def _diagonal_columns(root: Array) -> Array:
    """The columns of a diagonal square root of shape ``(..., C)``."""
    return jnp.moveaxis(
        root[..., None] * jnp.eye(root.shape[-1], dtype=root.dtype), -2, 0
    )


def _squared_value(outputs: Array, targets: Array) -> Array:
    _check_targets("squared_error", targets, outputs.shape)
    return jnp.sum((outputs - targets) ** 2, -1)


def _sigmoid_value(logits: Array, targets: Array) -> Array:
    _check_targets("sigmoid_binary_cross_entropy", targets, logits.shape)
    targets = targets.astype(logits.dtype)
    positive = targets * jax.nn.log_sigmoid(logits)
    return -jnp.sum(positive + (1 - targets) * jax.nn.log_sigmoid(-logits), -1)


def _sigmoid_variance(logits: Array) -> Array:
    return jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)


_SOFTMAX = Loss(
    name="softmax_cross_entropy",
    value=_softmax_value,
    sample=_softmax_sample,
    hessian_product=_softmax_hessian_product,
    hessian_columns=_softmax_hessian_columns,
    lower_bound=0.0,
)

_SIGMOID = Loss(
    name="sigmoid_binary_cross_entropy",
    value=_sigmoid_value,
    sample=lambda rng, logits: jax.random.bernoulli(rng, jax.nn.sigmoid(logits)),
    hessian_product=lambda logits, tangents: _sigmoid_variance(logits) * tangents,
    hessian_columns=lambda logits: _diagonal_columns(
        jnp.sqrt(_sigmoid_variance(logits))
    ),
    lower_bound=0.0,
)

# (y - t)² is the negative log-likelihood of a normal with variance 1/2.
_SQUARED = Loss(
    name="squared_error",
    value=_squared_value,
    sample=lambda rng, outputs: (
        outputs
        + jax.random.normal(rng, outputs.shape, outputs.dtype)
        * jnp.asarray(0.5**0.5, outputs.dtype)
    ),
    hessian_product=lambda outputs, tangents: 2 * tangents,
    hessian_columns=lambda outputs: _diagonal_columns(jnp.full_like(outputs, 2.0**0.5)),
    lower_bound=0.0,
)

# Each is summed over the last axis of the outputs. Softmax takes integer, one-hot or
# soft labels; squared_error is (outputs - targets)² without a factor ½.
_LOSSES = {loss.name: loss for loss in (_SOFTMAX, _SIGMOID, _SQUARED)}


def get_loss(loss: str | Loss) -> Loss:
    """Returns the `Loss` of a name, or the `Loss` itself."""
    if isinstance(loss, Loss):
        return loss
    if loss not in _LOSSES:
        raise ValueError(
            f"Unknown loss {summarize(loss)}. Names: {', '.join(_LOSSES)}. "
            "For any other loss pass an optax_cgfac.Loss."
        )
    return _LOSSES[loss]
