"""Sweeps over one size: costs by width, and robustness by batch size."""

import math
from collections.abc import Sequence
from typing import Any

import contestants
import numpy as np
import workloads
from measure import measure_apart
from race import Runner
from tqdm import tqdm

import optax_cgfac

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
SLOW_LIMIT = 4096  # the largest width of methods that decompose wide matrices
SLOW = ("kfac_jax", "scale_by_kfac")
TIMEOUT = 900.0  # seconds of a process
# Timed steps and warm-up. `cgfac` renews eigenpairs at every 16th step here, kfac-jax
# its inverses at every fifth.
WIDTH_STEPS = {
    "gradient": (40, 3),
    "adam": (40, 3),
    "cgfac": (40, 3),
    "kfac_jax": (5, 5),
    "scale_by_kfac": (2, 1),
}

BATCH_SIZES = (64, 128, 256, 512, 1000)
STEPS = 1000
EVERY = 20  # steps between evaluations
TOLERANCE = 0.02  # the largest rise that still counts as falling


def exponent(
    widths: Sequence[int], seconds: Sequence[float], *, largest: int = 4
) -> float | None:
    """Returns the power of the width by which step times grow.

    The slope of the logarithms by least squares over the ``largest`` widths; None for
    fewer than two widths.
    """
    pairs = sorted(zip(widths, seconds, strict=True))[-largest:]
    if len(pairs) < 2:
        return None
    x, y = np.log(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def width_sweep(
    widths: Sequence[int] = WIDTHS, *, smoke: bool = False
) -> dict[str, Any]:
    """Measures every method on one square dense layer of several widths."""
    tasks = [
        (width, method)
        for width in widths
        for method in WIDTH_STEPS
        if width <= SLOW_LIMIT or method not in SLOW
    ]
    rows = []
    for width, method in (bar := tqdm(tasks, desc="widths")):
        bar.set_postfix_str(f"{method}, {width}")
        steps, warm_up = (2, 1) if smoke else WIDTH_STEPS[method]
        row = measure_apart(
            workload=f"dense-{width}",
            method=method,
            steps=steps,
            warm_up=warm_up,
            smoke=smoke,
            timeout=TIMEOUT,
        )
        rows.append({"width": width, **row})
    exponents = {}
    for method in WIDTH_STEPS:
        good = [r for r in rows if r["method"] == method and "failed" not in r]
        exponents[method] = exponent(
            [r["width"] for r in good], [r["step_seconds"]["mean"] for r in good]
        )
    return {"smoke": smoke, "rows": rows, "exponents": exponents}


def verdict(losses: Sequence[float | None]) -> dict[str, Any]:
    """Judges whether a training fell, turned up or diverged.

    A training diverged if its loss is not finite or ends above its start. It turned up
    if at the end the loss has risen by more than `TOLERANCE` of the whole decrease.
    Medians of three evaluations stand for the loss, so that one bad batch does not
    decide. ``losses`` begins before the first step; None stands for one that is not
    finite.
    """
    if None in losses:
        return {"least": None, "last": None, "rise": None, "verdict": "diverged"}
    windows = np.lib.stride_tricks.sliding_window_view(np.array(losses, float), 3)
    medians = np.median(windows, axis=-1)
    least, last = float(medians.min()), float(medians[-1])
    decrease = losses[0] - least
    rise = (last - least) / decrease if decrease > 0 else None
    word = "falls" if rise is not None and rise <= TOLERANCE else "turned up"
    if last >= losses[0]:
        word = "diverged"
    return {"least": least, "last": last, "rise": rise, "verdict": word}


def train(
    workload: workloads.Workload, batch_size: int, *, steps: int, every: int, seed: int
) -> dict[str, Any]:
    """Trains with `cgfac` at its defaults and judges the training."""
    contestant = contestants.build("cgfac", workload, batch_size=batch_size)
    runner = Runner(contestant, workload, workload.init(seed), seed)
    evaluate = workload.evaluator()
    losses, dampings = [evaluate(runner.state[0])], []
    title = f"{workload.name}, batch {batch_size}, seed {seed}"
    for _ in tqdm(range(steps), desc=title, mininterval=1.0):
        runner.step()
        if runner.num_steps % every == 0:
            losses.append(evaluate(runner.state[0]))
            diagnostics = optax_cgfac.diagnostics(runner.state[1][0])
            dampings.append(float(diagnostics["damping"]))
            if not math.isfinite(losses[-1]):
                break
    kept = [x if math.isfinite(x) else None for x in losses]
    return {
        "workload": workload.name,
        "batch_size": batch_size,
        "seed": seed,
        "steps": runner.num_steps,
        "every": every,
        "losses": kept,
        "dampings": dampings,
        "num_rejected": int(diagnostics["num_rejected"]),
        **verdict(kept),
    }


def robustness_sweep(
    name: str, batch_sizes: Sequence[int] = BATCH_SIZES, *, smoke: bool = False
) -> dict[str, Any]:
    """Trains on a workload with every batch size that its data allow."""
    steps, every = (60, 10) if smoke else (STEPS, EVERY)
    workload = workloads.get(name, smoke)
    rows = []
    for size in (n for n in batch_sizes if n <= workload.num_examples):
        row = train(workload, size, steps=steps, every=every, seed=0)
        print(f"{name}, batch {size}: {row['verdict']}, last {row['last']}", flush=True)
        rows.append(row)
    return {"smoke": smoke, "steps": steps, "rows": rows}
