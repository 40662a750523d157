"""The figures that the library is to reach, from the results' JSON."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from race import first_crossing

Results = Mapping[str, Mapping[str, Any]]  # by the name of the file


class Target(NamedTuple):
    """A target and what was measured.

    Attributes:
      what: In words.
      limit: The figure to reach.
      at_most: Whether less is better.
      values: One for every seed.
      bound: Whether the values are bounds, because a rival did not get there in its
        budget: no more than that.
      note: Why there is no value.
    """

    what: str
    limit: float
    at_most: bool = True
    values: tuple[float, ...] = ()
    bound: bool = False
    note: str = "not measured"

    @property
    def measured(self) -> float | None:
        """The median over seeds."""
        return float(np.median(self.values)) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether it was reached; None if nothing was measured."""
        if self.measured is None:
            return None
        if self.at_most:
            return self.measured <= self.limit
        return self.measured >= self.limit

    def verdict(self) -> str:
        """Met or missed, and by how much."""
        if self.measured is None:
            return self.note
        if self.bound and not self.met:
            return "open: the rival did not get there in its time"
        word = "met" if self.met else "missed"
        if not math.isfinite(self.measured):
            return f"{word}, not reached in the budget"
        if not self.limit:
            return word
        off = 100 * (self.measured / self.limit - 1)
        return f"{word}, {abs(off):.0f} % {'above' if off > 0 else 'below'}"

    def figure(self) -> str:
        """The median, and the least and greatest in brackets."""
        if self.measured is None:
            return "-"
        text = ("≤ " if self.bound else "") + number(self.measured)
        if len(self.values) > 1:
            text += f" ({number(min(self.values))} to {number(max(self.values))})"
        return text

    def goal(self) -> str:
        """The limit."""
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


def number(x: float) -> str:
    """Three digits, without an exponent where that is readable."""
    if not math.isfinite(x):
        return "∞"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def crossings(
    result: Mapping[str, Any], name: str, threshold: float | None
) -> list[dict[str, float] | None]:
    """Returns when each seed's training reached a loss.

    Args:
      result: Of a workload.
      name: The contestant.
      threshold: The loss; None for Adam's best of the same seed.

    Returns:
      What `race.first_crossing` returns, for every seed.
    """
    runs = result["contestants"][name]["runs"]
    if threshold is not None:
        return [first_crossing(run["history"], threshold) for run in runs]
    adam = result["contestants"]["adam"]["runs"]
    return [
        first_crossing(run["history"], reference["best"])
        for run, reference in zip(runs, adam, strict=True)
    ]


def time_ratio(
    result: Mapping[str, Any], rival: str, threshold: float | None, ours: str = "cgfac"
) -> tuple[tuple[float, ...], bool]:
    """Returns ours / the rival's seconds to a loss, by seed, and whether bounds."""
    budget = result["settings"]["budget"]
    ratios, bound = [], False
    pairs = zip(
        crossings(result, ours, threshold),
        crossings(result, rival, threshold),
        strict=True,
    )
    for mine, theirs in pairs:
        if mine is None:
            ratios.append(math.inf)
        elif theirs is None:
            ratios.append(mine["seconds"] / budget)
            bound = True
        else:
            ratios.append(mine["seconds"] / theirs["seconds"])
    return tuple(ratios), bound


