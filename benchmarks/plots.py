"""Plots of the results, readable without colours."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contestants import METHODS
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

STYLES = {  # marker, line style, line width
    "cgfac": ("o", "-", 2.4),
    "gradient": ("x", (0, (1, 3)), 1.4),
    "adam": ("s", "--", 1.6),
    "sgd": ("v", ":", 1.8),
    "muon": ("+", "-.", 1.4),
    "shampoo": ("P", (0, (6, 2, 1, 2, 1, 2)), 1.4),
    "scale_by_kfac": ("^", (0, (1, 1)), 1.4),
    "kfac_jax": ("D", (0, (8, 3)), 1.2),
}
EVERY = 40  # points of a curve for each marker


def style(method: str) -> dict[str, Any]:
    marker, line, width = STYLES[method]
    return {"color": "black", "marker": marker, "mfc": "white", "ls": line, "lw": width}


def label(settings: Mapping[str, Any]) -> str:
    """Returns the name of a contestant: optimizer, options and batch size."""
    options = [
        f"{value:g}"
        for key, value in settings.items()
        if key not in ("method", "batch_size")
    ]
    batch = f"batch {settings['batch_size']}"
    return ", ".join([METHODS[settings["method"]].label, *options, batch])


def curve(
    runs: Sequence[Mapping[str, Any]], points: int = 300
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
        look = style(settings["method"]) | {"markevery": EVERY}
        if name.startswith("cgfac@"):
            look["lw"] = 1.2
        axes.plot(seconds, median, label=label(settings), **look)
        axes.fill_between(seconds, low, high, color="0.85", lw=0, zorder=0)
    work = result["workload"]
    if work["thresholds"]:
        axes.axhline(work["thresholds"][-1], color="0.5", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="seconds of training")
    _finish(
        axes,
        f"{work['title']}: {work['metric']} over the {work['num_examples']:,} "
        "training examples",
    )
    figure.savefig(path, dpi=150)


def draw_widths(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws step time and memory of one dense layer against its width."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    good = [row for row in result["rows"] if "failed" not in row]
    for method in STYLES:
        rows = [row for row in good if row["method"] == method]
        if not rows:
            continue
        widths = [row["width"] for row in rows]
        power = result["exponents"][method]
        name = METHODS[method].label + ("" if power is None else f", power {power:.2f}")
        seconds = [row["step_seconds"]["mean"] for row in rows]
        memory = [row["memory"]["of_training"] / 2**20 for row in rows]
        left.plot(widths, seconds, label=name, **style(method))
        right.plot(widths, memory, label=METHODS[method].label, **style(method))
    titles = ("seconds per step", "peak memory of training, MiB")
    for axes, title in zip((left, right), titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="width of one dense layer")
        _finish(axes, title)
        axes.set_xticks(sorted({row["width"] for row in result["rows"]}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=150)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
