"""What `cgfac` refuses as options, and what it says."""

import math
from typing import Any

from optax_cgfac._step import StepOptions
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    INSIDE_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    check_damping,
    check_function,
    check_number,
    check_number_or_schedule,
    check_positive,
    describe,
    is_number,
)


def check_step_options(
    options: StepOptions, learning_rate: Any, damping: Any, fallback: Any, where: Any
) -> None:
    """Checks the options of `cgfac` that are no names.

    Raises:
      ValueError: If one is out of range, or two do not go together.
      TypeError: If one is of another type.
    """
    if damping is not None:
        check_damping(damping)
    if learning_rate is not None:
        check_number_or_schedule("learning_rate", learning_rate, NOT_NEGATIVE, 0.1)
    numbers = {
        "momentum": (BELOW_ONE, 0.9),
        "l2": (NOT_NEGATIVE, 1e-4),
        "kl_clip": (POSITIVE, 1e-2),
        "damping_decay": (INSIDE_ONE, 0.9),
        "min_damping": (NOT_NEGATIVE, 1e-3),
        "max_damping": (Range("be positive", lambda x: x > 0), 1e3),
    }
    for name, (allowed, example) in numbers.items():
        may_be_none = name not in ("l2", "damping_decay")
        value = getattr(options, name)
        if value is not None or not may_be_none:
            check_number(name, value, allowed, example)
    for name in ("damping_interval", "model_interval"):
        if getattr(options, name) is not None:
            check_positive(
                name, getattr(options, name), may_be_array=True, others="None or "
            )
    least = options.min_damping if is_number(options.min_damping) else 0.0
    most = options.max_damping if is_number(options.max_damping) else math.inf
    if not least <= most:
        raise ValueError(
            "Dampings must satisfy 0 <= min_damping <= max_damping, got "
            f"{least} and {most}. Lower min_damping or raise max_damping."
        )
    if learning_rate is None:
        _check_adaptive(options, damping, least, most)
    _check_fallback(fallback, where)


def _check_adaptive(
    options: StepOptions, damping: Any, least: float, most: float
) -> None:
    if options.kl_clip is not None:
        raise ValueError(
            f"kl_clip needs a learning_rate, got kl_clip={describe(options.kl_clip)} "
            "without one: the quadratic model sets the step size. Drop kl_clip, or "
            "pass cgfac(learning_rate=0.1, kl_clip=...)."
        )
    if callable(damping):
        raise ValueError(
            "Without a learning_rate the damping adapts itself, got a schedule: pass "
            "its initial value, or a learning_rate to use a schedule of dampings."
        )
    if not is_number(damping):
        return
    if damping == 0:
        raise ValueError(
            "The initial damping must be positive, got 0: it adapts by factors. Pass "
            "damping=None for one from the data, or min_damping=0 to let it fall."
        )
    if not least <= damping <= most:
        raise ValueError(
            "The initial damping must lie in [min_damping, max_damping] = "
            f"[{least:g}, {most:g}], got {damping:g}. Move the bounds to start there."
        )


def _check_fallback(fallback: Any, where: Any) -> None:
    if fallback is None and where is not None:
        raise ValueError(
            "where= needs fallback=, the optimizer of the other parameters; got None. "
            "Pass fallback=optax.adam(1e-3), or leave parameters as they are by "
            "fisher_estimator(..., where=...)."
        )
    functions = (getattr(fallback, name, None) for name in ("init", "update"))
    if fallback is not None and not all(map(callable, functions)):
        raise TypeError(
            "fallback must be an optax.GradientTransformation, got "
            f"{describe(fallback)}. Pass fallback=optax.adam(1e-3)."
        )
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
