"""Checks of arguments, and how messages show a value.

They read types, shapes and plain numbers, never the entries of an array, so that they
work under `jax.jit`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import PyTree


class Range(NamedTuple):
    """The numbers that an option may be: in words, and as a test."""

    text: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("be finite and not negative", lambda x: 0 <= x < math.inf)
POSITIVE = Range("be finite and positive", lambda x: 0 < x < math.inf)
FINITE = Range("be finite", math.isfinite)
BELOW_ONE = Range("lie in [0, 1)", lambda x: 0 <= x < 1)
INSIDE_ONE = Range("lie in (0, 1)", lambda x: 0 < x < 1)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a plain number; `optax.inject_hyperparams` makes others."""
    return isinstance(value, (int, float, np.integer, np.floating))


def is_real_scalar(value: Any) -> bool:
    """Whether a value is one real number, plain or as an array."""
    dtype = dtype_of(value)
    if isinstance(value, bool) or dtype is None or getattr(value, "shape", ()) != ():
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a real floating-point array, or its shape."""
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of an array or a number; None for anything else."""
    if isinstance(leaf, (bool, int, float, complex)):
        return jnp.result_type(leaf)
    return leaf.dtype if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else None


def summarize(value: Any) -> str:
    """Short description of a value for error messages."""
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        article = "an" if str(value.dtype)[0] in "aeio" else "a"
        return f"{article} {value.dtype} array of shape {value.shape}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_number(name: str, value: Any, allowed: Range, example: Any) -> None:
    """Checks an option that is one real number, plain or traced."""
    hint = ", or let optax.inject_hyperparams take the schedule" * callable(value)
    way_out = f"got {summarize(value)}. Pass a number such as {name}={example}{hint}."
    if getattr(value, "shape", ()) != ():
        raise ValueError(f"{name} must be one number, {way_out}")
    if not is_real_scalar(value):
        raise TypeError(f"{name} must be a number, {way_out}")
    is_known = is_number(value) or isinstance(value, np.ndarray)
    if is_known and not allowed.holds(float(np.asarray(value))):
        raise ValueError(f"{name} must {allowed.text}, {way_out}")


def check_number_or_schedule(
    name: str, value: Any, allowed: Range, example: Any
) -> None:
    """Checks an option that is a number or a schedule; see `check_number`."""
    if callable(value):
        check_function(name, value, ["count"], f"lambda count: {example}")
    else:
        check_number(name, value, allowed, example)


def check_scheduled(name: str, value: Any) -> None:
    """Checks the result of a schedule."""
    check_number(f"The result of {name}", value, Range("be", lambda x: True), 0.1)


def check_positive(name: str, value: Any, *, may_be_array: bool = False) -> None:
    """Checks a positive int, or an array as `optax.inject_hyperparams` makes it."""
    if may_be_array and isinstance(value, jax.Array) and is_real_scalar(value):
        return
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 1:
        raise ValueError(
            f"{name} must be an int of at least 1, got {summarize(value)}. "
            f"Pass a Python int such as {name}=8."
        )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks an option that is one of a few names."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, "
            f"got {summarize(value)}. Pass {name}={choices[0]!r}, say."
        )


def check_function(
    name: str, value: Any, arguments: Sequence[str], example: str
) -> None:
    """Checks an option that is a function of these arguments."""
    is_function = callable(value) and not isinstance(value, type)
    signature = wrong_signature(value, len(arguments)) if is_function else None
    if not is_function or signature is not None:
        raise TypeError(
            f"{name} must be a function, called as {name}({', '.join(arguments)}), "
            f"such as {example}; got "
            f"{summarize(value) if signature is None else f'one of {signature}'}."
        )


def wrong_signature(
    function: Callable[..., Any], count: int
) -> inspect.Signature | None:
    """Returns a function's signature if it does not take ``count`` arguments."""
    try:
        # A decorated function may take other arguments than the one it wraps.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return signature
    return None


def leaf_types(tree: PyTree) -> dict[str, str]:
    """Returns the dtype and shape of every leaf by its path."""
    leaves = leaves_by_path(tree).items()
    return {text(p): f"{jnp.result_type(x)} {jnp.shape(x)}" for p, x in leaves}


def check_alike(
    rule: str, expected: dict[str, str], got: dict[str, str], way_out: str
) -> None:
    """Checks that two trees have the same `leaf_types`."""
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise ValueError(
                f"{rule}: {name!r}\n  expected: {expected.get(name)}\n"
                f"  got:      {got.get(name)}\n{way_out}"
            )


def check_parameters(params: PyTree) -> None:
    """Checks that parameters are a tree of real floating-point arrays."""
    leaves = leaves_by_path(params)
    if not leaves or () in leaves:
        raise TypeError(
            f"params must be a tree of named parameters, got {summarize(params)}. Pass "
            "model.init(key, x)['params'] or an nnx.Module first, and inputs second."
        )
    for path, leaf in leaves.items():
        if not is_floating(leaf):
            raise TypeError(
                "All parameters must be real floating-point arrays; "
                f"{text(path)!r} is {summarize(leaf)}. Pass the nnx.Module itself or "
                "nnx.state(module, nnx.Param), and counters and statistics in inputs."
            )
