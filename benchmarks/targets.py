"""The project's performance targets, computed from the results' JSON.

To add a target, add an entry to `TARGETS`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from race import first_crossing

Result = Mapping[str, Any]  # the content of one JSON file
Results = Mapping[str, Result]  # by the name of the file


class Measured(NamedTuple):
    """The figures of a target."""

    values: tuple[float, ...]  # one for each seed
    bound: bool = False  # upper bounds: the rival did not get there in its budget
    suffix: str = ""  # added to the target's text


class Target(NamedTuple):
    """A figure to reach, and how to compute it from one result."""

    file: str  # the name of the result
    what: str
    limit: float
    measure: Callable[[Result], Measured]
    at_most: bool = True

    def row(self, results: Results) -> tuple[str, str, str, str] | None:
        """Returns text, goal, figure and verdict, or None if it was not measured."""
        try:
            values, bound, suffix = self.measure(results[self.file])
        except KeyError:
            return None
        if not values:
            return None
        measured = float(np.median(values))
        figure = ("≤ " if bound else "") + number(measured)
        if len(values) > 1:
            figure += f" ({number(min(values))} to {number(max(values))})"
        goal = f"{'≤' if self.at_most else '≥'} {self.limit:g}"
        return self.what + suffix, goal, figure, self.verdict(measured, bound)

    def verdict(self, measured: float, bound: bool) -> str:
        """Returns whether the target is met or missed, and by how much."""
        met = measured <= self.limit if self.at_most else measured >= self.limit
        if bound and not met:
            return "open: the rival did not get there in its time"
        word = "met" if met else "missed"
        if not math.isfinite(measured):
            return f"{word}, not reached in the budget"
        if not self.limit:
            return word
        off = 100 * (measured / self.limit - 1)
        return f"{word}, {abs(off):.0f} % {'above' if off > 0 else 'below'}"


def number(x: float) -> str:
    """Formats three digits, without an exponent where that is readable."""
    if not math.isfinite(x):
        return "∞"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def last_threshold(result: Result) -> float | None:
    """Returns the loss to reach; None stands for Adam's best of the same seed."""
    thresholds = result["workload"]["thresholds"]
    return thresholds[-1] if thresholds else None


def crossings(
    result: Result, name: str, threshold: float | None
) -> list[dict[str, float] | None]:
    """Returns `race.first_crossing` of each seed of a contestant."""
    runs = result["contestants"][name]["runs"]
    if threshold is not None:
        return [first_crossing(run["history"], threshold) for run in runs]
    adam = result["contestants"]["adam"]["runs"]
    return [
        first_crossing(run["history"], reference["best"])
        for run, reference in zip(runs, adam, strict=True)
    ]


def time_ratio(rival: str) -> Callable[[Result], Measured]:
    """Seconds of `cgfac` to the last threshold over those of a rival."""

    def measure(result: Result) -> Measured:
        threshold, budget = last_threshold(result), result["settings"]["budget"]
        ratios, bound = [], False
        ours, theirs = (crossings(result, x, threshold) for x in ("cgfac", rival))
        for mine, other in zip(ours, theirs, strict=True):
            seconds = math.inf if mine is None else mine["seconds"]
            ratios.append(seconds / (budget if other is None else other["seconds"]))
            bound |= other is None and mine is not None
        return Measured(tuple(ratios), bound)

    return measure


def step_ratio(result: Result) -> Measured:
    """The step time of `cgfac` over Adam's, at the workload's batch size."""
    size = result["workload"]["batch_size"]
    pairs = [pair for pair in result["paired"] if pair["batch_size"] == size]
    return Measured(tuple(pair["of_totals"] for pair in pairs))


def loss_at_100(result: Result) -> Measured:
    """The loss of `cgfac` after 100 steps."""
    runs = result["contestants"]["cgfac"]["runs"]
    return Measured(tuple(run["loss_at_steps"]["100"] for run in runs))


