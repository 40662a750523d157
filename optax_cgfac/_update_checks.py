"""What ``tx.update`` refuses, and what it says."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_cgfac._parameter_checks import dtype_of
from optax_cgfac.curvature.curvature import Curvature, check_rows
from optax_cgfac.utils.paths import leaves_by_path, normalize, text
from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import check_function, describe, is_real_scalar

Missing = Literal["raise", "gradient"]


HOW_TO_UPDATE = """\
  updates, opt_state = tx.update(
      grads, opt_state, params, curvature=curvature,
      value=loss, value_fn=lambda p: loss_fn(p, batch))
or with nnx.Optimizer, whose loop help(optax_cgfac.fisher_estimator) shows,
  optimizer.update(
      module, grads, curvature=curvature, value=loss,
      value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)))"""


def check_curvature(curvature: Any, missing: Missing) -> Curvature | None:
    """Returns the curvature, or None where gradients are to pass through.

    Raises:
      ValueError: If there is none and ``missing`` is ``"raise"``, or its arrays are
        others than its layers ask for.
      TypeError: If it is something else.
    """
    if curvature is None:
        if missing == "gradient":
            return None
        raise ValueError(
            "update() needs the curvature of this step, got None:\n"
            "  curvature = estimator.update(curvature, params, inputs, rng=rng)\n"
            f"{HOW_TO_UPDATE}\n"
            "where estimator = optax_cgfac.fisher_estimator(model_fn, loss). Pass "
            "missing='gradient' to let gradients through without it."
        )
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "curvature must be an optax_cgfac.Curvature from estimator.init or "
            f"estimator.update, got {describe(curvature)}. Pass "
            "curvature=estimator.update(curvature, params, inputs, rng=rng)."
        )
    check_rows(curvature)
    return curvature


def check_state(name: str, state: Any, kind: type) -> None:
    """Checks that an optimizer state is the transformation's own.

    Raises:
      TypeError: If it is something else.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{name}: the optimizer state must be the {kind.__name__} of its own init, "
            f"got {describe(state)}. Call tx.update(grads, opt_state, params, ...) "
            "with opt_state = tx.init(params), and restore checkpoints into the latter."
        )


def check_trees(
    name: str,
    grads: PyTree,
    params: PyTree,
    kept: PyTree,
    num_leaves: int,
    keeps: Callable[[str], bool] = lambda path: True,
) -> None:
    """Checks that gradients, parameters and state belong together.

    Args:
      name: The transformation, for messages.
      grads: The gradients.
      params: The parameters; None not to look at them.
      kept: What the state holds that is like the parameters; None if nothing.
      num_leaves: How many parameters the state was made for.
      keeps: Whether the transformation trains a parameter.

    Raises:
      ValueError: If a structure, a shape or a dtype differs.
      TypeError: If a gradient is no real floating-point array.
    """
    for path, leaf in leaves_by_path(grads).items():
        dtype = dtype_of(leaf)
        real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if not real and keeps(text(path)):
            has = "is no array" if dtype is None else f"has dtype {dtype}"
            raise TypeError(
                f"{name}: gradient {text(path)!r} {has}; expected a real "
                "floating-point array. Pass the gradients of a real loss by real "
                "parameters, jax.grad(loss_fn)(params, batch)."
            )
    if params is not None:
        _check_alike(
            grads,
            params,
            f"{name}: gradients and parameters must be trees of one structure and of "
            "the same shapes",
            "Pass the gradients by these parameters, jax.grad(loss_fn)(params, batch); "
            "convert both by flax.core.unfreeze, or none.",
        )
    again = "Call tx.init(params) again where the parameters have changed."
    if kept is not None:
        _check_alike(
            grads,
            kept,
            f"{name}: the optimizer state must be of the parameters that are trained",
            again,
        )
    elif len(jax.tree.leaves(grads)) != num_leaves:
        raise ValueError(
            f"{name}: the optimizer state must be of the parameters that are trained.\n"
            f"  expected: gradients of {num_leaves} parameters\n"
            f"  got:      gradients of {len(jax.tree.leaves(grads))}\n{again}"
        )


def check_dtypes(name: str, params: PyTree, kept: PyTree) -> None:
    """Checks that parameters have the dtypes that they had at ``tx.init``.

    Raises:
      ValueError: If one has another.
    """
    then = leaves_by_path(kept)
    for path, leaf in leaves_by_path(params).items():
        like = then.get(path)
        if like is None or not jnp.issubdtype(like.dtype, jnp.floating):
            continue
        dtype = jnp.result_type(leaf)
        if dtype != like.dtype:
            raise ValueError(
                f"{name}: parameter {text(path)!r} has another dtype than at "
                f"tx.init(params).\n  expected: {like.dtype}\n"
                f"  got:      {dtype}\n"
                "Cast the parameters back, or call tx.init(params) again."
            )


def check_value(value: Any) -> None:
    """Checks the loss.

    Raises:
      ValueError: If it is no scalar.
      TypeError: If it is no real number.
    """
    if is_real_scalar(value):
        return
    shape = getattr(value, "shape", None)
    error = TypeError if shape is None or shape == () else ValueError
    got = describe(value) if shape is None else f"shape {shape}, {value.dtype}"
    raise error(
        f"value must be the scalar loss of this batch, a real number, got {got}. Pass "
        "value=loss of loss, grads = jax.value_and_grad(loss_fn)(params, batch), "
        "without auxiliary outputs."
    )


def check_value_fn(value_fn: Any) -> None:
    """Checks the loss as a function of the parameters.

    Raises:
      TypeError: If it is no function of one argument.
    """
    check_function("value_fn", value_fn, ["params"], "lambda p: loss_fn(p, batch)")


def check_moved_value(value: Any) -> None:
    """Checks what ``value_fn`` has returned.

    Raises:
      ValueError: If it is no real scalar.
    """
    if not is_real_scalar(value):
        raise ValueError(
            f"value_fn must return the scalar loss, a real number, got "
            f"{describe(value)}. For a loss with auxiliary outputs pass "
            "lambda p: loss_fn(p, batch)[0]."
        )


def _check_alike(grads: PyTree, other: PyTree, rule: str, way_out: str) -> None:
    pairs, structure = jax.tree_util.tree_flatten_with_path(grads)
    try:
        others = structure.flatten_up_to(other)
    except (TypeError, ValueError):
        got, expected = leaves_by_path(grads).keys(), leaves_by_path(other).keys()
        absent = ", ".join(map(text, sorted(expected - got)))
        new = ", ".join(map(text, sorted(got - expected)))
        if absent or new:
            raise ValueError(
                f"{rule}.\n  absent: {absent or 'none'}\n  new:    {new or 'none'}\n"
                f"{way_out}"
            ) from None
        # The same names, in containers of other types.
        raise ValueError(
            f"{rule}.\n  expected: {_short(other)}\n  got:      {_short(grads)}\n"
            f"{way_out}"
        ) from None
    for (path, leaf), like in zip(pairs, others, strict=True):
        if getattr(like, "shape", None) != jnp.shape(leaf):
            raise ValueError(
                f"{rule}: {text(normalize(path))!r}\n"
                f"  expected: {getattr(like, 'shape', describe(like))}\n"
                f"  got:      {jnp.shape(leaf)}\n{way_out}"
            )


def _short(tree: PyTree) -> str:
    whole = str(jax.tree.structure(tree))
    return whole if len(whole) < 200 else f"{whole[:200]}..."
