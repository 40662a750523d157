"""What the pictures share: axes, styles without colours, histories as arrays."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# What `optax_cgfac.diagnostics` returned after each update, or its arrays stacked.
History = Sequence[Mapping[str, Any]] | Mapping[str, Any]


INK, PAPER, SHADE = "black", "white", "0.6"


_LINES = ("-", "--", ":", "-.")


_MARKERS = ("o", "s", "^", "D", "v", "x", "P")


_MARKS = 8  # of a line's points have a marker


def new_axes(ax: "Axes | None", num_bars: int | None = None) -> "Axes":
    """Returns where to draw: the axes that were given, or those of a new figure.

    Args:
      ax: The axes that were given, or None.
      num_bars: Horizontal bars, for the height of the figure.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is missing.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "optax_cgfac.plot needs matplotlib, which is not installed here: "
            "pip install 'optax_cgfac[plot]'."
        ) from error
    height = 4.0 if num_bars is None else 1.2 + 0.32 * max(num_bars, 2)
    _, ax = pyplot.subplots(figsize=(7.0, height), layout="constrained")
    return ax


def finish(
    ax: "Axes", title: str = "", *, grid: Literal["both", "x"] = "both"
) -> "Axes":
    """Gives axes their title, a grid and no frame; returns them."""
    if title:
        ax.set_title(title, loc="left", fontsize="medium")
    ax.grid(axis=grid, color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def add_legend(ax: "Axes", num_lines: int) -> None:
    """Adds a legend; one of many lines stands beside them, where it hides none."""
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    ax.legend(frameon=False, fontsize="small", **(beside if num_lines > 6 else {}))


def name_bars(ax: "Axes", names: Sequence[str]) -> None:
    """Names horizontal bars, of which the first is to stand at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def line_styles(num_points: int) -> Iterator[dict[str, Any]]:
    """Yields line styles without end, all black.

    Args:
      num_points: Of each line, some of which get a marker, in every line others.

    Yields:
      Keyword arguments of ``ax.plot``.
    """
    every = max(num_points // _MARKS, 1)
    pairs = zip(itertools.cycle(_LINES), itertools.cycle(_MARKERS), strict=False)
    for index, (line, marker) in enumerate(pairs):
        yield {
            "color": INK,
            "ls": line,
            "lw": 1.4,
            "marker": marker,
            "ms": 5,
            "mfc": PAPER,
            "markevery": (index * every // 3 % every, every),
        }


def as_series(history: History) -> dict[str, Any]:
    """Returns a history as one dict of arrays, with an entry for each update.

    Args:
      history: A list of what `diagnostics` returns, or one with stacked arrays.

    Returns:
      The dict, nested as they are.

    Raises:
      ValueError: If there are no entries, or an entry is no scalar.
      TypeError: If the entries are not what `diagnostics` returns.
    """
    stacked = isinstance(history, Mapping)
    entries: list[Any] = [history] if stacked else list(history)
    if not entries:
        raise ValueError(
            "The history is empty: append optax_cgfac.diagnostics(opt_state) to a list "
            "after each update."
        )
    for entry in entries:
        if not isinstance(entry, Mapping) or "layers" not in entry:
            raise TypeError(
                "The history must hold what optax_cgfac.diagnostics(opt_state) "
                f"returns, got {type(entry).__name__}."
            )
    trees = [jax.tree.map(np.asarray, dict(entry)) for entry in entries]
    series = trees[0] if stacked else jax.tree.map(lambda *xs: np.stack(xs), *trees)
    shapes = {x.shape for x in jax.tree.leaves(series)}
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(
            "Every number of the history must be one scalar an update, got shapes "
            f"{sorted(shapes)}. Of several seeds draw one: "
            "jax.tree.map(lambda x: x[0], history)."
        )
    return series


def positions_of(steps: Sequence[float] | None, count: int) -> np.ndarray:
    """Returns the update of each of ``count`` entries.

    Args:
      steps: As the user gave them; None for 1, 2, 3 and so on.
      count: The number of entries.

    Returns:
      An array of that length.

    Raises:
      ValueError: If there are more or fewer.
    """
    positions = np.arange(1, count + 1) if steps is None else np.asarray(steps)
    if positions.shape != (count,):
        raise ValueError(
            f"steps must have one number for each of the {count} entries, got shape "
            f"{positions.shape}."
        )
    return positions
