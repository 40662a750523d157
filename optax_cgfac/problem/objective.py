r"""The whole objective: a loss for each output, weights of predictions, the reduction.

With ``c`` the factor of a prediction in :math:`\frac1N \sum_n \sum_t c_{nt}
L(z_{nt}, y_{nt})`, the Fisher is :math:`\frac1N \sum_{nt} c_{nt} J_{nt}ᵀ H_{nt}
J_{nt}`. A mean over all predictions, a sum, padded tokens: each is a choice of ``c``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_cgfac.problem.loss import Loss, get_loss
from optax_cgfac.utils.devices import mean_over
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import check_choice, check_function, summarize

Kind = Literal["mc", "empirical", "exact"]


Reduction = Literal["mean", "mean_of_sums", "sum"]


REDUCTIONS = ("mean", "mean_of_sums", "sum")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, as a function of the model's outputs.

    Attributes:
      losses: One per output.
      is_tuple: Whether the model returns a tuple of outputs.
      reduction: ``"mean"`` over all predictions, ``"sum"``, or ``"mean_of_sums"``:
        predictions of an example are summed, examples averaged.
      weights: ``weights(inputs)`` gives each prediction a weight; None for 1.
      axis_name: The axis of devices over which the examples are split, if any.
    """

    losses: tuple[Loss, ...]
    is_tuple: bool = False
    reduction: Reduction = "mean"
    weights: Callable[[PyTree], PyTree] | None = None
    axis_name: str | None = None

    def heads(self, outputs: PyTree) -> tuple[Array, ...]:
        """Returns the model's outputs as a tuple.

        Raises:
          ValueError: If they do not have the form that the losses ask for.
          TypeError: If they are no real floating-point arrays.
        """
        heads = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        is_tuple = isinstance(outputs, (tuple, list))
        if is_tuple != self.is_tuple or len(heads) != len(self.losses):
            expected = f"a tuple of {len(self.losses)}" if self.is_tuple else "one"
            raise ValueError(
                f"model_fn must return {expected} array(s), as many as there are "
                f"losses ({', '.join(loss.name for loss in self.losses)}); got "
                f"{jax.tree.structure(outputs)}. For several outputs pass a tuple of "
                "losses; return nothing else, such as updated statistics."
            )
        for head in heads:
            if not hasattr(head, "shape") or len(head.shape) < 2:
                raise ValueError(
                    "model_fn must return one array of shape (N, ..., C), examples "
                    "first and one prediction on the last axis; got "
                    f"{summarize(head)}. Return predictions and not the loss, with "
                    "outputs[:, None] for one number an example."
                )
            if not jnp.issubdtype(head.dtype, jnp.floating):
                raise TypeError(
                    "model_fn must return real floating-point predictions, got "
                    f"{summarize(head)}. Return logits, and not the classes that they "
                    "are largest for."
                )
        if len({head.shape[0] for head in heads}) != 1:
            raise ValueError(
                "The model's outputs must agree on the number of examples, got shapes "
                f"{[head.shape for head in heads]}. Bring the batch to the first axis "
                "of each."
            )
        return heads

    def scales(
        self,
        inputs: PyTree,
        heads: Sequence[Array],
        indices: Array | None = None,
        num_examples: int | None = None,
    ) -> list[Array]:
        """Returns ``c`` for every output's predictions, up to `factor`.

        Args:
          inputs: The inputs to which the weights belong.
          heads: Outputs, of which the shapes of one example are read.
          indices: The examples of ``inputs`` that ``heads`` holds; None for all.
          num_examples: The examples of ``inputs``; None for those of ``heads``.

        Returns:
          Arrays of the shapes of ``heads`` without their last axis.

        Raises:
          ValueError: If the weights do not fit the outputs.
        """
        given = [None] * len(heads)
        if self.weights is not None:
            given = self.weights(inputs)
            if given is None:
                raise ValueError(
                    "weights(inputs) must return a weight for each prediction, or for "
                    "each example; got None. Return inputs['mask'], say, or drop "
                    "weights=."
                )
            given = list(given) if isinstance(given, (tuple, list)) else [given]
            given = given * len(heads) if len(given) == 1 else given
            if len(given) != len(heads):
                raise ValueError(
                    "weights(inputs) must return one array, or a tuple of "
                    f"{len(heads)} as the outputs are; got {len(given)}. Return a "
                    "weight for each prediction."
                )
        scales = []
        for weights, head in zip(given, heads, strict=True):
            dtype = jnp.promote_types(head.dtype, jnp.float32)
            inner = head.shape[1:-1]
            if weights is None:
                weights = jnp.ones(head.shape[:1], dtype)
                picked = None
            else:
                expected = heads[0].shape[0] if num_examples is None else num_examples
                _check_weights(weights, expected, inner)
                weights, picked = jnp.asarray(weights, dtype), indices
            shape = weights.shape[:1] + inner
            padded = (1,) * (len(shape) - weights.ndim)
            weights = weights.reshape(*weights.shape, *padded)
            weights = jnp.broadcast_to(weights, shape)
            if self.reduction == "mean":
                total = mean_over(jnp.sum(weights) / shape[0], self.axis_name)
                weights = weights / jnp.where(total > 0, total, 1)
            scales.append(weights if picked is None else weights[picked])
        return scales

    def factor(self, batch_size: int) -> int:
        """Returns the factor of a sum over the examples, beside their mean."""
        return batch_size if self.reduction == "sum" else 1

    @property
    def num_targets(self) -> int | None:
        """How many targets an example has; None for one that is not in a tuple."""
        return len(self.losses) if self.is_tuple else None

    @property
    def is_nonnegative(self) -> bool:
        """Whether the objective is known never to fall below zero."""
        return all(
            loss.lower_bound is not None and loss.lower_bound >= 0
            for loss in self.losses
        )

    def num_columns(self, heads: Sequence[Array], kind: Kind, samples: int) -> int:
        """Returns how many cotangents an example gets."""
        if kind == "exact":
            return sum(math.prod(head.shape[1:]) for head in heads)
        return samples if kind == "mc" else 1

    def hessian_products(
        self,
        heads: Sequence[Array],
        scales: Sequence[Array],
        tangents: Sequence[Sequence[Array]],
    ) -> Array:
        """Returns ``1/N Σ c tᵢᵀ H tⱼ`` for tangents of the outputs."""
        total = jnp.zeros((len(tangents), len(tangents)), heads[0].dtype)
        for index, (loss, head, scale) in enumerate(
            zip(self.losses, heads, scales, strict=True)
        ):
            own = [tangent[index] for tangent in tangents]
            factor = scale[..., None].astype(head.dtype) * loss.weight
            images = [loss.hessian_product(head, t) for t in own]
            for image in images:
                _check_returned(loss, "hessian_product(outputs, tangents)", image, head)
            images = [factor * image for image in images]
            products = jnp.array([[jnp.vdot(u, v) for v in images] for u in own])
            total = total + products / head.shape[0]
        return total


