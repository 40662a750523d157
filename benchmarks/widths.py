"""How the costs grow with the width: one square dense layer, batch 256.

Every method and width is measured in a process of its own, by `probe`; the methods of
one width one after the other. Methods that decompose matrices of the layer's width
take few steps and stop at `SLOW_LIMIT`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import probe
from contestants import missing
from tqdm import tqdm

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
SLOW_LIMIT = 4096
TIMEOUT = 900.0  # seconds of a process

# Timed steps, and those before them. cgfac does some of its work only every few
# steps, at this batch eigenpairs every 16th; kfac-jax inverts every fifth step.
STEPS = {
    "gradient": (40, 3),
    "adam": (40, 3),
    "cgfac": (40, 3),
    "kfac_jax": (5, 5),
    "scale_by_kfac": (2, 1),
}
SLOW = ("kfac_jax", "scale_by_kfac")


def exponent(
    widths: Sequence[int], seconds: Sequence[float], *, largest: int = 4
) -> float:
    """Returns the power of the width that step times grow with.

    Args:
      widths: In any order.
      seconds: The step times.
      largest: The least squares are over the logarithms of so many largest widths.

    Returns:
      The slope; NaN if there are fewer than two widths.
    """
    pairs = sorted(zip(widths, seconds, strict=True))[-largest:]
    if len(pairs) < 2:
        return math.nan
    x, y = np.log(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def benchmark(
    widths: Sequence[int] = WIDTHS,
    *,
    smoke: bool = False,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Measures all methods at all widths.

    Args:
      widths: Of the layer.
      smoke: Whether to take batches of 64 and few steps.
      timeout: Seconds of a process.

    Returns:
      The rows of `probe.run`, and the exponents by method.
    """
    rows = []
    tasks = [
        (width, method)
        for width in widths
        for method in STEPS
        if not (method in SLOW and width > SLOW_LIMIT)
    ]
    for width, method in (bar := tqdm(tasks, desc="widths")):
        bar.set_postfix_str(f"{method}, {width}")
        why = missing(method)
        if why is not None:
            rows.append({"width": width, "method": method, "failed": why})
            continue
        steps, warm_up = STEPS[method]
        row = probe.run(
            f"dense-{width}",
            method,
            steps=min(steps, 3) if smoke else steps,
            warm_up=1 if smoke else warm_up,
            smoke=smoke,
            timeout=timeout,
        )
        rows.append({"width": width, **row})
    exponents = {}
    for method in STEPS:
        good = [r for r in rows if r["method"] == method and "failed" not in r]
        exponents[method] = exponent(
            [r["width"] for r in good], [r["step_seconds"]["mean"] for r in good]
        )
    return {
        "rows": rows,
        "exponents": {k: v if math.isfinite(v) else None for k, v in exponents.items()},
    }
