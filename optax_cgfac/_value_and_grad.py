"""The paper's single pass: value, gradient and curvature of the whole batch."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_cgfac._curvature import Curvature, CurvatureSpec, empty_curvature
from optax_cgfac._layers import example_rows
from optax_cgfac._linen import probe_calls, run_captured
from optax_cgfac._paths import leaves_by_path
from optax_cgfac._tagging import Discovery, Rows, Where, calls_of, discover, make_tags
from optax_cgfac._types import Array, LayerRows, PyTree


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    loss_reduction: Literal["mean", "sum"] = "mean",
    where: Where | None = None,
    fallback: bool = False,
) -> Callable[..., tuple[Any, PyTree, Curvature]]:
    r"""Like `jax.value_and_grad`, with the empirical Fisher of the same backward pass.

    Every example of the batch is a row: ``a`` the input of a layer and ``g`` the
    gradient of the example's own loss with respect to the layer's output, so that
    ``aᵀ g / N`` is the layer's gradient. Nothing is computed twice (Chen 2021,
    section 3).

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a scalar, or ``(scalar, aux)``;
        it applies a Flax Linen model, un-jitted.
      has_aux: Whether ``loss_fn`` returns ``(scalar, aux)``.
      loss_reduction: ``"mean"`` if the loss is a mean over examples, ``"sum"`` if
        it is their sum.
      where: As in `fisher_estimator`.
      fallback: As in `fisher_estimator`.

    Returns:
      A function of ``loss_fn``'s arguments that returns
      ``(value or (value, aux), grads, curvature)``. The curvature has a window of
      one batch; `Curvature.push` it onto ``curvature.with_window(8)`` to keep more.

    Raises:
      ValueError: If ``loss_reduction`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model = nn.Dense(1)
      >>> x = jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> value, grads, curvature = value_and_grad(loss_fn)(params, x)
      >>> curvature.layers["."].a.shape
      (4, 4)

    References:
      Chen (2021), section 3; Kunstner et al. (2019) on the empirical Fisher.
    """
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}."
        )

    def wrapped(params: PyTree, *args: Any) -> tuple[Any, PyTree, Curvature]:
        discovery = discover(loss_fn, params, *args)
        _check_scalar(discovery.outputs, has_aux)
        num_examples = _count_examples(discovery, params)
        rows = Rows(num_examples, all_positions=True)
        tags, uncovered = make_tags(
            discovery, params, rows, where=where, fallback=fallback
        )

        def tapped(params, probes):
            capture = run_captured(loss_fn, (params, *args), probes)
            value, aux = capture.outputs if has_aux else (capture.outputs, None)
            return value, (aux, [root.calls for root in capture.roots])

        (value, (aux, calls)), (grads, cotangents) = jax.value_and_grad(
            tapped, argnums=(0, 1), has_aux=True
        )(params, discovery.probes)
        scale = num_examples if loss_reduction == "mean" else 1
        by_call = probe_calls(cotangents)
        captured = {}
        for tag in tags:
            a, g = example_rows(tag, calls_of(tag, calls, by_call), num_examples)
            captured[tag.name] = LayerRows(
                _flat(a), _flat(g) * jnp.asarray(scale, g.dtype)
            )
        curvature = empty_curvature(CurvatureSpec(tags, uncovered, window=1))
        value = (value, aux) if has_aux else value
        return value, grads, curvature.push_rows(captured)

    return wrapped


def _flat(rows: Array) -> Array:
    """``(*stack, N, T, n) -> (*stack, N·T, n)``."""
    return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])


def _check_scalar(outputs: Any, has_aux: bool) -> None:
    is_pair = isinstance(outputs, tuple) and len(outputs) == 2
    value = outputs[0] if has_aux and is_pair else outputs
    if getattr(value, "shape", None) != () or has_aux != is_pair:
        expected = "a pair (scalar, aux)" if has_aux else "a scalar"
        raise ValueError(
            f"loss_fn must return {expected}, got {outputs}. "
            "Set has_aux=True if it returns (loss, aux)."
        )


def _count_examples(discovery: Discovery, params: PyTree) -> int:
    """Returns the length of the first axis of rows, the same in every layer."""
    leaves = leaves_by_path(params)
    for kernel, sources in discovery.sources.items():
        call, shape = sources[0].calls[0]
        stack = leaves[kernel].ndim - call.contract_ndim - call.feature_ndim
        added = len(shape) - call.input_ndim
        if len(shape) > max(stack, added) + 1:
            return shape[max(stack, added + call.batch_ndim)]
    raise ValueError(
        "loss_fn was traced without meeting a layer that can be tagged. It must call "
        "model.apply un-jitted; the whole training step may be jitted."
    )
