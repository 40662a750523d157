"""The user's way to curvature: `fisher_estimator`."""

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
from optax_cgfac.capture.nnx.module import bind, check_same_module
from optax_cgfac.curvature.curvature import Curvature, check_rows, empty_curvature
from optax_cgfac.curvature.spec import (
    FEW_OUTPUTS,
    CurvatureSpec,
    default_capture_every,
    default_rank,
)
from optax_cgfac.curvature.update import CaptureOptions, captured_rows, discover_few
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
from optax_cgfac.problem.objective import Kind, Objective, Reduction, make_objective
from optax_cgfac.utils.devices import per_device, with_auto_axes, without_shardings
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    check_choice,
    check_function,
    check_positive,
    check_switch,
    is_number,
    signature_of,
    summarize,
    takes,
)

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
    examples: int = 32,
    model_examples: int = 32,
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
    Every update runs the model forward and backward on ``examples`` of the
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
      examples: Examples captured per update.
      model_examples: Examples kept for the Gauss-Newton products of `cgfac`; fewer if
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
        rows are those of ``examples`` still, and the Gauss-Newton products of
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
        ``examples`` and ``model_examples`` count those of all devices. ``init`` runs
        outside, on a whole batch, and `Curvature.partition_specs` are its specs. Under
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
    objective = make_objective(loss, reduction, weights, axis_name)
    check_options(model_fn, objective, kind, samples, weight_sharing, where)
    counts = {"window": window, "examples": examples, "model_examples": model_examples}
    counts |= {"samples": samples, "refresh_every": refresh_every}
    counts |= {"capture_every": capture_every, "positions": positions}
    switches = {"fallback": fallback, "whole_batch": whole_batch}
    check_estimator_counts(counts, rank, switches)
    check_input_axes(input_axes)
    dtype = None if rows_dtype is None else rows_dtype_name(rows_dtype)
    options = (
        kind,
        window,
        examples,
        model_examples,
        samples,
        weight_sharing,
        positions,
        whole_batch,
        rank,
        refresh_every,
        capture_every,
    )

    capture_options = CaptureOptions(objective, kind, examples, samples, whole_batch)

    def init(params: PyTree, inputs: PyTree) -> Curvature:
        check_inputs(inputs)
        function, params, (inputs,) = bind(model_fn, params, inputs)
        check_parameters(params)
        heads = objective.heads(jax.eval_shape(function, params, inputs))
        num_examples = heads[0].shape[0]
        check_enough(num_examples, examples)
        batched = batched_leaves(inputs, num_examples, input_axes)

        def shapes(count: int) -> PyTree:
            return jax.eval_shape(
                lambda x: slice_examples(x, batched, jnp.arange(count)),
                without_shardings(inputs),
            )

        num_outputs = sum(head.shape[-1] for head in heads)
        captured = num_examples if whole_batch else examples
        discovery = discover_few(function, params, shapes(captured), captured)
        more = shapes(2 * captured)
        discovery = with_example_axes(discovery, function, params, more)
        row_options = RowOptions(
            captured,
            examples,
            objective.num_columns(heads, kind, samples),
            positions,
            weight_sharing == "reduce",
            shares=True,
        )
        tags, uncovered = make_tags(
            discovery, params, row_options, where=where, fallback=fallback
        )
        few_outputs = num_outputs <= FEW_OUTPUTS
        pairs = default_rank(num_examples, few_outputs) if rank == "auto" else rank
        spec = CurvatureSpec(
            tags,
            uncovered,
            window,
            function,
            objective,
            options,
            batched,
            objective.factor(num_examples),
            examples,
            pairs,
            refresh_every,
            num_examples,
            capture_every or default_capture_every(captured, num_examples, few_outputs),
            few_outputs,
            dtype,
            positions == 1,
        )
        kept = num_examples if whole_batch else min(model_examples, num_examples)
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
        source = (function, objective, options)
        check_update(curvature, source, params, kind, targets)
        captured = per_device("examples", examples, axis_name)
        kept_inputs = curvature.model_inputs
        batched = curvature.spec.batched
        num_examples = check_examples(inputs, batched, kept_inputs, captured)
        check_targets(targets, num_examples, objective.num_targets)

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


