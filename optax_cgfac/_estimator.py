"""The user's way to curvature: `fisher_estimator`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from optax_cgfac._captured_rows import CaptureOptions, captured_rows, discover_few
from optax_cgfac._curvature import Curvature, empty_curvature
from optax_cgfac._curvature_spec import CurvatureSpec
from optax_cgfac._defaults import FEW_OUTPUTS, default_capture_every, default_rank
from optax_cgfac._estimator_checks import (
    check_estimator_counts,
    check_options,
    check_update,
    checked_key,
    rows_dtype_name,
    warn_of_hanging_lapack,
    warn_of_mixing,
)
from optax_cgfac._parameter_checks import check_parameters
from optax_cgfac.capture.discover import discover_wider
from optax_cgfac.capture.nnx.module import bind, outputs_like
from optax_cgfac.layers.build import RowOptions, Where, make_tags
from optax_cgfac.problem.batch import (
    batched_leaves,
    check_enough,
    check_examples,
    check_input_axes,
    check_inputs,
    check_targets,
    num_kept,
    slice_examples,
    strided_examples,
)
from optax_cgfac.problem.loss import Loss
from optax_cgfac.problem.objective import Kind, Reduction, make_criterion
from optax_cgfac.utils.devices import share, with_auto_axes, without_shardings
from optax_cgfac.utils.types import Array, PyTree

WeightSharing = Literal["expand", "reduce"]


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
        Curvature``. ``rng`` is a key of `jax.random.key` that nothing else uses, or
        one of `jax.random.PRNGKey`.
    """

    init: InitFn
    update: UpdateFn


