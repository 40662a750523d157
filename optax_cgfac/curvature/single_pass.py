"""Value, gradient and curvature of a whole batch in one backward pass."""

import collections
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cgfac.capture.call import probe_calls
from optax_cgfac.capture.discover import Discovery, discover, with_example_axes
from optax_cgfac.capture.nnx.module import bind
from optax_cgfac.capture.run import run_captured
from optax_cgfac.curvature.curvature import Curvature, empty_curvature
from optax_cgfac.curvature.spec import CaptureSpec
from optax_cgfac.layers.build import RowOptions, Where, make_tags
from optax_cgfac.layers.extract import Draw, calls_of, example_rows
from optax_cgfac.layers.layer import LayerTag, num_positions
from optax_cgfac.utils.paths import leaves_by_path
from optax_cgfac.utils.types import LayerRows, PyTree
from optax_cgfac.utils.validate import (
    check_choice,
    check_function,
    check_parameters,
    check_positive,
)


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    loss_reduction: Literal["mean", "sum"] = "mean",
    where: Where | None = None,
    fallback: bool = False,
    num_examples: int | None = None,
) -> Callable[..., tuple[Any, PyTree, Curvature]]:
    r"""Like `jax.value_and_grad`, with the empirical Fisher of the same backward pass.

    Every example of the batch is a row: ``a`` the input of a layer and ``g`` the
    gradient of the example's own loss with respect to the layer's output, so that
    ``aᵀ g / N`` is the layer's gradient (Chen 2021, section 3).

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a scalar, or ``(scalar, aux)``;
        it applies a Flax Linen model, un-jitted. ``params`` may be an `nnx.Module`:
        the gradients are then a state as of `nnx.value_and_grad`, and the module keeps
        what the loss changes in it (statistics, counts of keys).
      has_aux: Whether ``loss_fn`` returns ``(scalar, aux)``.
      loss_reduction: ``"mean"`` if the loss is a mean over examples, ``"sum"`` if
        it is their sum.
      where: As in `fisher_estimator`.
      fallback: As in `fisher_estimator`.
      num_examples: Examples in a batch; None finds it from the first axes of
        ``loss_fn``'s arguments and of the layers' inputs.

    Returns:
      A function of ``loss_fn``'s arguments that returns
      ``(value or (value, aux), grads, curvature)``. The curvature has a window of
      one batch; `Curvature.push` it onto ``curvature.with_window(8)`` to keep more.

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
    check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
    if num_examples is not None:
        check_positive("num_examples", num_examples)

    def wrapped(params: PyTree, *args: Any) -> tuple[Any, PyTree, Curvature]:
        module = params
        function, params, args = bind(loss_fn, params, *args)
        check_parameters(params)
        discovery = discover(function, params, *args)
        count = num_examples or _count_examples(discovery, params, args)
        row_options = RowOptions(count, positions=None)
        more = _doubled(args, count)
        discovery = with_example_axes(discovery, function, params, *more)
        tags, uncovered = make_tags(
            discovery, params, row_options, where=where, fallback=fallback
        )

        def tapped(params, probes):
            inputs = (params, *args)
            capture = run_captured(function, inputs, probes, lifted=discovery.lifted)
            value, aux = capture.outputs if has_aux else (capture.outputs, None)
            calls = [root.calls for root in capture.roots]
            return value, (aux, calls, capture.state)

        (value, (aux, calls, state)), (grads, cotangents) = jax.value_and_grad(
            tapped, argnums=(0, 1), has_aux=True
        )(params, discovery.probes)
        if isinstance(module, nnx.Module):
            nnx.update(module, state)
        scale = count if loss_reduction == "mean" else 1
        by_call = probe_calls(cotangents)
        rows = {tag.name: _rows(tag, calls, by_call, count, scale) for tag in tags}
        options = {"kind": "empirical", "positions": None, "rank": None, "window": 1}
        spec = CaptureSpec(**options, examples=count, tags=tags, uncovered=uncovered)
        value = (value, aux) if has_aux else value
        return value, grads, empty_curvature(spec).push_rows(rows)

    return wrapped


def _rows(tag: LayerTag, calls: Any, by_call: Any, count: int, scale: int) -> LayerRows:
    """Returns a row for every example, its cotangents multiplied by ``scale``."""
    found = calls_of(tag, calls, by_call)
    # The cotangents of a transposed use stand on the other side.
    found = [c._replace(y=c.y * jnp.asarray(scale, c.y.dtype)) for c in found]
    return example_rows(tag, found, count, Draw())


def _doubled(args: PyTree, count: int) -> PyTree:
    """Returns the shapes of the arguments with twice as many examples."""

    def double(leaf: Any) -> Any:
        like = jax.eval_shape(jnp.asarray, leaf)
        first = tuple(2 * n if n == count else n for n in like.shape[:1])
        return jax.ShapeDtypeStruct(first + like.shape[1:], like.dtype)

    return jax.tree.map(double, args)


def _count_examples(discovery: Discovery, params: PyTree, args: PyTree) -> int:
    """Returns the commonest first axis of arguments and calls that divides all rows."""
    leaves = leaves_by_path(params)
    from_args = collections.Counter(
        leaf.shape[0] for leaf in jax.tree.leaves(args) if jnp.ndim(leaf)
    )
    from_calls: collections.Counter[int] = collections.Counter()
    positions = []
    for anchor, layer in discovery.layers.items():
        lifted = leaves[anchor].ndim - layer.call.param_ndim
        for call, shape in layer.calls:
            first = max(lifted, len(shape) - call.input_ndim) + call.batch_ndim
            positions.append(num_positions(call, shape, lifted + call.batch_ndim))
            if len(shape) - call.inner_ndim > first:
                from_calls[shape[first]] += 1
    counts = from_args + from_calls
    # Running statistics among the arguments begin with an axis of features, so lengths
    # that occur in both arguments and layers come first.
    both = from_args.keys() & from_calls.keys()
    ranked = sorted(
        counts, key=lambda n: (n not in both, n not in from_args, -counts[n])
    )
    if not positions or not ranked:
        raise ValueError(
            "loss_fn was traced without meeting a layer that can be tagged. It must "
            "call model.apply un-jitted; the whole training step may be jitted."
        )
    divide_all = (n for n in ranked if n and not any(rows % n for rows in positions))
    return next(divide_all, ranked[0])