def rows_dtype_name(dtype: Any) -> str:
    """Returns the name of the option ``rows_dtype``.

    Raises:
      ValueError: If it is no floating-point dtype.
      TypeError: If it is no dtype at all.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"rows_dtype must be a floating-point dtype, got {summarize(dtype)}. Pass "
            "rows_dtype='float32' or rows_dtype=jnp.bfloat16."
        ) from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"rows_dtype must be a floating-point dtype, got {found.name}. Pass "
            "rows_dtype='float32' or rows_dtype='bfloat16'."
        )
    return found.name


def check_options(
    model_fn: Any,
    objective: Objective,
    kind: Any,
    samples: Any,
    weight_sharing: Any,
    where: Any,
) -> None:
    """Checks the options of `fisher_estimator` that are names and functions.

    Raises:
      ValueError: If one has no meaning.
      TypeError: If ``model_fn`` or ``where`` is no function of its arguments.
    """
    check_choice("kind", kind, ("mc", "empirical", "exact"))
    for loss in objective.losses:
        if kind == "exact" and loss.hessian_columns is None:
            raise ValueError(
                f"kind='exact' needs Loss.hessian_columns, which {loss.name!r} lacks. "
                "Pass one with hessian_columns=..., or use kind='mc'."
            )
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
    if kind != "mc" and not (is_number(samples) and samples == 1):
        raise ValueError(
            f"samples={summarize(samples)} needs kind='mc', got kind={kind!r}. Drop "
            "samples=, or draw targets by kind='mc'."
        )
    check_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
    _check_model_fn(model_fn)


def _check_model_fn(model_fn: Any) -> None:
    how = (
        "For a module write lambda params, x: model.apply({'params': params}, x), or "
        "for one of NNX lambda module, x: module(x)."
    )
    is_module = isinstance(model_fn, (nn.Module, nnx.Module, type))
    if is_module or not callable(model_fn):
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, got "
            f"{summarize(model_fn)}. {how}"
        )
    signature = signature_of(model_fn)
    if signature is not None and not takes(signature, 2):
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, got one of "
            f"{signature}. Put all that the model takes beside its parameters into one "
            f"tree of inputs. {how}"
        )


def check_estimator_counts(
    counts: dict[str, Any], rank: Any, switches: dict[str, Any]
) -> None:
    """Checks the options of `fisher_estimator` that are numbers or switches.

    Args:
      counts: Those that are ints, by name; None where that means something else.
      rank: The option.
      switches: Those that are on or off, by name.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If a switch is none.
    """
    for name, value in counts.items():
        if name in ("capture_every", "positions"):
            if value is not None:
                check_positive(name, value, others="None or ")
        else:
            check_positive(name, value)
    is_auto = isinstance(rank, str) and rank == "auto"
    if rank is not None and not is_auto:
        check_positive("rank", rank, others="'auto', None or ")
    for name, value in switches.items():
        hint = ""
        if name == "fallback":
            hint = "; the other optimizer itself goes to cgfac(fallback=..., where=...)"
        check_switch(name, value, hint)


def check_update(
    curvature: Curvature, source: tuple, params: PyTree, kind: Kind, targets: Any
) -> None:
    """Checks the arguments of ``estimator.update``, but for its key and its inputs.

    Raises:
      ValueError: If one is missing, too much, or of another estimator.
      TypeError: If ``curvature`` is something else.
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "estimator.update takes the Curvature that estimator.init returned, got "
            f"{summarize(curvature)}. Call estimator.update(curvature, params, inputs, "
            "...) with curvature = estimator.init(params, inputs)."
        )
    spec = curvature.spec
    if (spec.model_fn, spec.objective, spec.options) != source:
        check_same_module(spec.model_fn, source[0])
        raise ValueError(
            "estimator.update needs a curvature of its own estimator, got one that "
            f"comes from another estimator or from value_and_grad ({_told(spec)}). "
            "Call estimator.init(params, inputs) of the one that updates it, and make "
            "the estimator once, not at every step."
        )
    check_rows(curvature)
    check_parameters(params)
    check_same_parameters(curvature, params)
    if kind == "empirical" and targets is None:
        raise ValueError(
            "kind='empirical' needs targets, got None: pass targets=batch_targets."
        )
    if kind != "empirical" and targets is not None:
        raise ValueError(
            f"kind={kind!r} takes no targets, got {summarize(targets)}: they come from "
            "the model's own distribution. Drop targets= or use kind='empirical'."
        )


