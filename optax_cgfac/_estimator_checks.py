"""What `fisher_estimator` and its ``update`` refuse, and what they say."""

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac._criterion import Criterion, Kind
from optax_cgfac._curvature import Curvature
from optax_cgfac._modules import check_same_module


def rows_dtype_name(dtype: Any) -> str:
    """Returns the name of the option ``rows_dtype``.

    Raises:
      ValueError: If it is no floating-point dtype.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"rows_dtype must be a floating-point dtype, got {jnp.dtype(dtype).name}."
        )
    return jnp.dtype(dtype).name


def check_options(
    model_fn: Any,
    criterion: Criterion,
    kind: str,
    samples: int,
    weight_sharing: str,
    where: Any,
) -> None:
    """Checks the options of `fisher_estimator`.

    Raises:
      ValueError: If one has no meaning.
      TypeError: If ``model_fn`` is no function.
    """
    if kind not in ("mc", "empirical", "exact"):
        raise ValueError(f"kind must be 'mc', 'empirical' or 'exact', got {kind!r}.")
    for loss in criterion.losses:
        if kind == "exact" and loss.hessian_columns is None:
            raise ValueError(
                f"kind='exact' needs Loss.hessian_columns, which {loss.name!r} lacks."
            )
    if where is not None and not callable(where):
        raise TypeError(
            "where must be a function of a parameter's path, such as "
            f"lambda path: 'Dense' in path; got {type(where).__name__}."
        )
    if samples != 1 and kind != "mc":
        raise ValueError(f"samples={samples} needs kind='mc', got kind={kind!r}.")
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(
            f"weight_sharing must be 'expand' or 'reduce', got {weight_sharing!r}."
        )
    if not callable(model_fn) or isinstance(model_fn, (nn.Module, nnx.Module)):
        raise TypeError(
            "model_fn must be a function (params, inputs) -> outputs, "
            f"got {type(model_fn).__name__}. For a module write "
            "lambda params, x: model.apply({'params': params}, x), or for one of NNX "
            "lambda module, x: module(x)."
        )


def check_update(
    curvature: Curvature, source: tuple, kind: Kind, rng: Any, targets: Any
) -> None:
    """Checks the arguments of ``estimator.update``.

    Raises:
      ValueError: If one is missing, too much, or of another estimator.
      TypeError: If ``curvature`` is something else.
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "estimator.update takes the Curvature that estimator.init returned, got "
            f"{type(curvature).__name__}."
        )
    spec = curvature.spec
    if (spec.model_fn, spec.criterion, spec.options) != source:
        check_same_module(spec.model_fn, source[0])
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
