"""Checks of options: numbers, counts, switches, functions.

All of them look at types, shapes and plain numbers only, and never at what an array on
a device holds, so that they do the same under `jax.jit`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.utils.types import Array


class Range(NamedTuple):
    """The numbers that an option may be.

    Attributes:
      text: What it must do, for messages.
      holds: Whether a number is one of them.
    """

    text: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("be finite and not negative", lambda x: 0 <= x < math.inf)


POSITIVE = Range("be finite and positive", lambda x: 0 < x < math.inf)


FINITE = Range("be finite", math.isfinite)


BELOW_ONE = Range("lie in [0, 1)", lambda x: 0 <= x < 1)


INSIDE_ONE = Range("lie in (0, 1)", lambda x: 0 < x < 1)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether an option is a plain number, whose value is known now.

    `optax.inject_hyperparams` turns the numbers of a transformation into traced
    arrays, whose values cannot be checked.

    Args:
      value: The option.

    Returns:
      True for an int or a float.

    Example:
      >>> is_number(0.1), is_number(None)
      (True, False)
    """
    return isinstance(value, (int, float, np.integer, np.floating))


def summarize(value: Any) -> str:
    """Returns what a message says of an argument: no contents, no tracers.

    Args:
      value: Anything.

    Returns:
      A few words.

    Example:
      >>> import jax.numpy as jnp
      >>> summarize(jnp.ones(3)), summarize("a"), summarize({})
      ('a float32 array of shape (3,)', "'a'", 'dict')
    """
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        article = "an" if str(value.dtype)[0] in "aeio" else "a"
        return f"{article} {value.dtype} array of shape {value.shape}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, np.generic):
        return f"{value.dtype} {value}"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_number(name: str, value: Any, allowed: Range, example: Any) -> None:
    """Checks an option that is one number, or a traced one.

    Args:
      name: The option, for the message.
      value: Its value.
      allowed: What it may be, as far as its value is known now.
      example: A value that makes sense.

    Raises:
      ValueError: If it is another number, or several.
      TypeError: If it is no number.

    Example:
      >>> check_number("l2", 0.1, NOT_NEGATIVE, 1e-4)
    """
    way_out = f"Pass a number such as {name}={example}."
    if callable(value):
        raise TypeError(
            f"{name} must be a number, got a function: it takes no schedule by itself. "
            f"{way_out[:-1]}, or let optax.inject_hyperparams take the schedule."
        )
    is_array = isinstance(value, (jax.Array, np.ndarray))
    if is_array and not _is_real(value.dtype):
        raise TypeError(
            f"{name} must be a real number, got {summarize(value)}. {way_out}"
        )
    if is_array and value.shape != ():
        raise ValueError(
            f"{name} must be one number, got {summarize(value)}. {way_out}"
        )
    if isinstance(value, jax.Array):
        return
    if not is_array and (not is_number(value) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number, got {summarize(value)}. {way_out}")
    if not allowed.holds(float(value)):
        raise ValueError(f"{name} must {allowed.text}, got {value}. {way_out}")


def check_number_or_schedule(
    name: str, value: Any, allowed: Range, example: Any
) -> None:
    """Checks an option that is a number or a schedule; see `check_number`.

    Raises:
      ValueError: If it is another number, or several.
      TypeError: If it is neither, or a function of something else.
    """
    if not callable(value):
        check_number(name, value, allowed, example)
        return
    check_function(name, value, ["count"], f"lambda count: {example}")


def check_scheduled(name: str, value: Any) -> None:
    """Checks what a schedule has returned.

    Raises:
      ValueError: If it is an array of several numbers.
      TypeError: If it is no real number.
    """
    if not is_real_scalar(value):
        error = ValueError if jnp.ndim(_array_or_zero(value)) else TypeError
        raise error(
            f"The schedule {name} must return one real number, got {summarize(value)}. "
            f"Write {name}=lambda count: ... with a scalar for the count of updates."
        )


def check_positive(
    name: str, value: Any, *, may_be_array: bool = False, others: str = ""
) -> Any:
    """Returns ``value`` if it is a positive int, or an array where that is allowed.

    Args:
      name: The option, for the message.
      value: Its value.
      may_be_array: Whether it may be an array, as `optax.inject_hyperparams` makes it.
      others: What else the option may be, for the message: ``"None or "``.

    Returns:
      The value.

    Raises:
      ValueError: If it is no int, or less than 1.

    Example:
      >>> check_positive("rows", 32)
      32
    """
    if may_be_array and isinstance(value, Array) and is_real_scalar(value):
        return value
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 1:
        raise ValueError(
            f"{name} must be {others}an int of at least 1, got {summarize(value)}. "
            f"Pass a Python int such as {name}=8."
        )
    return value


def check_damping(damping: Any) -> None:
    """Checks a damping: a number, a traced one, or a schedule.

    Raises:
      ValueError: If it is negative, not finite, or several numbers.
      TypeError: If it is no number and no schedule.
    """
    check_number_or_schedule("damping", damping, NOT_NEGATIVE, 0.1)


def check_switch(name: str, value: Any, hint: str = "") -> None:
    """Checks an option that is on or off.

    Args:
      name: The option, for the message.
      value: Its value.
      hint: What else may have been meant.

    Raises:
      TypeError: If it is no bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{name} must be True or False, got {summarize(value)}. "
            f"Pass {name}=True or {name}=False{hint}."
        )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks an option that is one of a few names.

    Raises:
      ValueError: If it is something else.
    """
    # An array compares entry by entry.
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, "
            f"got {summarize(value)}. Pass {name}={choices[0]!r}, say."
        )


def check_function(
    name: str, value: Any, arguments: Sequence[str], example: str
) -> None:
    """Checks an option that is a function of so many arguments.

    Args:
      name: The option, for the message.
      value: Its value.
      arguments: The names of what it is called with.
      example: Code of one.

    Raises:
      TypeError: If it is none, or takes other arguments.

    Example:
      >>> check_function("where", lambda path: True, ["path"], "lambda path: True")
    """
    called = f"{name}({', '.join(arguments)})"
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{name} must be a function, called as {called}, such as {example}; got "
            f"{summarize(value)}."
        )
    signature = signature_of(value)
    if signature is not None and not takes(signature, len(arguments)):
        raise TypeError(
            f"{name} must be a function, called as {called}, such as {example}; got "
            f"one of {signature}."
        )


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the signature of a function as it is called, if it can be known."""
    try:
        # What a decorator wraps may take other arguments than the decorated function.
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def takes(signature: inspect.Signature, count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def is_real_scalar(value: Any) -> bool:
    """Whether a value is one real number, plain or as an array."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if is_number(value):
        return True
    if not isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return False
    return value.shape == () and _is_real(value.dtype)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _array_or_zero(value: Any) -> Any:
    return value if isinstance(value, (jax.Array, np.ndarray)) else 0
