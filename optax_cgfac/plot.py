"""Pictures of a curvature and a training: coverage, cost, solves, damping, eigenvalues.

Needs matplotlib, which the extra ``plot`` brings: ``pip install "optax_cgfac[plot]"``.
Every function draws into ``ax``, or into a figure of its own, and returns the axes.
Lines differ by their style and marker, never by colour alone.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import nnx

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.curvature.report import human_bytes
from optax_cgfac.operators.exact_fisher import BlockFisherOperator
from optax_cgfac.operators.kronecker import KroneckerOperator
from optax_cgfac.operators.rows import Rows, num_bytes, num_features, num_rows, to_dense
from optax_cgfac.solve.choose import (
    DampingForm,
    SolveSpec,
    default_damping_form,
    make_plan,
)
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = ["cost", "coverage", "damping", "residuals", "spectrum"]

# What `optax_cgfac.diagnostics` returned after each update, or its arrays stacked.
History = Sequence[Mapping[str, Any]] | Mapping[str, Any]
_INK, _PAPER, _SHADE = "black", "white", "0.6"
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "x", "P")
_MARKS = 8  # of a line's points have a marker


def coverage(
    curvature: Curvature, params: PyTree, *, ax: "Axes | None" = None
) -> "Axes":
    """Draws which parameters have a curvature, and how many they are.

    A filled bar is a layer of the report, a hatched one a parameter without curvature.

    Args:
      curvature: Of ``estimator.init``, or any later one.
      params: The parameters or the `flax.nnx.Module` that it belongs to.
      ax: Where to draw; None for a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> model, x = nn.Sequential([nn.Dense(4), nn.Dense(2)]), jnp.ones((32, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> estimator = optax_cgfac.fisher_estimator(model.apply, "squared_error")
      >>> ax = coverage(estimator.init(params, x), params)
      >>> ax.get_title(loc="left")
      '26 of 26 parameters preconditioned (100 %)'
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    sizes = {path: math.prod(x.shape) for path, x in leaves_by_path(params).items()}
    left_out = [path for path, _ in curvature.spec.uncovered]
    bars = [(tag.name, sum(sizes[x] for x in tag.leaves)) for tag in curvature.tags]
    covered, total = sum(size for _, size in bars), sum(sizes.values())
    bars += [(text(path), sizes[path]) for path in left_out]
    names, lengths = zip(*bars, strict=True)
    ax = _new_axes(ax, len(bars))
    drawn = ax.barh(range(len(bars)), lengths, color=_SHADE, edgecolor=_INK, height=0.7)
    for bar in drawn[len(curvature.tags) :]:
        bar.set(facecolor=_PAPER, hatch="////")
    # A hatching cannot be seen on a thin bar.
    kinds = [""] * len(curvature.tags) + [", no curvature"] * len(left_out)
    labels = [f"{size:,}{kind}" for size, kind in zip(lengths, kinds, strict=True)]
    ax.bar_label(drawn, labels, padding=4, fontsize="small")
    ax.margins(x=0.15)
    _name_bars(ax, names)
    ax.set_xlabel("parameters" + (", hatched: without curvature" if left_out else ""))
    share = 100 * covered / max(total, 1)
    title = f"{covered:,} of {total:,} parameters preconditioned ({share:.3g} %)"
    return _finish(ax, title, grid="x")


def cost(
    curvature: Curvature,
    *,
    damping_form: DampingForm | None = None,
    ax: "Axes | None" = None,
    **options: Any,
) -> "Axes":
    """Draws what the solve of every layer costs, as the report estimates it.

    Args:
      curvature: Of ``estimator.init``, or any later one.
      damping_form: As in `optax_cgfac.Curvature.report`.
      ax: Where to draw; None for a new figure.
      **options: Further options of the solve, as in `optax_cgfac.scale_by_cgfac`.

    Returns:
      The axes: operations of one solve, all layers of a stack together; beside each
      the solver and the bytes of the layer's rows.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> model, x = nn.Sequential([nn.Dense(4), nn.Dense(2)]), jnp.ones((32, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> estimator = optax_cgfac.fisher_estimator(model.apply, "squared_error")
      >>> ax = cost(estimator.init(params, x))
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['params/layers_0', 'params/layers_1']
    """
    structure = options.get("structure", "kronecker")
    form = damping_form or default_damping_form(structure)
    solve_spec = SolveSpec(damping_form=form, **options)
    flops, notes = [], []
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        eigenpairs = curvature.eigenpairs.get(tag.name)
        ranks = None if eigenpairs is None else eigenpairs.ranks
        plan = make_plan(solve_spec, num_rows(rows.a), tag.n_in, tag.n_out, ranks)
        flops.append(plan.flops * math.prod(tag.stack))
        held = human_bytes(num_bytes(rows.a) + num_bytes(rows.g))
        notes.append(f"{plan.solver}, rows {held}")
    places = range(len(flops))
    ax = _new_axes(ax, len(flops))
    ax.set_xscale("log")
    ax.hlines(places, min(flops) / 2, flops, color=_INK, lw=1, ls=":")
    ax.plot(flops, places, "o", color=_INK)
    _name_bars(ax, [tag.name for tag in curvature.tags])
    beside = ax.secondary_yaxis("right")
    beside.set_yticks(places, notes)
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    ax.set_xlabel("floating-point operations of a solve, estimated")
    return _finish(ax, f"{sum(flops):.3g} operations for all layers", grid="x")


def residuals(
    history: History,
    *,
    layers: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws the relative residual of every layer's solve over training.

    Args:
      history: What `optax_cgfac.diagnostics` returned after each update, or its
        arrays stacked, as `jax.lax.scan` returns them.
      layers: Names of the layers to draw; None for all.
      ax: Where to draw; None for a new figure.

    Returns:
      The axes. A residual that was not computed, or is zero, is left out of its line.

    Example:
      >>> history = [
      ...     {"layers": {"Dense_0": {"residual": 0.5**i, "cg_steps": 10}}}
      ...     for i in range(4)
      ... ]
      >>> [line.get_label() for line in residuals(history).get_lines()]
      ['Dense_0']
    """
    series = _as_series(history)["layers"]
    found = {name: series[name]["residual"] for name in layers or series}
    x = np.arange(len(next(iter(found.values())))) + 1
    ax = _new_axes(ax)
    ax.set(yscale="log", xlabel="update")
    for (name, values), style in zip(found.items(), _line_styles(len(x)), strict=False):
        ax.plot(x, np.where(values > 0, values, np.nan), label=name, **style)
    _add_legend(ax, len(found))
    return _finish(ax, "relative residual of the layers' solves")


def damping(
    history: History,
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws damping, step size and momentum of `optax_cgfac.cgfac` over training.

    Args:
      history: As in `residuals`.
      ax: Where to draw; None for a new figure.

    Returns:
      The axes of the damping, on the left. Step size and momentum have their own on
      the right, ``ax.figure.axes[-1]``. A cross is an update that was not taken.

    Example:
      >>> entry = {"layers": {}, "momentum": 0.5, "num_rejected": 0}
      >>> history = [
      ...     entry | {"damping": 0.5**i, "step_size": 0.1 * i} for i in range(4)
      ... ]
      >>> damping(history).get_yscale()
      'log'
    """
    series = _as_series(history)
    values = series["damping"]
    x = np.arange(len(values)) + 1
    left = _new_axes(ax)
    right = left.twinx()
    first, second, third = itertools.islice(_line_styles(len(x)), 3)
    lines = left.plot(x, values, label="damping (left)", **first)
    lines += right.plot(x, series["step_size"], label="step size (right)", **second)
    lines += right.plot(x, series["momentum"], label="momentum (right)", **third)
    # An update before the first entry counts as one of its own.
    rejected = np.diff(series["num_rejected"], prepend=0) > 0
    if np.any(rejected):
        crosses = {"color": _INK, "ms": 9, "label": "not taken"}
        lines += left.plot(x[rejected], values[rejected], "x", **crosses)
    left.set(yscale="log", xlabel="update", ylabel="damping")
    right.set(ylim=(-0.03, 1.03), ylabel="step size, momentum")
    right.spines["top"].set_visible(False)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(lines)}
    left.legend(handles=lines, frameon=False, fontsize="small", **above)
    return _finish(left)


def spectrum(
    curvature: Curvature,
    layer: str,
    *,
    structure: Literal["kronecker", "block"] = "kronecker",
    damping: float | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws the eigenvalues of a layer's curvature, in descending order.

    Args:
      curvature: One that has seen rows.
      layer: The layer's name, as in the report.
      structure: ``"kronecker"``, or ``"block"`` for the layer's exact Fisher block.
      damping: ``γ``, drawn as a line; None for none.
      ax: Where to draw; None for a new figure.

    Returns:
      The axes: the eigenvalues above rounding, of a stack those of all its layers.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(0), (8, 3))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> _, _, curvature = optax_cgfac.value_and_grad(loss_fn)(params)
      >>> spectrum(curvature, ".", damping=0.1).get_title(loc="left")
      '.: 8 of 8 eigenvalues above rounding'
    """
    operator: Any = curvature.operator(layer, structure=structure)
    values = _eigenvalues(operator)
    size = num_features(operator.a) * operator.g.shape[-1]
    total = math.prod(operator.g.shape[:-2]) * size
    ax = _new_axes(ax)
    ax.set(xscale="log", yscale="log", xlabel="eigenvalue, the largest first")
    ax.plot(np.arange(1, values.size + 1), values, color=_INK, label="eigenvalues")
    if damping is not None:
        ax.axhline(damping, color=_INK, ls="--", lw=1, label=f"damping {damping:.3g}")
        _add_legend(ax, 2)
    title = f"{layer}: {values.size:,} of {total:,} eigenvalues above rounding"
    return _finish(ax, title)


_EPS = float(np.finfo(np.float32).eps)  # of the rows


def _eigenvalues(operator: KroneckerOperator | BlockFisherOperator) -> np.ndarray:
    """Returns the eigenvalues that are more than rounding, the largest first."""
    if isinstance(operator, BlockFisherOperator):
        values = np.linalg.eigvalsh(np.asarray(operator.gram(), np.float64))
        least = operator.num_samples * _EPS * values[..., -1:]
        values = np.where(values > least, values, 0) * _as_column(operator.scale)
    else:
        a = _squared_singular_values(operator.a) * _as_column(operator.a_scale)
        g = _squared_singular_values(operator.g) * _as_column(operator.g_scale)
        values = a[..., :, None] * g[..., None, :]
    values = np.sort(np.ravel(values))[::-1]
    return values[values > 0]


def _squared_singular_values(rows: Rows) -> np.ndarray:
    dense = np.asarray(to_dense(rows), np.float64)
    values = np.linalg.svd(dense, compute_uv=False)
    # As numpy.linalg.matrix_rank does.
    least = max(dense.shape[-2:]) * _EPS * values[..., :1]
    return np.where(values > least, values, 0) ** 2


def _as_column(scale: Any) -> np.ndarray:
    """Returns scales with an axis for the eigenvalues."""
    return np.asarray(scale, np.float64)[..., None]


def _new_axes(ax: "Axes | None", num_bars: int | None = None) -> "Axes":
    """Returns where to draw: the axes that were given, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot  # of the extra "plot"

    height = 4.0 if num_bars is None else 1.2 + 0.32 * max(num_bars, 2)
    _, ax = pyplot.subplots(figsize=(7.0, height), layout="constrained")
    return ax


def _finish(
    ax: "Axes", title: str = "", *, grid: Literal["both", "x"] = "both"
) -> "Axes":
    """Gives axes their title, a grid and no frame; returns them."""
    if title:
        ax.set_title(title, loc="left", fontsize="medium")
    ax.grid(axis=grid, color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _add_legend(ax: "Axes", num_lines: int) -> None:
    """Adds a legend; one of many lines stands next to them, where it hides none."""
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    ax.legend(frameon=False, fontsize="small", **(beside if num_lines > 6 else {}))


def _name_bars(ax: "Axes", names: Sequence[str]) -> None:
    """Names horizontal bars, of which the first is to stand at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def _line_styles(num_points: int) -> Iterator[dict[str, Any]]:
    """Yields keyword arguments of ``ax.plot`` without end, all lines black."""
    every = max(num_points // _MARKS, 1)
    pairs = zip(itertools.cycle(_LINES), itertools.cycle(_MARKERS), strict=False)
    for index, (line, marker) in enumerate(pairs):
        yield {
            "color": _INK,
            "ls": line,
            "lw": 1.4,
            "marker": marker,
            "ms": 5,
            "mfc": _PAPER,
            "markevery": (index * every // 3 % every, every),
        }


def _as_series(history: History) -> dict[str, Any]:
    """Returns a history as one dict of arrays, with an entry for each update."""
    stacked = isinstance(history, Mapping)
    entries: list[Any] = [history] if stacked else list(history)
    trees = [jax.tree.map(np.asarray, dict(entry)) for entry in entries]
    return trees[0] if stacked else jax.tree.map(lambda *xs: np.stack(xs), *trees)
