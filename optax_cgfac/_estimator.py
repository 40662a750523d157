"""The user's way to curvature: `fisher_estimator` and `value_and_grad`."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from optax_cgfac._checks import check_positive
from optax_cgfac._curvature import Curvature, CurvatureSpec, empty_curvature
from optax_cgfac._examples import (
    batched_leaves,
    check_examples,
    num_kept,
    slice_examples,
    strided_indices,
)
from optax_cgfac._layers import example_rows
from optax_cgfac._linen import probe_calls, run_captured
from optax_cgfac._losses import Loss, get_loss
from optax_cgfac._tagging import (
    Discovery,
    Rows,
    Where,
    calls_of,
    discover,
    make_tags,
)
from optax_cgfac._types import Array, LayerRows, PyTree

Kind = Literal["mc", "empirical", "exact"]


class InitFn(Protocol):
    """``init(params, inputs) -> Curvature``."""

    def __call__(self, params: PyTree, inputs: PyTree) -> Curvature:
        """Tags the layers of the model and returns a curvature without rows."""
        ...


class UpdateFn(Protocol):
    """``update(curvature, params, inputs, *, rng=None, targets=None) -> Curvature``."""

    def __call__(
        self,
        curvature: Curvature,
        params: PyTree,
        inputs: PyTree,
        *,
        rng: Array | None = None,
        targets: PyTree = None,
    ) -> Curvature:
        """Captures rows of a few of the examples and adds them to the window."""
        ...


class CurvatureEstimator(NamedTuple):
    """A pair of pure functions, the way Optax does.

    Attributes:
      init: ``init(params, inputs) -> Curvature``.
      update: ``update(curvature, params, inputs, *, rng=None, targets=None) ->
        Curvature``.
    """

    init: InitFn
    update: UpdateFn


def fisher_estimator(
    model_fn: Callable[[PyTree, PyTree], Array],
    loss: str | Loss,
    *,
    kind: Kind = "mc",
    window: int = 8,
    rows: int = 32,
    model_rows: int = 128,
    where: Where | None = None,
    fallback: bool = False,
    input_axes: PyTree = "auto",
) -> CurvatureEstimator:
    r"""Estimates the Fisher information of every layer from a few examples a step.

    For the loss :math:`\frac1N\sum_n L(f(θ, x_n), y_n)` the Fisher (or generalised
    Gauss-Newton) matrix is :math:`F = \frac1N\sum_n J_nᵀ H_n J_n`, with ``J_n`` the
    Jacobian of the model's outputs for one example and ``H_n`` the loss Hessian.
    Every update runs the model forward and backward on ``rows`` examples of the
    batch and keeps the input ``a`` and the output cotangent ``g`` of every layer;
    the last ``window`` updates count.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` applies a Flax Linen model,
        un-jitted. ``outputs`` has shape ``(N, ..., C)``. Models whose output for
        one example depends on the others (BatchNorm) must run in inference mode.
      loss: ``"softmax_cross_entropy"``, ``"sigmoid_binary_cross_entropy"``,
        ``"squared_error"``, each summed over the last axis of the outputs and
        averaged over the others, or a `Loss`.
      kind: ``"mc"`` draws targets from the model, an unbiased estimate of ``F``;
        ``"empirical"`` uses the batch's targets (Kunstner et al. 2019 on why this
        is another matrix); ``"exact"`` uses all columns of a square root of the
        loss Hessian and costs ``C`` backward passes.
      window: Number of updates whose rows are kept.
      rows: Examples captured per update.
      model_rows: Examples kept for the Gauss-Newton products of `cgfac`.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        to precondition; None for all.
      fallback: Accepts parameters that no tag covers, for use with
        ``cgfac(fallback=...)``.
      input_axes: Which leaves of ``inputs`` have an axis of examples: a pytree
        prefix of ``inputs`` with 0 (first axis) or None, as ``in_axes`` of
        `jax.vmap`; ``"auto"`` takes every leaf whose first axis has the length of
        the outputs' first axis.

    Returns:
      A `CurvatureEstimator`.

    Raises:
      ValueError: If an option has no meaning.
      TypeError: If ``model_fn`` is no function or ``loss`` no loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
      >>> x = jnp.ones((8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x), "squared_error", rows=4
      ... )
      >>> curvature = estimator.init(params, x)
      >>> curvature = estimator.update(curvature, params, x, rng=jax.random.key(1))
      >>> [tag.name for tag in curvature.tags]
      ['layers_0', 'layers_2']

    References:
      Martens & Grosse (2015), sections 2 and 5; Chen (2021).
    """
    loss = get_loss(loss)
    if kind not in ("mc", "empirical", "exact"):
        raise ValueError(f"kind must be 'mc', 'empirical' or 'exact', got {kind!r}.")
    if kind == "exact" and loss.hessian_columns is None:
        raise ValueError(
            f"kind='exact' needs Loss.hessian_columns, which {loss.name!r} lacks."
        )
    if not callable(model_fn):
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, "
            f"got {type(model_fn).__name__}. For a module write "
            "lambda params, x: model.apply({'params': params}, x)."
        )
    for name, value in (("window", window), ("rows", rows), ("model_rows", model_rows)):
        check_positive(name, value)

    options = (kind, window, rows, model_rows)

    def init(params: PyTree, inputs: PyTree) -> Curvature:
        outputs = jax.eval_shape(model_fn, params, inputs)
        _check_outputs(outputs, kind)
        num_examples = outputs.shape[0]
        if num_examples < rows:
            raise ValueError(
                f"rows={rows} examples are captured per update, but the inputs hold "
                f"{num_examples}. Pass fisher_estimator(..., rows={num_examples}) or "
                "initialise with a whole batch."
            )
        batched = batched_leaves(inputs, num_examples, input_axes)
        few = jax.eval_shape(
            lambda x: slice_examples(x, batched, jnp.arange(rows)), inputs
        )
        discovery = discover_few(params, few)
        columns = outputs.shape[-1] if kind == "exact" else 1
        tags, uncovered = make_tags(
            discovery, params, Rows(rows, columns), where=where, fallback=fallback
        )
        spec = CurvatureSpec(tags, uncovered, window, model_fn, loss, options, batched)
        kept = jnp.arange(min(model_rows, num_examples))
        return empty_curvature(spec, slice_examples(inputs, batched, kept))

    def update(
        curvature: Curvature,
        params: PyTree,
        inputs: PyTree,
        *,
        rng: Array | None = None,
        targets: PyTree = None,
    ) -> Curvature:
        _check_update(curvature, (model_fn, loss, options), kind, rng, targets)
        batched = curvature.spec.batched
        num_examples = check_examples(inputs, batched, curvature.model_inputs, rows)
        if rng is None:
            # Without randomness the choice of examples and positions cycles.
            start, sample_rng, position_rng = curvature.num_updates, None, None
        else:
            start_rng, sample_rng, position_rng = jax.random.split(rng, 3)
            start = jax.random.randint(start_rng, (), 0, num_examples)
        indices = strided_indices(start, rows, num_examples)
        few = slice_examples(inputs, batched, indices)
        few_targets = jax.tree.map(lambda t: jnp.asarray(t)[indices], targets)

        cycle = curvature.num_updates // (num_examples // rows)

        def forward(probes):
            capture = run_captured(model_fn, (params, few), probes)
            return capture.outputs, [root.calls for root in capture.roots]

        probes = discover_few(params, few).probes
        outputs, backward, calls = jax.vjp(forward, probes, has_aux=True)

        def rows_of(cotangent: Array) -> dict[str, LayerRows]:
            by_call = probe_calls(*backward(cotangent.astype(outputs.dtype)))
            found = {}
            for tag in curvature.tags:
                layer = example_rows(tag, calls_of(tag, calls, by_call), rows)
                found[tag.name] = _one_position(layer, position_rng, indices + cycle)
            return found

        cotangents = _cotangents(
            loss,
            kind,
            outputs.astype(_at_least_float32(outputs)),
            sample_rng,
            few_targets,
        )
        if kind == "exact":
            by_column = jax.vmap(rows_of)(cotangents)
            captured = jax.tree.map(_columns_to_rows, by_column)
        else:
            captured = rows_of(cotangents)
        kept = num_kept(curvature.model_inputs, batched)
        model_indices = strided_indices(start + 1, kept, num_examples)
        model_inputs = slice_examples(inputs, batched, model_indices)
        return curvature.push_rows(captured, model_inputs)

    def discover_few(params: PyTree, few: PyTree) -> Discovery:
        """Finds the layers in a run on ``rows`` examples."""
        discovery = discover(model_fn, params, few)
        got = discovery.outputs.shape
        if got[:1] != (rows,):
            raise ValueError(
                f"With {rows} examples sliced from inputs the outputs have shape "
                f"{got}. Say which leaves of inputs have an axis of examples: "
                "fisher_estimator(..., input_axes=...)."
            )
        return discovery

    return CurvatureEstimator(init, update)


def _cotangents(
    loss: Loss, kind: Kind, outputs: Array, rng: Array | None, targets: PyTree
) -> Array:
    """Output cotangents per example; one per Hessian column for ``"exact"``."""
    predictions = math.prod(outputs.shape[1:-1])
    if kind == "exact" and loss.hessian_columns is not None:
        return loss.hessian_columns(outputs)
    if rng is not None and kind == "mc":
        targets = loss.sample(rng, outputs)
        # An example's loss is the mean of its T predictions. Targets are drawn
        # independently, so squares add up: 1/√T gives (1/T) Σ Jᵀ H J.
        scale = predictions**-0.5
    else:
        scale = 1 / predictions
    gradient = jax.grad(lambda z: jnp.sum(loss.value(z, targets)))(outputs)
    return gradient * jnp.asarray(scale, outputs.dtype)


def _one_position(rows: LayerRows, rng: Array | None, turn: Array) -> LayerRows:
    """Keeps one position of every example: ``(*stack, N, T, n) -> (*stack, N, n)``.

    At random, or without a key at the ``turn`` of each example.

    Returns:
      The rows.
    """
    num_examples, num_positions = rows.a.shape[-3:-1]
    if num_positions == 1:
        return jax.tree.map(lambda x: x[..., 0, :], rows)
    if rng is None:
        chosen = turn % num_positions
    else:
        chosen = jax.random.randint(rng, (num_examples,), 0, num_positions)
    return jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, chosen.reshape(*([1] * (x.ndim - 3)), num_examples, 1, 1), -2
        )[..., 0, :],
        rows,
    )


def _columns_to_rows(x: Array) -> Array:
    """``(C, *stack, N, n) -> (*stack, C·N, n)``."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _at_least_float32(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check_outputs(outputs: PyTree, kind: Kind) -> None:
    if not hasattr(outputs, "shape") or len(outputs.shape) < 2:
        raise ValueError(
            "model_fn must return one array of shape (N, ..., C), examples first and "
            f"one prediction on the last axis; got {outputs}."
        )
    if kind == "exact" and len(outputs.shape) != 2:
        raise ValueError(
            f"kind='exact' takes outputs of shape (N, C), got {outputs.shape}. "
            "Use kind='mc'."
        )


def _check_update(
    curvature: Curvature, source: tuple, kind: Kind, rng: Any, targets: Any
) -> None:
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "estimator.update takes the Curvature that estimator.init returned, got "
            f"{type(curvature).__name__}."
        )
    spec = curvature.spec
    if (spec.model_fn, spec.loss, spec.options) != source:
        raise ValueError(
            "This curvature comes from another estimator. Call "
            "estimator.init(params, inputs) of the one that updates it."
        )
    if kind == "empirical" and targets is None:
        raise ValueError("kind='empirical' needs targets: pass targets=batch_targets.")
    if kind != "empirical" and targets is not None:
        raise ValueError(
            f"kind={kind!r} takes no targets: they come from the model's own "
            "distribution. Drop targets= or use kind='empirical'."
        )
    if kind == "mc" and rng is None:
        raise ValueError(
            "kind='mc' draws targets from the model: pass rng=jax.random.fold_in(key, "
            "step), a new key for every update."
        )