def make_objective(
    loss: str | Loss | Sequence[str | Loss],
    reduction: Reduction = "mean",
    weights: Callable[[PyTree], PyTree] | None = None,
    axis_name: str | None = None,
) -> Objective:
    """Returns the objective of the user's options.

    Raises:
      ValueError: If an option is unknown.
      TypeError: If ``loss`` is no loss or ``weights`` no function.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if weights is not None:
        check_function("weights", weights, ["inputs"], "lambda inputs: inputs['mask']")
    if not isinstance(axis_name, str | None):
        raise TypeError(
            f"axis_name must be the name of a mesh axis, got {summarize(axis_name)}. "
            "Pass axis_name='batch' inside jax.shard_map over such an axis, else None."
        )
    if isinstance(loss, (tuple, list)):
        losses, is_tuple = tuple(get_loss(one) for one in loss), True
    else:
        losses, is_tuple = (get_loss(loss),), False  # pyright: ignore[reportArgumentType]
    if not losses:
        raise ValueError(
            "loss must be a loss, or a tuple of them; got an empty tuple. Pass a loss "
            "for each output."
        )
    return Objective(losses, is_tuple, reduction, weights, axis_name)


def cotangents(
    objective: Objective,
    kind: Kind,
    heads: Sequence[Array],
    scales: Sequence[Array],
    *,
    factor: int = 1,
    samples: int = 1,
    rng: Array | None = None,
    targets: PyTree = None,
) -> tuple[Array, ...]:
    """Returns the output cotangents of every example, a leading axis of columns.

    Args:
      objective: The objective.
      kind: As in `fisher_estimator`.
      heads: The outputs, in the precision of the result.
      scales: From `Objective.scales`.
      factor: From `Objective.factor`.
      samples: How often targets are drawn.
      rng: A key, for ``"mc"``.
      targets: Like ``heads``, for ``"empirical"``.

    Returns:
      An array of shape ``(columns, *head.shape)`` for every output.
    """
    weighed = [
        scale.astype(head.dtype) * loss.weight
        for loss, head, scale in zip(objective.losses, heads, scales, strict=True)
    ]
    if kind == "exact":
        return _columns(objective, heads, [scale * factor for scale in weighed])
    if kind == "empirical":
        # The gradient of the example's own share of the loss. A factor of the Fisher
        # enters by its root, as it stands before the outer product of gradients.
        given = targets if objective.is_tuple else (targets,)
        gradients = (
            _gradient(loss, head, target, scale * factor**0.5)
            for loss, head, target, scale in zip(
                objective.losses, heads, given, weighed, strict=True
            )
        )
        return tuple(gradient[None] for gradient in gradients)

    def draw(rng: Any) -> tuple[Array, ...]:
        keys = jax.random.split(rng, len(heads)) if len(heads) > 1 else [rng]
        # Targets are drawn independently, so the squares of gradients add up: a
        # prediction that counts c times has √c times its gradient.
        return tuple(
            _gradient(
                loss,
                head,
                loss.sample(key, head),
                jnp.sqrt(scale * (factor / samples)),
            )
            for loss, head, key, scale in zip(
                objective.losses, heads, keys, weighed, strict=True
            )
        )

    if samples == 1:
        return tuple(gradient[None] for gradient in draw(rng))
    return jax.vmap(draw)(jax.random.split(jnp.asarray(rng), samples))


def _gradient(loss: Loss, head: Array, targets: PyTree, scale: Array) -> Array:
    def total(head: Array) -> Array:
        value = loss.value(head, targets)
        if jnp.shape(value) != head.shape[:-1]:
            raise ValueError(
                f"Loss {loss.name!r}: value(outputs, targets) has shape "
                f"{jnp.shape(value)}; expected {head.shape[:-1]}, one number for each "
                "prediction. Sum over the last axis only."
            )
        return jnp.sum(value * scale)

    return jax.grad(total)(head)


def _columns(
    objective: Objective, heads: Sequence[Array], scales: Sequence[Array]
) -> tuple[Array, ...]:
    """All columns of the loss Hessian's square root, one prediction at a time."""
    blocks = []
    for loss, head, scale in zip(objective.losses, heads, scales, strict=True):
        if loss.hessian_columns is None:
            raise ValueError(
                f"kind='exact' needs Loss.hessian_columns, which {loss.name!r} lacks."
            )
        columns = loss.hessian_columns(head)
        expected = jax.ShapeDtypeStruct((head.shape[-1], *head.shape), head.dtype)
        _check_returned(loss, "hessian_columns(outputs)", columns, expected)
        columns = columns * jnp.sqrt(scale)[..., None]
        num, inner = head.shape[0], head.shape[1:-1]
        columns = columns.reshape(-1, 1, num, math.prod(inner), head.shape[-1])
        alone = jnp.eye(math.prod(inner), dtype=head.dtype)[:, None, :, None]
        blocks.append((columns * alone).reshape(-1, *head.shape))
    total = sum(len(block) for block in blocks)
    result, start = [], 0
    for block in blocks:
        zeros = jnp.zeros((total, *block.shape[1:]), block.dtype)
        result.append(zeros.at[start : start + len(block)].set(block))
        start += len(block)
    return tuple(result)