def fisher_estimator(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: str | Loss | Sequence[str | Loss],
    *,
    kind: Kind = "mc",
    window: int = 8,
    rows: int = 32,
    model_rows: int = 32,
    where: Where | None = None,
    fallback: bool = False,
    input_axes: PyTree = "auto",
    whole_batch: bool = False,
    samples: int = 1,
    weight_sharing: WeightSharing = "expand",
    positions: int | None = 1,
    rows_dtype: Any = None,
    rank: int | Literal["auto"] | None = "auto",
    refresh_every: int = 8,
    capture_every: int | None = None,
    reduction: Reduction = "mean",
    weights: Callable[[PyTree], PyTree] | None = None,
    axis_name: str | None = None,
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
        un-jitted; or ``model_fn(module, inputs)`` calls an `nnx.Module`, whatever
        ``init`` and ``update`` are given. It is called with a copy of the module,
        whose modes it may set. ``outputs`` has shape ``(N, ..., C)``, or is a tuple
        of such arrays.
        Models whose output for one example depends on the others (BatchNorm in
        training mode) need ``whole_batch=True``, or run in inference mode.
      loss: ``"softmax_cross_entropy"``, ``"sigmoid_binary_cross_entropy"``,
        ``"squared_error"``, each summed over the last axis of the outputs, or a
        `Loss`; a tuple of them for a tuple of outputs, whose losses are added up.
      kind: ``"mc"`` draws targets from the model, an unbiased estimate of ``F``;
        ``"empirical"`` uses the batch's targets (Kunstner et al. 2019 on why this
        is another matrix); ``"exact"`` uses all columns of a square root of the
        loss Hessian and costs a backward pass for each output number.
      window: Number of updates whose rows are kept.
      rows: Examples captured per update.
      model_rows: Examples kept for the Gauss-Newton products of `cgfac`; fewer if
        ``init`` is given fewer, so give it a whole batch.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        to precondition; None for all.
      fallback: Accepts parameters that no tag covers, for use with
        ``cgfac(fallback=...)``.
      input_axes: Which leaves of ``inputs`` have an axis of examples: a pytree
        prefix of ``inputs`` with 0 (first axis) or None, as ``in_axes`` of
        `jax.vmap`; ``"auto"`` takes every leaf whose first axis has the length of
        the outputs' first axis. Say it where another leaf, such as the statistics of
        a BatchNorm, may have that length by chance.
      whole_batch: Whether the model runs on all of ``inputs`` instead of on a slice
        of them, for models that compare the examples of a batch with each other. The
        rows are those of ``rows`` examples still, and the Gauss-Newton products of
        `cgfac` are of all; an update then costs a forward and backward pass of the
        batch, and the curvature holds a copy of it.
      samples: How often ``"mc"`` draws targets for an example.
      weight_sharing: What positions (of a sequence, of an image) at which a layer has
        the same weights become: rows of their own, ``"expand"``, or together one row,
        the mean of inputs and the sum of cotangents, ``"reduce"`` (Eschenhagen et
        al. 2023). Look-ups are always expanded. Examples are the slowest axis where
        a model flattens examples and positions into one.
      positions: Positions of each example that become rows, chosen anew every update
        and rescaled without bias; None for all, which the structures ``"block"`` and
        ``"full"`` need. Unless it is None, a row of the transposed use of a long table
        (``attend``, more than 2,048 entries) keeps one entry of the vocabulary's side,
        which stands for the diagonal of that factor.
      rows_dtype: The dtype in which rows are kept. None for bfloat16 where there are
        eigenpairs of them (float32 parameters and ``positions=1``): `cgfac` needs
        the rows for nothing else. Elsewhere the parameters' own, at least float32.
        Name it where you solve with the rows themselves, by `scale_by_cgfac` or
        another structure, and three digits are too few.
      rank: Eigenpairs kept of each Kronecker factor of a layer, with which `cgfac`
        solves its systems where a factor has more: ``"auto"`` for a quarter of the
        batch, or an eighth for at most 32 outputs, from 16 to 64; None to solve with
        all rows.
      refresh_every: Captures between two computations of the eigenpairs, once the
        window is full.
      capture_every: Updates between two that capture rows, once the window is full;
        None for as many as keep the captures' share of the gradient's work near a
        sixteenth, or half of that for at most 32 outputs; at most 8.
      reduction: How the loss joins predictions: their ``"mean"``, their ``"sum"``, or
        ``"mean_of_sums"``, summed over the positions of an example and averaged over
        examples.
      weights: ``weights(inputs)`` returns a weight for each prediction, of shape
        ``(N, ...)``: 0 for padding. A mean divides by their sum. A tuple for a tuple
        of outputs.
      axis_name: Inside `jax.shard_map`, the axis of devices over which the batch is
        split. ``update`` gets a device's own examples and gathers the new rows;
        ``rows`` and ``model_rows`` count those of all devices. ``init`` runs outside,
        on a whole batch, and `Curvature.partition_specs` are its specs. Under
        `jax.jit` alone, whose arrays are those of all devices, leave it out.

    Returns:
      A `CurvatureEstimator`.

    Raises:
      ValueError: If an option has no meaning.
      TypeError: If ``model_fn`` is no function, ``loss`` no loss, or another option of
        another type. Every error and what to do: ``docs/errors.md``.

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

      With NNX the first argument is the module. The optimizer hands ``value_fn`` the
      state of its parameters; ``copy=True`` lets it be called below `jax.lax.cond`:

      >>> from flax import nnx
      >>> from optax_cgfac import cgfac
      >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> estimator = fisher_estimator(lambda m, x: m(x), "squared_error", rows=4)
      >>> curvature = estimator.init(module, x)
      >>> optimizer = nnx.Optimizer(module, cgfac(), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(module, optimizer, curvature, x, rng):
      ...     def loss_fn(module):
      ...         return jnp.mean(jnp.sum((module(x) - 1) ** 2, -1))
      ...
      ...     graphdef, _, rest = nnx.split(module, nnx.Param, ...)
      ...     rest = jax.tree.map(jnp.copy, rest)  # dropout: the same masks in value_fn
      ...     loss, grads = nnx.value_and_grad(loss_fn)(module)
      ...     curvature = estimator.update(curvature, module, x, rng=rng)
      ...     optimizer.update(
      ...         module,
      ...         grads,
      ...         curvature=curvature,
      ...         value=loss,
      ...         value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)),
      ...     )
      ...     return loss, curvature
      >>> first, curvature = train_step(
      ...     module, optimizer, curvature, x, jax.random.key(0)
      ... )
      >>> later, curvature = train_step(
      ...     module, optimizer, curvature, x, jax.random.key(1)
      ... )
      >>> bool(later < first)
      True

    References:
      Martens & Grosse (2015), sections 2 and 5; Chen (2021).
    """
    criterion = make_criterion(loss, reduction, weights, axis_name)
    check_options(model_fn, criterion, kind, samples, weight_sharing, where)
    counts = {"window": window, "rows": rows, "model_rows": model_rows}
    counts |= {"samples": samples, "refresh_every": refresh_every}
    counts |= {"capture_every": capture_every, "positions": positions}
    switches = {"fallback": fallback, "whole_batch": whole_batch}
    check_estimator_counts(counts, rank, switches)
    check_input_axes(input_axes)
    dtype = None if rows_dtype is None else rows_dtype_name(rows_dtype)
    options = (
        kind,
        window,
        rows,
        model_rows,
        samples,
        weight_sharing,
        positions,
        whole_batch,
        rank,
        refresh_every,
        capture_every,
    )

    capture_options = CaptureOptions(criterion, kind, rows, samples, whole_batch)

    def init(params: PyTree, inputs: PyTree) -> Curvature:
        check_inputs(inputs)
        function, params, (inputs,) = bind(model_fn, params, inputs)
        check_parameters(params)
        heads = criterion.heads(outputs_like(function, params, inputs))
        num_examples = heads[0].shape[0]
        check_enough(num_examples, rows)
        batched = batched_leaves(inputs, num_examples, input_axes)

        def shapes(count: int) -> PyTree:
            return jax.eval_shape(
                lambda x: slice_examples(x, batched, jnp.arange(count)),
                without_shardings(inputs),
            )

        num_outputs = sum(head.shape[-1] for head in heads)
        captured = num_examples if whole_batch else rows
        discovery = discover_few(function, params, shapes(captured), captured)
        wider = discover_wider(function, params, shapes(2 * captured), found=discovery)
        row_options = RowOptions(
            captured,
            rows,
            criterion.num_columns(heads, kind, samples),
            positions,
            weight_sharing == "reduce",
            shares=True,
        )
        tags, uncovered = make_tags(
            discovery, params, row_options, where=where, fallback=fallback, wider=wider
        )
        few_outputs = num_outputs <= FEW_OUTPUTS
        pairs = default_rank(num_examples, few_outputs) if rank == "auto" else rank
        spec = CurvatureSpec(
            tags,
            uncovered,
            window,
            function,
            criterion,
            options,
            batched,
            criterion.factor(num_examples),
            rows,
            pairs,
            refresh_every,
            num_examples,
            capture_every or default_capture_every(captured, num_examples, few_outputs),
            few_outputs,
            dtype,
            positions == 1,
        )
        kept = num_examples if whole_batch else min(model_rows, num_examples)
        warn_of_hanging_lapack()
        warn_of_mixing(discovery.mixing, (captured, kept), num_examples)
        few = with_auto_axes(
            lambda x: slice_examples(x, batched, jnp.arange(kept)), inputs
        )
        return empty_curvature(spec, few)

    def update(
        curvature: Curvature,
        params: PyTree,
        inputs: PyTree,
        *,
        rng: Array | None = None,
        targets: PyTree = None,
    ) -> Curvature:
        check_inputs(inputs)
        rng = checked_key(rng, kind, inputs)
        function, params, (inputs,) = bind(model_fn, params, inputs)
        source = (function, criterion, options)
        check_update(curvature, source, params, kind, targets)
        own_rows = share("rows", rows, axis_name)
        kept_inputs = curvature.model_inputs
        batched = curvature.spec.batched
        num_examples = check_examples(inputs, batched, kept_inputs, own_rows)
        check_targets(targets, num_examples, criterion.num_targets)

        def run(*given: Any) -> Curvature:
            return _updated(capture_options, function, *given)

        return with_auto_axes(
            run, curvature, params, inputs, rng, targets, like=curvature
        )

    return CurvatureEstimator(init, update)


def _updated(
    options: CaptureOptions,
    function: Callable[..., PyTree],
    curvature: Curvature,
    params: PyTree,
    inputs: PyTree,
    rng: Array | None,
    targets: PyTree,
) -> Curvature:
    """Returns the curvature after one update, whether or not it captures rows."""
    spec = curvature.spec

    def capture() -> Curvature:
        return captured_rows(options, curvature, function, params, inputs, rng, targets)

    if spec.capture_every > 1:
        # Every update counts until the window is full.
        due = curvature.num_updates < spec.window
        due |= curvature.num_calls % spec.capture_every == 0
        updated = jax.lax.cond(due, capture, lambda: curvature)
    else:
        updated = capture()
    # Of this batch, whose gradient the quadratic model is to be the model of:
    # examples of an older one are fitted already, and promise too much.
    kept = num_kept(curvature.model_inputs, spec.batched)
    return dataclasses.replace(
        updated,
        num_calls=curvature.num_calls + 1,
        model_inputs=strided_examples(
            inputs, spec.batched, curvature.num_calls + 1, kept
        ),
    )
