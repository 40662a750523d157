"""Plots of the results, readable without colours."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from contestants import LABELS
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

STYLES = {
    "cgfac": {"ls": "-", "lw": 2.4},
    "gradient": {"ls": (0, (1, 3)), "lw": 1.4},
    "adam": {"ls": "--", "lw": 1.6},
    "sgd": {"ls": ":", "lw": 1.8},
    "muon": {"ls": "-.", "lw": 1.4},
    "shampoo": {"ls": (0, (6, 2, 1, 2, 1, 2)), "lw": 1.4},
    "scale_by_kfac": {"ls": (0, (1, 1)), "lw": 1.4},
    "kfac_jax": {"ls": (0, (8, 3)), "lw": 1.2},
}
MARKERS = {
    "cgfac": "o",
    "gradient": "x",
    "adam": "s",
    "sgd": "v",
    "muon": "+",
    "shampoo": "P",
    "scale_by_kfac": "^",
    "kfac_jax": "D",
}
FIXED = ("method", "batch_size")  # settings that are no options
EVERY = 40  # of the points of a curve has a marker


def label(settings: Mapping[str, Any]) -> str:
    """Returns how a contestant is called: optimizer, batch size and options."""
    options = [f"{value:g}" for key, value in settings.items() if key not in FIXED]
    return ", ".join([LABELS[settings["method"]], *options]) + (
        f", batch {settings['batch_size']}"
    )


def curve(
    runs: list[Mapping[str, Any]], points: int = 300
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns seconds, and the median, least and greatest loss of all seeds there.

    A seed that stopped early keeps its last loss.
    """
    histories = [
        [(seconds, loss) for _, seconds, loss in run["history"] if loss is not None]
        for run in runs
    ]
    end = max(history[-1][0] for history in histories)
    start = min(history[1][0] if len(history) > 1 else end for history in histories)
    grid = np.geomspace(max(start, 1e-4), max(end, 2e-4), points)
    losses = np.array([np.interp(grid, *zip(*h, strict=True)) for h in histories])
    return grid, np.median(losses, 0), losses.min(0), losses.max(0)


def draw_race(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws the loss against the seconds on each contestant's clock."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, contestant in result["contestants"].items():
        if not contestant["runs"]:
            continue
        seconds, median, low, high = curve(contestant["runs"])
        settings = contestant["settings"]
        style = {"marker": MARKERS[settings["method"]], "markevery": EVERY}
        style |= {"color": "black", "mfc": "white", **STYLES[settings["method"]]}
        if name.startswith("cgfac@"):
            style["lw"] = 1.2
        axes.plot(seconds, median, label=label(settings), **style)
        axes.fill_between(seconds, low, high, color="0.85", lw=0, zorder=0)
    thresholds = result["workload"]["thresholds"]
    if thresholds:
        axes.axhline(thresholds[-1], color="0.5", lw=0.8)
    work = result["workload"]
    axes.set(xscale="log", yscale="log", xlabel="seconds of training")
    axes.set_title(
        f"{work['title']}: {work['metric']} over the {work['num_examples']:,} "
        f"training examples",
        loc="left",
        fontsize="medium",
    )
    _finish(axes)
    figure.savefig(path, dpi=150)


def draw_widths(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws step time and memory of one dense layer against its width."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, marker in MARKERS.items():
        rows = [
            row
            for row in result["rows"]
            if row["method"] == method and "failed" not in row
        ]
        if not rows:
            continue
        widths = [row["width"] for row in rows]
        style = {"color": "black", "marker": marker, "mfc": "white"} | STYLES[method]
        power = result["exponents"][method]
        name = LABELS[method] + ("" if power is None else f", power {power:.2f}")
        left.plot(
            widths, [r["step_seconds"]["mean"] for r in rows], label=name, **style
        )
        memory = [r["memory"]["of_training"] / 2**20 for r in rows]
        right.plot(widths, memory, label=LABELS[method], **style)
    for axes, title in (
        (left, "seconds per step"),
        (right, "peak memory of training, MiB"),
    ):
        axes.set(yscale="log", xlabel="width of one dense layer")
        axes.set_xscale("log")
        axes.set_title(title, loc="left", fontsize="medium")
        _finish(axes)
        axes.set_xticks(sorted({row["width"] for row in result["rows"]}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=150)


def _finish(axes: Any) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
