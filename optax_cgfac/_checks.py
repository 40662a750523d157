"""Checks of options that are numbers, or arrays where the user traces them."""

from typing import Any, TypeGuard

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
    return isinstance(value, (int, float))


def check_positive(name: str, value: int | Array) -> int | Array:
    """Returns ``value`` if it is a positive int, or an array.

    Args:
      name: The option, for the message.
      value: Its value.

    Returns:
      The value.

    Raises:
      ValueError: If it is no int, or less than 1.

    Example:
      >>> check_positive("rows", 32)
      32
    """
    if isinstance(value, Array):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
    return value
