"""Public entry point: estimates curvature from captured rows."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac.capture.discover import with_example_axes
from optax_cgfac.capture.nnx.module import bind
from optax_cgfac.curvature.curvature import Curvature, empty_curvature
from optax_cgfac.curvature.history import WINDOW
from optax_cgfac.curvature.spec import FEW_OUTPUTS, CaptureSpec
from optax_cgfac.curvature.update import (
    check_batch,
    check_curvature,
    check_key,
    discover_few,
    updated,
)
from optax_cgfac.layers.build import RowOptions, Where, make_tags
from optax_cgfac.problem.batch import (
    batched_leaves,
    check_enough,
    check_input_axes,
    slice_examples,
)
from optax_cgfac.problem.loss import Loss
from optax_cgfac.problem.objective import Kind, Reduction, make_objective
from optax_cgfac.utils.devices import (
    warn_of_hanging_lapack,
    with_auto_axes,
    without_shardings,
)
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    check_function,
    check_parameters,
    summarize,
)


class CurvatureEstimator(NamedTuple):
    """A pair of pure functions, as in Optax.

    Attributes:
      init: ``init(params, inputs) -> Curvature`` finds the layers.
      update: ``update(curvature, params, inputs, *, rng=None, targets=None) ->
        Curvature`` captures rows. ``rng`` is a key that nothing else uses; targets are
        for ``kind="empirical"``.
    """

    init: Callable[..., Curvature]
    update: Callable[..., Curvature]


def fisher_estimator(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: str | Loss | Sequence[str | Loss],
    *,
    # the objective
    reduction: Reduction = "mean",
    weights: Callable[[PyTree], PyTree] | None = None,
    # which curvature, of which parameters
    kind: Kind = "mc",
    where: Where | None = None,
    fallback: bool = False,
    whole_batch: bool = False,
    input_axes: PyTree = "auto",
    # how many rows
    examples: int = 32,
    model_examples: int | None = None,
    window: int = WINDOW,
    capture_every: int | None = None,
    positions: int | None = 1,
    weight_sharing: Literal["expand", "reduce"] = "expand",
    # how rows are kept
    rank: int | Literal["auto"] | None = "auto",
    refresh_every: int | None = None,
    rows_dtype: Any = None,
    # devices
    axis_name: str | None = None,
) -> CurvatureEstimator:
    r"""Estimates the Fisher information of every layer from a few examples a step.

    For the loss :math:`\frac1N\sum_n L(f(θ, x_n), y_n)` the Fisher (or generalised
    Gauss-Newton) matrix is :math:`F = \frac1N\sum_n J_nᵀ H_n J_n`, with ``J_n`` the
    Jacobian of the outputs for one example and ``H_n`` the loss Hessian. Every update
    runs the model forward and backward on ``examples`` of the batch and keeps the input
    ``a`` and the output cotangent ``g`` of every layer, for ``window`` updates.

    The options concern, in this order, the objective (``reduction``, ``weights``), what
    is captured (``kind`` to ``input_axes``), how many rows (``examples`` to
    ``weight_sharing``), how they are kept (``rank`` to ``rows_dtype``), and devices.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` applies a Flax Linen model,
        un-jitted, or calls an `nnx.Module` if ``init`` and ``update`` are given one (a
        copy, whose modes it may set). ``outputs`` has shape ``(N, ..., C)``, or is a
        tuple of such arrays.
      loss: ``"softmax_cross_entropy"``, ``"sigmoid_binary_cross_entropy"`` or
        ``"squared_error"``, each summed over the last axis of the outputs, or a
        `Loss`. A tuple of losses, which are added up, for a tuple of outputs.
      reduction: Whether the objective is the ``"mean"`` of all predictions' losses,
        their ``"sum"``, or ``"mean_of_sums"``, a mean over examples only.
      weights: ``weights(inputs)`` returns a weight for each prediction, of shape
        ``(N, ...)``, 0 for padding, or a tuple for a tuple of outputs. A mean divides
        by their sum.
      kind: ``"mc"`` draws targets from the model, an unbiased estimate of ``F``;
        ``"empirical"`` uses the batch's targets, which gives another matrix (Kunstner
        et al. 2019); ``"exact"`` uses all columns of a square root of the loss Hessian
        and costs a backward pass for each number in an example's outputs.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        to precondition; None for all.
      fallback: Accepts parameters that no tag covers, for `cgfac` with ``fallback=``.
      whole_batch: Runs the model on the whole batch instead of a slice, for models
        that compare its examples (BatchNorm in training mode). Still only ``examples``
        become rows, but the curvature keeps a copy of the batch.
      input_axes: A pytree prefix of ``inputs`` with 0 for leaves that have examples on
        their first axis, else None. ``"auto"`` takes the leaves whose first axis is as
        long as that of the outputs.
      examples: Examples captured per update.
      model_examples: Examples kept for the quadratic model of `cgfac`, at most those
        given to ``init``; None for 32, or all with ``whole_batch``.
      window: Number of updates whose rows are kept.
      capture_every: Once the window is full, the interval of updates that capture rows;
        None for at most 8 such that they cost about a sixteenth of the gradients, or
        half of that for at most 32 outputs.
      positions: Positions of each example (of a sequence, of an image) that become
        rows, chosen anew every update and rescaled without bias. None for all, which
        the structures ``"block"`` and ``"full"`` need. Unless it is None, rows of the
        transposed use of a long table (``attend``, more than 2,048 entries) keep one
        entry of the vocabulary's side.
      weight_sharing: Positions become rows of their own, ``"expand"``, or together one
        row, ``"reduce"``: the mean of inputs and the sum of cotangents (Eschenhagen et
        al. 2023). Look-ups are always expanded. If a model flattens examples and
        positions into one axis, examples must be the slowest.
      rank: Eigenpairs kept of each larger Kronecker factor, with which `cgfac` solves.
        ``"auto"`` for a quarter of the batch, or an eighth for at most 32 outputs,
        between 16 and 64. None to solve with all rows.
      refresh_every: Captures between two computations of the eigenpairs, once the
        window is full; None for 8.
      rows_dtype: The dtype in which rows are kept. None for bfloat16 where there are
        eigenpairs of them, float32 parameters and ``positions=1``, otherwise for the
        parameters' own, at least float32. Set it to solve with the rows themselves, by
        `scale_by_cgfac` or another structure.
      axis_name: The mesh axis over which `jax.shard_map` splits the batch. ``update``
        takes a device's own examples and gathers the rows; counts are of all devices.
        Call ``init`` outside, on a whole batch; `Curvature.partition_specs` are its
        specs. Under `jax.jit` alone leave it out.

    Returns:
      A `CurvatureEstimator`.

    Raises:
      ValueError: If an option has no meaning, alone or with another one; see
        ``docs/errors.md``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
      >>> x = jnp.ones((8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x), "squared_error", examples=4
      ... )
      >>> curvature = estimator.init(params, x)
      >>> curvature = estimator.update(curvature, params, x, rng=jax.random.key(1))
      >>> [tag.name for tag in curvature.tags]
      ['layers_0', 'layers_2']

      ``docs/first_loop.md`` has training loops for Linen and for `nnx.Optimizer`.

    References:
      Martens & Grosse (2015), sections 2 and 5; Chen (2021).
    """
    if isinstance(model_fn, (nn.Module, nnx.Module)):
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, got "
            f"{summarize(model_fn)}. Write lambda params, x: model.apply({{'params': "
            "params}, x), or with NNX lambda module, x: module(x)."
        )
    example = "lambda params, x: model.apply({'params': params}, x)"
    check_function("model_fn", model_fn, ["params", "inputs"], example)
    check_input_axes(input_axes)
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
    options = CaptureSpec(
        objective=make_objective(loss, reduction, weights, axis_name),
        kind=kind,
        whole_batch=whole_batch,
        examples=examples,
        model_examples=model_examples,
        window=window,
        capture_every=capture_every,
        positions=positions,
        weight_sharing=weight_sharing,
        rank=rank,
        refresh_every=refresh_every,
        rows_dtype=None if rows_dtype is None else jnp.dtype(rows_dtype).name,
    )

    def init(params: PyTree, inputs: PyTree) -> Curvature:
        return _init(options, model_fn, params, inputs, where, fallback, input_axes)

    def update(
        curvature: Curvature,
        params: PyTree,
        inputs: PyTree,
        *,
        rng: Array | None = None,
        targets: PyTree = None,
    ) -> Curvature:
        check_key(rng, kind, inputs)
        function, params, (inputs,) = bind(model_fn, params, inputs)
        check_curvature(options, function, curvature)
        check_parameters(params)
        curvature.spec.check_parameters(params)
        check_batch(curvature, inputs, targets)
        return with_auto_axes(
            updated, curvature, params, inputs, rng, targets, like=curvature
        )

    return CurvatureEstimator(init, update)


def _init(
    options: CaptureSpec,
    model_fn: Callable[..., PyTree],
    params: PyTree,
    inputs: PyTree,
    where: Where | None,
    fallback: bool,
    input_axes: PyTree,
) -> Curvature:
    """Finds the layers and returns a curvature without rows."""
    function, params, (inputs,) = bind(model_fn, params, inputs)
    check_parameters(params)
    objective = options.objective
    outputs = objective.outputs(jax.eval_shape(function, params, inputs))
    batch_size = outputs[0].shape[0]
    check_enough(batch_size, options.examples)
    batched = batched_leaves(inputs, batch_size, input_axes)
    options = dataclasses.replace(options, batched=batched, batch_size=batch_size)

    def shapes(count: int) -> PyTree:
        return jax.eval_shape(
            lambda x: slice_examples(x, batched, jnp.arange(count)),
            without_shardings(inputs),
        )

    captured, kept = options.captured, options.kept
    discovery = discover_few(function, params, shapes(captured), captured)
    discovery = with_example_axes(discovery, function, params, shapes(2 * captured))
    rows = RowOptions(
        num_examples=captured,
        examples=options.examples,
        columns=objective.num_columns(outputs, options.kind),
        positions=options.positions,
        reduce=options.weight_sharing == "reduce",
        shares=True,
    )
    tags, uncovered = make_tags(discovery, params, rows, where=where, fallback=fallback)
    few_outputs = sum(output.shape[-1] for output in outputs) <= FEW_OUTPUTS
    spec = options.filled(
        tags=tags, uncovered=uncovered, model_fn=function, few_outputs=few_outputs
    )
    warn_of_hanging_lapack()
    _warn_of_mixing(discovery.mixing, min(captured, kept), batch_size)
    few = with_auto_axes(lambda x: slice_examples(x, batched, jnp.arange(kept)), inputs)
    return empty_curvature(spec, few)


def _warn_of_mixing(layers: Sequence[str], taken: int, whole: int) -> None:
    if layers and taken < whole:
        warnings.warn(
            f"BatchNorm in training mode ({', '.join(layers)}) compares the examples "
            f"of a batch, but the estimator runs the model on {taken} of its {whole}. "
            "Pass fisher_estimator(..., whole_batch=True), or run in inference mode.",
            UserWarning,
            stacklevel=4,
        )
