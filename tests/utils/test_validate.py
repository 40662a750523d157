"""Checks of options: what passes, and what the others say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cgfac.utils import validate


@pytest.mark.parametrize("value", [0, 0.5, np.float32(1), np.ones(()), jnp.ones(())])
def test_one_real_number_is_a_number(value):
    validate.check_number("l2", value, validate.NOT_NEGATIVE, 0.1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1.0, ValueError, "l2 must be finite and not negative, got -1.0"),
        (np.nan, ValueError, "must be finite"),
        (np.array(-1.0), ValueError, "must be finite"),
        (jnp.ones(2), ValueError, r"one number, got a float32 array of shape \(2,\)"),
        (True, TypeError, "must be a number, got True"),
        (1j, TypeError, "must be a number"),
        ("big", TypeError, "got 'big'. Pass a number such as l2=0.1"),
        (lambda count: 0.1, TypeError, "inject_hyperparams"),
    ],
)
def test_anything_else_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        validate.check_number("l2", value, validate.NOT_NEGATIVE, 0.1)


def test_the_value_of_a_traced_number_is_not_looked_at():
    @jax.jit
    def f(x):
        validate.check_number("l2", x, validate.NOT_NEGATIVE, 0.1)
        validate.check_positive("steps", x, may_be_array=True)
        return x

    assert f(-1.0) == -1


@pytest.mark.parametrize("value", [0, 1.0, True, "2", np.ones(1, int)])
def test_counts_are_positive_ints(value):
    validate.check_positive("rank", np.int32(8))
    with pytest.raises(ValueError, match="rank must be an int of at least 1"):
        validate.check_positive("rank", value)


def test_functions_take_their_arguments():
    for right in (lambda path: True, functools.partial(max, 3), max):
        validate.check_function("where", right, ["path"], "lambda path: True")
    for wrong, got in ((lambda: True, r"one of \(\)"), ("Dense", "'Dense'")):
        with pytest.raises(TypeError, match=rf"where\(path\).*got {got}"):
            validate.check_function("where", wrong, ["path"], "lambda path: True")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (jnp.ones(3), "a float32 array of shape (3,)"),
        (np.ones(3, int), "an int64 array of shape (3,)"),
        (int, "int"),
        ({}, "dict"),
        (None, "None"),
    ],
)
def test_a_summary_has_no_contents(value, text):
    assert validate.summarize(value) == text