def checked_key(rng: Any, kind: Kind, inputs: PyTree) -> Array | None:
    """Returns the key of an update as a typed one.

    Args:
      rng: A key, typed or of the old kind (uint32), or None.
      kind: As in `fisher_estimator`.
      inputs: The user's inputs, which may hold keys of the model.

    Returns:
      The key, or None if there is none.

    Raises:
      ValueError: If there is none for ``"mc"``, there are several, or it is a key of
        the model too.
      TypeError: If it is something else.
    """
    way_out = (
        "pass rng=jax.random.fold_in(key, step), a new key for every update, with key "
        "= jax.random.key(seed)."
    )
    if rng is None:
        if kind == "mc":
            raise ValueError(
                f"kind='mc' draws targets from the model and needs a key, got None: "
                f"{way_out}"
            )
        return None
    if any(leaf is rng for leaf in jax.tree.leaves(inputs)):
        raise ValueError(
            "rng must be a key of its own, got one that inputs hold too: the model and "
            "the estimator would draw the same numbers. Split it before, key, rng = "
            "jax.random.split(key)."
        )
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    if dtype is None or shape is None or isinstance(rng, nnx.Rngs | nnx.RngStream):
        own = " or rng=rngs() of nnx.Rngs" if "Rng" in summarize(rng) else ""
        raise TypeError(
            f"rng must be a key, got {summarize(rng)}: {way_out[:-1]}{own}."
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        key, count = rng, shape
    else:
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        if dtype != data.dtype or shape[-1:] != data.shape:
            raise TypeError(
                f"rng must be a key, got {summarize(rng)}: {way_out} Keys of the old "
                f"kind are {data.dtype} arrays of shape {data.shape}."
            )
        key, count = jax.random.wrap_key_data(jnp.asarray(rng)), shape[:-1]
    if count != ():
        raise ValueError(
            f"rng must be one key, got an array of {count} of them: pass one of them, "
            "rng=keys[step]."
        )
    return key


def _told(spec: CurvatureSpec) -> str:
    return f"window {spec.window}, layers {', '.join(tag.name for tag in spec.tags)}"


def warn_of_mixing(layers: Sequence[str], taken: Sequence[int], whole: int) -> None:
    """Warns where layers compare the examples of a batch, and see some of them only.

    Args:
      layers: Names of such layers.
      taken: How many examples are captured, and kept for the quadratic model.
      whole: How many the batch has.
    """
    if layers and min(taken) < whole:
        warnings.warn(
            f"BatchNorm in training mode ({', '.join(layers)}) compares the examples "
            f"of a batch, but the estimator runs the model on {min(taken)} of its "
            f"{whole}: that is the curvature of another model. Pass "
            "fisher_estimator(..., whole_batch=True), or run the model in inference "
            "mode inside model_fn.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_hanging_lapack() -> None:
    """Warns where several CPU devices of one process would call LAPACK at once.

    JAX takes LAPACK from SciPy's OpenBLAS, whose threads, called from several devices
    at once, may wait for each other for ever (seen with 8 devices on 2 cores, jaxlib
    0.10.2, `jnp.linalg.eigh` of 64 x 64 matrices).
    """
    is_cpu = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    if is_cpu and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        warnings.warn(
            f"{jax.local_device_count()} CPU devices in one process call LAPACK at "
            "once, and OpenBLAS may then hang. Set OPENBLAS_NUM_THREADS=1 in the "
            "environment before Python starts, or use a process for each device.",
            RuntimeWarning,
            stacklevel=3,
        )


def check_parameters(params: PyTree) -> None:
    """Checks the parameters of a model whose layers are to be found.

    Args:
      params: A tree of arrays or shapes.

    Raises:
      ValueError: If there are none.
      TypeError: If they are no tree, or one is no real floating-point array.
    """
    leaves = leaves_by_path(params)
    if not leaves:
        raise ValueError(
            f"params has no leaves (got {summarize(params)}): there is nothing to "
            "precondition. Pass the tree of parameters, such as "
            "model.init(key, x)['params'], or an nnx.Module that has some."
        )
    if () in leaves:
        raise TypeError(
            "params must be a tree of named parameters, got "
            f"{summarize(params)}. Pass the parameters first and the inputs second."
        )
    for path, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"Parameter {text(path)!r} is {summarize(leaf)}; expected an array. "
                "Convert numbers by jax.tree.map(jnp.asarray, params), and leave "
                "anything else to model_fn."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            way_out = (
                "Make counters and statistics nnx.Variables, not nnx.Params."
                if isinstance(params, nnx.State)
                else "Pass counters and statistics inside inputs, and split complex "
                "numbers into two real arrays."
            )
            raise TypeError(
                f"Parameter {text(path)!r} has dtype {leaf.dtype}; parameters must be "
                f"real floating-point arrays. {way_out}"
            )


def check_same_parameters(curvature: Curvature, params: PyTree) -> None:
    """Checks that parameters are those whose layers a curvature holds.

    Args:
      curvature: The curvature.
      params: The parameters of an update.

    Raises:
      ValueError: If their names, shapes or precision differ from `init`'s.
    """
    again = (
        "\nThe model has changed: call estimator.init(params, inputs) again, and start "
        "with the curvature it returns."
    )
    leaves = leaves_by_path(params)
    known = {leaf for tag in curvature.tags for leaf in tag.leaves}
    known |= {path for path, _ in curvature.spec.uncovered}
    if leaves.keys() != known:
        raise ValueError(
            "params must have the parameters that estimator.init was given.\n"
            f"  absent: {_listed(known - leaves.keys())}\n"
            f"  new:    {_listed(leaves.keys() - known)}{again}"
        )
    for tag in curvature.tags:
        for path, shape in zip(tag.leaves, tag.shapes, strict=True):
            if leaves[path].shape != shape:
                raise ValueError(
                    f"Parameter {text(path)!r} has another shape than at "
                    f"estimator.init.\n  expected: {shape}\n"
                    f"  got:      {leaves[path].shape}{again}"
                )
        # Half precision is solved in float32, as float32 is.
        dtype = jnp.result_type(leaves[tag.leaves[0]].dtype)
        if jnp.promote_types(dtype, jnp.float32) != tag.dtype:
            raise ValueError(
                f"Parameter {text(tag.leaves[0])!r} has dtype {dtype}, and the "
                f"curvature was initialised for {tag.dtype}. Cast the parameters, or "
                "call estimator.init(params, inputs) again."
            )


def _listed(paths: set[tuple[str, ...]]) -> str:
    return ", ".join(map(text, sorted(paths))) or "none"
