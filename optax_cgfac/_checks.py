"""Checks of options that are numbers, or arrays where the user traces them."""

from typing import Any, TypeGuard

import numpy as np

from optax_cgfac._types import Array


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


def check_positive(
    name: str, value: int | Array, *, may_be_array: bool = False
) -> int | Array:
    """Returns ``value`` if it is a positive int, or an array where that is allowed.

    Args:
      name: The option, for the message.
      value: Its value.
      may_be_array: Whether it may be an array, as `optax.inject_hyperparams` makes it.

    Returns:
      The value.

    Raises:
      ValueError: If it is no int, or less than 1.

    Example:
      >>> check_positive("rows", 32)
      32
    """
    if may_be_array and isinstance(value, Array):
        return value
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
    return value


def check_damping(damping: Any) -> None:
    """Checks a damping given as a number; schedules and tracers pass.

    Raises:
      ValueError: If it is negative or not finite.
    """
    if is_number(damping) and not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, got {damping}.")
