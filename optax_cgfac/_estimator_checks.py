"""What `fisher_estimator` and its ``update`` refuse, and what they say."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac._curvature import Curvature
from optax_cgfac._curvature_checks import check_rows
from optax_cgfac._curvature_spec import CurvatureSpec
from optax_cgfac._parameter_checks import check_parameters, check_same_parameters
from optax_cgfac.capture.nnx.module import check_same_module
from optax_cgfac.problem.objective import Criterion, Kind
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    check_choice,
    check_function,
    check_positive,
    check_switch,
    describe,
    is_number,
    signature_of,
    takes,
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
            f"rows_dtype must be a floating-point dtype, got {describe(dtype)}. Pass "
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
    criterion: Criterion,
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
    for loss in criterion.losses:
        if kind == "exact" and loss.hessian_columns is None:
            raise ValueError(
                f"kind='exact' needs Loss.hessian_columns, which {loss.name!r} lacks. "
                "Pass one with hessian_columns=..., or use kind='mc'."
            )
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
    if kind != "mc" and not (is_number(samples) and samples == 1):
        raise ValueError(
            f"samples={describe(samples)} needs kind='mc', got kind={kind!r}. Drop "
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
            f"{describe(model_fn)}. {how}"
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
            f"{describe(curvature)}. Call estimator.update(curvature, params, inputs, "
            "...) with curvature = estimator.init(params, inputs)."
        )
    spec = curvature.spec
    if (spec.model_fn, spec.criterion, spec.options) != source:
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
            f"kind={kind!r} takes no targets, got {describe(targets)}: they come from "
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
        own = " or rng=rngs() of nnx.Rngs" if "Rng" in describe(rng) else ""
        raise TypeError(f"rng must be a key, got {describe(rng)}: {way_out[:-1]}{own}.")
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        key, count = rng, shape
    else:
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        if dtype != data.dtype or shape[-1:] != data.shape:
            raise TypeError(
                f"rng must be a key, got {describe(rng)}: {way_out} Keys of the old "
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