def state_ratio(result: Result) -> Measured:
    """The state of `cgfac` over kfac-jax's, in bytes."""
    ours, theirs = (result["contestants"][name] for name in ("cgfac", "kfac_jax"))
    return Measured((ours["state_bytes"] / theirs["state_bytes"],))


def compile_ratio(result: Result) -> Measured:
    """The compilation of `cgfac` over Adam's, at the workload's batch size."""
    probes = result["probes"]
    adam = probes[f"adam@{result['workload']['batch_size']}"]["compile_seconds"]
    suffix = ""
    if "compile_seconds" in probes.get("kfac_jax", {}):
        rival = probes["kfac_jax"]["compile_seconds"] / adam
        suffix = f" (kfac-jax's / Adam's: {number(rival)})"
    return Measured((probes["cgfac"]["compile_seconds"] / adam,), suffix=suffix)


def width_ratio(width: int, method: str, other: str) -> Callable[[Result], Measured]:
    """The step time of a method over that of another, at one width."""

    def measure(result: Result) -> Measured:
        seconds = {
            row["method"]: row["step_seconds"]["mean"]
            for row in result["rows"]
            if row["width"] == width and "failed" not in row
        }
        return Measured((seconds[method] / seconds[other],))

    return measure


def width_exponent(result: Result) -> Measured:
    """The power of the width by which the step time of `cgfac` grows."""
    power = result["exponents"]["cgfac"]
    return Measured(() if power is None else (power,))


def turned_up(result: Result) -> Measured:
    """The number of trainings that did not fall to the end."""
    bad = [row for row in result["rows"] if row["verdict"] != "falls"]
    return Measured((float(len(bad)),), suffix=f", of {len(result['rows'])}")


CURVES, AUTOENCODER = "CURVES, batch 1000", "MNIST autoencoder, batch 500"
TO_LAST, SAME = (
    "seconds to the last loss, ours / kfac-jax",
    "the same, ours / best Adam",
)
TO_ADAM, STEP = "seconds to Adam's best, ours / Adam", "step / Adam's step"
WIDE, WIDE_KFAC = (8192, "cgfac", "gradient"), (4096, "scale_by_kfac", "cgfac")
TARGETS = [
    Target(*row)
    for row in (
        ("curves", f"{CURVES}: {STEP}", 1.5, step_ratio),
        ("curves", f"{CURVES}: {TO_LAST}", 0.15, time_ratio("kfac_jax")),
        ("curves", f"{CURVES}: {SAME}", 0.3, time_ratio("adam")),
        ("curves", f"{CURVES}: loss at step 100", 53.0, loss_at_100),
        ("curves", f"{CURVES}: state bytes, ours / kfac-jax", 0.3, state_ratio),
        ("curves", f"{CURVES}: compilation, ours / Adam's", 4.0, compile_ratio),
        ("mnist_mlp", f"MNIST MLP, batch 128: {STEP}", 1.5, step_ratio),
        ("mnist_mlp", f"MNIST MLP, batch 128: {TO_ADAM}", 1.0, time_ratio("adam")),
        ("mnist_cnn", f"MNIST CNN, batch 128: {STEP}", 1.5, step_ratio),
        ("mnist_cnn", f"MNIST CNN, batch 128: {TO_ADAM}", 1.0, time_ratio("adam")),
        ("mnist_autoencoder", f"{AUTOENCODER}: {TO_LAST}", 0.2, time_ratio("kfac_jax")),
        ("mnist_autoencoder", f"{AUTOENCODER}: {SAME}", 0.4, time_ratio("adam")),
        ("widths", "width 8192: step / plain gradient step", 2.0, width_ratio(*WIDE)),
        ("widths", "exponent of the step time in the width", 2.2, width_exponent),
        (
            "widths",
            "width 4096: scale_by_kfac's step / ours",
            20.0,
            width_ratio(*WIDE_KFAC),
            False,
        ),
        (
            "robustness",
            "trainings of 1,000 steps that turned up or diverged",
            0.0,
            turned_up,
        ),
    )
]
