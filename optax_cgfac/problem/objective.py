r"""The objective: a loss for each output, weights of predictions, the reduction.

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
from optax_cgfac.utils.validate import (
    check_choice,
    check_function,
    is_floating,
    summarize,
)

Kind = Literal["mc", "empirical", "exact"]
Reduction = Literal["mean", "mean_of_sums", "sum"]


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

    def __post_init__(self):
        """Checks the options."""
        check_choice("reduction", self.reduction, ("mean", "mean_of_sums", "sum"))
        if self.weights is not None:
            example = "lambda inputs: inputs['mask']"
            check_function("weights", self.weights, ["inputs"], example)

    def outputs(self, returned: PyTree) -> tuple[Array, ...]:
        """Returns the model's outputs as a tuple, checked."""
        is_tuple = isinstance(returned, (tuple, list))
        outputs = tuple(returned) if is_tuple else (returned,)
        if is_tuple != self.is_tuple or len(outputs) != len(self.losses):
            expected = f"a tuple of {len(self.losses)}" if self.is_tuple else "one"
            raise ValueError(
                f"model_fn must return {expected} array(s), as many as there are "
                f"losses; got {jax.tree.structure(returned)}. For several outputs pass "
                "a tuple of losses; return nothing else, such as updated statistics."
            )
        real = all(is_floating(output) and len(output.shape) > 1 for output in outputs)
        if not real or len({output.shape[0] for output in outputs}) != 1:
            raise ValueError(
                "model_fn must return real floating-point arrays of shape (N, ..., C), "
                "the same N examples first and one prediction on the last axis; got "
                f"{', '.join(map(summarize, outputs))}. Return predictions and not the "
                "loss or classes, with outputs[:, None] for one number per example."
            )
        return outputs

    def scales(
        self,
        inputs: PyTree,
        outputs: Sequence[Array],
        indices: Array | None = None,
        num_examples: int | None = None,
    ) -> list[Array]:
        """Returns ``c`` for every output's predictions, up to `factor`.

        Args:
          inputs: The inputs to which the weights belong.
          outputs: Only the shapes of one example are read.
          indices: The examples of ``inputs`` that ``outputs`` holds; None for all.
          num_examples: The examples of ``inputs``; None for those of ``outputs``.
        """
        given = [None] * len(outputs)
        if self.weights is not None:
            given = self.weights(inputs)
            given = list(given) if isinstance(given, (tuple, list)) else [given]
            given = given * len(outputs) if len(given) == 1 else given
            if len(given) != len(outputs) or any(x is None for x in given):
                raise ValueError(
                    "weights(inputs) must return an array, or a tuple of "
                    f"{len(outputs)} as the outputs are; got "
                    f"{', '.join(map(summarize, given))}. Return a weight for each "
                    "prediction, or drop weights=."
                )
        if num_examples is None:
            num_examples = outputs[0].shape[0]
        scales = []
        for weights, output in zip(given, outputs, strict=True):
            dtype = jnp.promote_types(output.dtype, jnp.float32)
            inner = output.shape[1:-1]
            picked = None
            if weights is None:
                weights = jnp.ones(output.shape[:1], dtype)
            else:
                _check_weights(weights, (num_examples, *inner))
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
        """Returns the ratio of the Fisher to its mean over examples."""
        return batch_size if self.reduction == "sum" else 1

    @property
    def num_targets(self) -> int | None:
        """Number of targets in a tuple; None if targets are not in a tuple."""
        return len(self.losses) if self.is_tuple else None

    @property
    def is_nonnegative(self) -> bool:
        """Whether no loss can be negative."""
        bounds = [loss.lower_bound for loss in self.losses]
        return all(bound is not None and bound >= 0 for bound in bounds)

    def num_columns(self, outputs: Sequence[Array], kind: Kind) -> int:
        """Returns the number of cotangents per example."""
        if kind == "exact":
            return sum(math.prod(output.shape[1:]) for output in outputs)
        return 1

    def hessian_products(
        self,
        outputs: Sequence[Array],
        scales: Sequence[Array],
        tangents: Sequence[Sequence[Array]],
    ) -> Array:
        """Returns ``1/N Σ c tᵢᵀ H tⱼ`` for tangents of the outputs."""
        total = jnp.zeros((len(tangents), len(tangents)), outputs[0].dtype)
        for index, (loss, output, scale) in enumerate(
            zip(self.losses, outputs, scales, strict=True)
        ):
            own = [tangent[index] for tangent in tangents]
            factor = scale[..., None].astype(output.dtype) * loss.weight
            images = [loss.hessian_product(output, t) for t in own]
            for image in images:
                _check_returned(loss, "hessian_product", image, output.shape)
            images = [factor * image for image in images]
            products = jnp.array([[jnp.vdot(u, v) for v in images] for u in own])
            total = total + products / output.shape[0]
        return total


