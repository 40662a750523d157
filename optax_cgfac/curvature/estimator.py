"""Public entry point: estimates curvature from captured rows."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac.capture.discover import with_example_axes
from optax_cgfac.capture.nnx.module import bind
from optax_cgfac.curvature.curvature import Curvature, empty_curvature
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
from optax_cgfac.utils.devices import with_auto_axes, without_shardings
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    check_function,
    check_parameters,
    summarize,
    wrong_signature,
)


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
    """A pair of pure functions, as in Optax.

    Attributes:
      init: ``init(params, inputs) -> Curvature``.
      update: ``update(curvature, params, inputs, *, rng=None, targets=None) ->
        Curvature``. ``rng`` is a key of `jax.random.key` that nothing else uses.
    """

    init: InitFn
    update: UpdateFn


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
    window: int = 8,
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
    Jacobian of the model's outputs for one example and ``H_n`` the loss Hessian.
    Every update runs the model forward and backward on ``examples`` of the
    batch and keeps the input ``a`` and the output cotangent ``g`` of every layer;
    the last ``window`` updates count.

    The keyword arguments come in five groups: ``reduction`` and ``weights`` belong to
    the objective; ``kind`` to ``input_axes`` choose what is captured; ``examples`` to
    ``weight_sharing``, how many rows; ``rank`` to ``rows_dtype``, how they are kept;
    ``axis_name`` splits the work over devices.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` applies a Flax Linen model,
        un-jitted, or calls an `nnx.Module` if ``init`` and ``update`` are given one (a
        copy, whose modes it may set). ``outputs`` has shape ``(N, ..., C)``, or is a
        tuple of such arrays.
      loss: ``"softmax_cross_entropy"``, ``"sigmoid_binary_cross_entropy"`` or
        ``"squared_error"``, each summed over the last axis of the outputs, or a
        `Loss`. A tuple of losses, which are added up, for a tuple of outputs.
      reduction: How losses of predictions are joined: their ``"mean"``, their
        ``"sum"``, or ``"mean_of_sums"``, summed over the positions of an example and
        averaged over examples.
      weights: ``weights(inputs)`` returns a weight for each prediction, of shape
        ``(N, ...)``: 0 for padding. A mean divides by their sum. A tuple for a tuple
        of outputs.
      kind: ``"mc"`` draws targets from the model, an unbiased estimate of ``F``;
        ``"empirical"`` uses the batch's targets, which gives another matrix (Kunstner
        et al. 2019); ``"exact"`` uses all columns of a square root of the loss Hessian
        and costs a backward pass for each number in an example's outputs.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        to precondition; None for all.
      fallback: Accepts parameters that no tag covers, for `cgfac` with ``fallback=``.
      whole_batch: Runs the model on all of ``inputs`` instead of a slice, for models
        that compare the examples of a batch (BatchNorm in training mode). Rows are
        still those of ``examples``, but an update costs a forward and backward pass of
        the batch, of which the curvature keeps a copy for the quadratic model.
      input_axes: Which leaves of ``inputs`` have an axis of examples: a pytree
        prefix of ``inputs`` with 0 (first axis) or None, as ``in_axes`` of
        `jax.vmap`. ``"auto"`` takes every leaf whose first axis is as long as that of
        the outputs.
      examples: Examples captured per update.
      model_examples: Examples kept for the quadratic model of `cgfac`, at most those
        given to ``init``; None for 32, or all with ``whole_batch``.
      window: Number of updates whose rows are kept.
      capture_every: Once the window is full, rows are captured at every update of this
        number; None keeps their cost near a sixteenth of the gradient's, or half of
        that for at most 32 outputs, and captures at every eighth at least.
      positions: Positions of each example (of a sequence, of an image) that become
        rows, chosen anew every update and rescaled without bias. None for all, which
        the structures ``"block"`` and ``"full"`` need. Unless it is None, rows of the
        transposed use of a long table (``attend``, more than 2,048 entries) keep one
        entry of the vocabulary's side.
      weight_sharing: Positions at which a layer has the same weights become rows of
        their own, ``"expand"``, or together one row, ``"reduce"``: the mean of inputs
        and the sum of cotangents (Eschenhagen et al. 2023). Look-ups are always
        expanded. If a model flattens examples and positions into one axis, examples
        must be the slowest.
      rank: Eigenpairs kept of each Kronecker factor with more, with which `cgfac`
        solves. ``"auto"`` for a quarter of the batch, an eighth for at most 32
        outputs, between 16 and 64. None to solve with all rows.
      refresh_every: Captures between two computations of the eigenpairs, once the
        window is full; None for 8.
      rows_dtype: The dtype in which rows are kept. None for bfloat16 where there are
        eigenpairs of them, float32 parameters and ``positions=1``, and otherwise the
        parameters' own, at least float32. Set it if `scale_by_cgfac` or another
        structure solves with the rows themselves.
      axis_name: The mesh axis over which `jax.shard_map` splits the batch. ``update``
        takes a device's own examples and gathers the new rows; ``examples`` and
        ``model_examples`` count those of all devices. Call ``init`` outside, on a whole
        batch, and use `Curvature.partition_specs`. None under `jax.jit` alone.

    Returns:
      A `CurvatureEstimator`.

    Raises:
      ValueError: If an option has no meaning, alone or with another one.
      TypeError: If ``model_fn``, ``where`` or ``weights`` is not a function of its
        arguments. Every error and what to do: ``docs/errors.md``.

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

      With NNX the first argument is the module. The optimizer hands ``value_fn`` the
      state of its parameters; ``copy=True`` lets it be called below `jax.lax.cond`:

      >>> from flax import nnx
      >>> from optax_cgfac import cgfac
      >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
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
    _check_model_fn(model_fn)
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
    assert objective is not None
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
    more = shapes(2 * captured)
    discovery = with_example_axes(discovery, function, params, more)
    tags, uncovered = make_tags(
        discovery,
        params,
        RowOptions(
            captured,
            options.examples,
            objective.num_columns(outputs, options.kind),
            options.positions,
            options.weight_sharing == "reduce",
            shares=True,
        ),
        where=where,
        fallback=fallback,
    )
    spec = options.filled(
        tags=tags,
        uncovered=uncovered,
        model_fn=function,
        few_outputs=sum(output.shape[-1] for output in outputs) <= FEW_OUTPUTS,
    )
    _warn_of_hanging_lapack()
    _warn_of_mixing(discovery.mixing, min(captured, kept), batch_size)
    few = with_auto_axes(lambda x: slice_examples(x, batched, jnp.arange(kept)), inputs)
    return empty_curvature(spec, few)


def _check_model_fn(model_fn: Any) -> None:
    is_module = isinstance(model_fn, (nn.Module, nnx.Module, type))
    is_function = callable(model_fn) and not is_module
    signature = wrong_signature(model_fn, 2) if is_function else None
    if not is_function or signature is not None:
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, got "
            f"{summarize(model_fn) if signature is None else f'one of {signature}'}. "
            "Put all that the model takes besides its parameters into one tree of "
            "inputs. For a module write lambda params, x: model.apply({'params': "
            "params}, x), or for one of NNX lambda module, x: module(x)."
        )


def _warn_of_mixing(layers: Sequence[str], taken: int, whole: int) -> None:
    """Warns where layers compare the examples of a batch, but see only some of them."""
    if layers and taken < whole:
        warnings.warn(
            f"BatchNorm in training mode ({', '.join(layers)}) compares the examples "
            f"of a batch, but the estimator runs the model on {taken} of its {whole}: "
            "that is the curvature of another model. Pass fisher_estimator(..., "
            "whole_batch=True), or run the model in inference mode inside model_fn.",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_hanging_lapack() -> None:
    # JAX takes LAPACK from SciPy's OpenBLAS, whose threads may wait for each other for
    # ever if called from several devices at once (seen with 8 devices on 2 cores,
    # jaxlib 0.10.2, `jnp.linalg.eigh` of 64 x 64 matrices).
    is_cpu = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    if is_cpu and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        warnings.warn(
            f"{jax.local_device_count()} CPU devices in one process call LAPACK at "
            "once, and OpenBLAS may then hang. Set OPENBLAS_NUM_THREADS=1 in the "
            "environment before Python starts, or use a process for each device.",
            RuntimeWarning,
            stacklevel=4,
        )