def targets(results: Results) -> list[Target]:
    """Returns all targets; those without a result say why."""
    curves, autoencoder = "CURVES, batch 1000", "MNIST autoencoder, batch 500"
    makers: list[tuple[str, Target, Callable[[Any, Target], Target]]] = [
        ("curves", Target(f"{curves}: step / Adam's step", 1.5), _step_ratio),
        _race("curves", f"{curves}: seconds to the last loss, ours / kfac-jax", 0.15),
        _race("curves", f"{curves}: the same, ours / best Adam", 0.3, "adam"),
        ("curves", Target(f"{curves}: loss at step 100", 53.0), _loss_at_100),
        ("curves", Target(f"{curves}: state bytes, ours / kfac-jax", 0.3), _state),
        ("curves", Target(f"{curves}: compilation, ours / Adam's", 4.0), _compile),
    ]
    for name, title in (("mnist_mlp", "MLP"), ("mnist_cnn", "CNN")):
        title = f"MNIST {title}, batch 128"
        makers += [
            (name, Target(f"{title}: step / Adam's step", 1.5), _step_ratio),
            _race(name, f"{title}: seconds to Adam's best, ours / Adam", 1.0, "adam"),
        ]
    name = "mnist_autoencoder"
    makers += [
        _race(name, f"{autoencoder}: seconds to the last loss, ours / kfac-jax", 0.2),
        _race(name, f"{autoencoder}: the same, ours / best Adam", 0.4, "adam"),
        ("widths", Target("width 8192: step / plain gradient step", 2.0), _wide),
        ("widths", Target("exponent of the step time in the width", 2.2), _exponent),
        (
            "widths",
            Target("width 4096: scale_by_kfac's step / ours", 20.0, at_most=False),
            _kfac_step,
        ),
        (
            "robustness",
            Target("trainings of 1,000 steps that turned up or diverged", 0.0),
            _turned_up,
        ),
    ]
    found = []
    for file, target, make in makers:
        if file not in results:
            found.append(target)
            continue
        try:
            found.append(make(results[file], target))
        except KeyError as error:
            found.append(target._replace(note=f"not measured: no {error}"))
    return found


def _race(
    file: str, what: str, limit: float, rival: str = "kfac_jax"
) -> tuple[str, Target, Callable[[Any, Target], Target]]:
    def make(result: Any, target: Target) -> Target:
        thresholds = result["workload"]["thresholds"]
        threshold = thresholds[-1] if thresholds else None
        values, bound = time_ratio(result, rival, threshold)
        return target._replace(values=values, bound=bound)

    return file, Target(what, limit), make


def _step_ratio(result: Any, target: Target) -> Target:
    size = result["workload"]["batch_size"]
    ratios = [p["of_totals"] for p in result["paired"] if p["batch_size"] == size]
    return target._replace(values=tuple(ratios))


def _loss_at_100(result: Any, target: Target) -> Target:
    runs = result["contestants"]["cgfac"]["runs"]
    return target._replace(values=tuple(run["loss_at_steps"]["100"] for run in runs))


def _state(result: Any, target: Target) -> Target:
    ours, theirs = (
        result["contestants"][name]["state_bytes"] for name in ("cgfac", "kfac_jax")
    )
    return target._replace(values=(ours / theirs,))


def compile_ratio(result: Any, name: str) -> float:
    """Returns a contestant's seconds of compilation over Adam's at the own batch."""
    probes = result["probes"]
    adam = probes[f"adam@{result['workload']['batch_size']}"]
    return probes[name]["compile_seconds"] / adam["compile_seconds"]


def _compile(result: Any, target: Target) -> Target:
    what = target.what
    if "compile_seconds" in result["probes"].get("kfac_jax", {}):
        what += f" (kfac-jax's / Adam's: {number(compile_ratio(result, 'kfac_jax'))})"
    return target._replace(what=what, values=(compile_ratio(result, "cgfac"),))


def _step_at(result: Any, method: str, width: int) -> float:
    for row in result["rows"]:
        if (row["method"], row["width"]) == (method, width) and "failed" not in row:
            return row["step_seconds"]["mean"]
    raise KeyError(f"{method} at width {width}")


def _wide(result: Any, target: Target) -> Target:
    ours, plain = (_step_at(result, name, 8192) for name in ("cgfac", "gradient"))
    return target._replace(values=(ours / plain,))


def _kfac_step(result: Any, target: Target) -> Target:
    slow, ours = (_step_at(result, name, 4096) for name in ("scale_by_kfac", "cgfac"))
    return target._replace(values=(slow / ours,))


def _turned_up(result: Any, target: Target) -> Target:
    bad = [row for row in result["rows"] if row["verdict"] != "falls"]
    what = f"{target.what}, of {len(result['rows'])}"
    return target._replace(what=what, values=(float(len(bad)),))


def _exponent(result: Any, target: Target) -> Target:
    power = result["exponents"]["cgfac"]
    return target if power is None else target._replace(values=(power,))