def make_objective(
    loss: str | Loss | Sequence[str | Loss],
    reduction: Reduction = "mean",
    weights: Callable[[PyTree], PyTree] | None = None,
    axis_name: str | None = None,
) -> Objective:
    """Returns the objective of the user's options."""
    is_tuple = isinstance(loss, (tuple, list))
    losses: Any = loss if is_tuple else (loss,)
    losses = tuple(get_loss(one) for one in losses)
    return Objective(losses, is_tuple, reduction, weights, axis_name)


def cotangents(
    objective: Objective,
    kind: Kind,
    outputs: Sequence[Array],
    scales: Sequence[Array],
    *,
    factor: int = 1,
    rng: Array | None = None,
    targets: PyTree = None,
) -> tuple[Array, ...]:
    """Returns the output cotangents of every example, a leading axis of columns."""
    weighed = [
        scale.astype(output.dtype) * loss.weight
        for loss, output, scale in zip(objective.losses, outputs, scales, strict=True)
    ]
    if kind == "exact":
        return _columns(objective, outputs, [scale * factor for scale in weighed])
    if kind == "empirical":
        given = targets if objective.is_tuple else (targets,)
        # The gradient of the example's own share of the loss. The outer product of
        # gradients squares the root of the Fisher's factor.
        weighed = [scale * factor**0.5 for scale in weighed]
    else:
        keys: Any = [rng]
        if len(outputs) > 1:
            keys = jax.random.split(keys[0], len(outputs))
        given = [
            loss.sample(key, output)
            for loss, key, output in zip(objective.losses, keys, outputs, strict=True)
        ]
        # Targets are drawn independently, so the squares of gradients add up: a
        # prediction of weight c has √c times its gradient.
        weighed = [jnp.sqrt(scale * factor) for scale in weighed]
    every = zip(objective.losses, outputs, given, weighed, strict=True)
    return tuple(_gradient(*one)[None] for one in every)


def with_random_signs(columns: Sequence[Array], rng: Array) -> list[Array]:
    """Gives the cotangents of every example and column a random sign."""
    # In a layer whose input all examples share, their cotangents arrive added up. With
    # independent signs, as with independent draws, the cross terms of squares vanish
    # in the mean. The squares of a single example do not change.
    signs = jax.random.rademacher(rng, columns[0].shape[:2])
    return [
        x * signs.reshape(*x.shape[:2], *([1] * (x.ndim - 2))).astype(x.dtype)
        for x in columns
    ]


def _gradient(loss: Loss, output: Array, targets: PyTree, scale: Array) -> Array:
    def total(output: Array) -> Array:
        value = loss.value(output, targets)
        _check_returned(loss, "value", value, output.shape[:-1])
        return jnp.sum(value * scale)

    return jax.grad(total)(output)


def _columns(
    objective: Objective, outputs: Sequence[Array], scales: Sequence[Array]
) -> tuple[Array, ...]:
    """All columns of the loss Hessian's square root, one prediction at a time."""
    blocks = []
    for loss, output, scale in zip(objective.losses, outputs, scales, strict=True):
        of_loss: Any = loss.hessian_columns  # not None: CaptureSpec checks it
        columns = of_loss(output)
        shape = (output.shape[-1], *output.shape)
        _check_returned(loss, "hessian_columns", columns, shape)
        columns = columns * jnp.sqrt(scale)[..., None]
        num, inner = output.shape[0], output.shape[1:-1]
        columns = columns.reshape(-1, 1, num, math.prod(inner), output.shape[-1])
        alone = jnp.eye(math.prod(inner), dtype=output.dtype)[:, None, :, None]
        blocks.append((columns * alone).reshape(-1, *output.shape))
    total = sum(len(block) for block in blocks)
    result, start = [], 0
    for block in blocks:
        zeros = jnp.zeros((total, *block.shape[1:]), block.dtype)
        result.append(zeros.at[start : start + len(block)].set(block))
        start += len(block)
    return tuple(result)


def _check_returned(loss: Loss, field: str, got: Any, expected: tuple) -> None:
    """Checks the shape of the result of a function of the user's loss."""
    if jnp.shape(got) != expected:
        raise ValueError(
            f"Loss {loss.name!r}: {field} must return shape {expected}, got "
            f"{jnp.shape(got)}. Return an array as optax_cgfac.Loss describes it."
        )


def _check_weights(weights: Array, expected: tuple[int, ...]) -> None:
    """Checks that there is a weight for each prediction."""
    shape = jnp.shape(weights)
    # Axes that are not there are added at the end.
    sizes = zip(shape[1:], expected[1:], strict=False)
    broadcasts = len(shape) <= len(expected) and all(n in (1, m) for n, m in sizes)
    if shape[:1] != expected[:1] or not broadcasts:
        raise ValueError(
            f"weights(inputs) is {summarize(weights)}; expected one that broadcasts to "
            f"{expected}. Return a weight for each prediction, or for each example."
        )