def _check_returned(loss: Loss, call: str, got: Any, like: Any) -> None:
    """Checks the shape of what a function of a user's loss has returned."""
    if jnp.shape(got) != like.shape:
        raise ValueError(
            f"Loss {loss.name!r}: {call} has shape {jnp.shape(got)}; expected "
            f"{like.shape}. Return an array of that shape, as optax_cgfac.Loss "
            "describes it."
        )


def _check_weights(weights: Any, num_examples: int, inner: tuple[int, ...]) -> None:
    """Checks that there is a weight for each prediction."""
    expected = (num_examples, *inner)
    kinds = jnp.floating, jnp.integer, jnp.bool_
    dtype = getattr(weights, "dtype", None)
    if dtype is not None and not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(
            f"weights(inputs) must be real numbers, got {summarize(weights)}. Return a "
            "weight for each prediction, or for each example."
        )
    shape = getattr(weights, "shape", None)
    fits = shape is not None and shape[:1] == (num_examples,)
    if shape is not None and fits:
        # Axes that are not there are added at the end.
        sizes = zip(shape[1:], inner, strict=False)
        fits = len(shape) <= len(expected) and all(n in (1, m) for n, m in sizes)
    if not fits:
        raise ValueError(
            f"weights(inputs) is {summarize(weights)}; expected one that broadcasts to "
            f"({', '.join(map(str, ('N', *inner)))}) with N = {num_examples}. Return a "
            "weight for each prediction, or for each example."
        )
