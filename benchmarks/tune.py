"""Finds the best configuration of every rival; `cgfac` keeps its defaults.

A configuration is as good as its time to the last threshold. Those after the first
get no more time than the best so far took, and stop after a third of it if they are
far behind. Where a workload's threshold is Adam's best loss in some epochs, Adam's
learning rate is the one with the least loss, which is then the threshold of the rest.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import contestants
import jax.numpy as jnp
from contestants import Contestant
from race import Rules, race
from workloads import Workload

RIVALS = ("adam", "sgd", "muon", "shampoo", "kfac_jax")

# The first of each is tried first: a good guess makes the rest short.
RATES = {
    "adam": (1e-3, 3e-3, 3e-4, 1e-4, 1e-2),
    "sgd": (1e-2, 3e-3, 3e-2, 1e-3, 1e-1, 3e-1),
    "muon": (1e-2, 3e-3, 3e-2, 1e-3),
    "shampoo": (1e-3, 3e-3, 3e-4, 1e-2),
}
# 150 is that of kfac-jax's own example.
DAMPINGS = (1.0, 0.1, 3.0, 10.0, 0.03, 0.01, 30.0, 150.0)
BATCH_SIZES = {
    "adam": (256, 128, 64, 500, 1000),
    "sgd": (256, 128, 64, 1000),
    "muon": (256, 1000),
}


def grid(
    method: str,
    workload: Workload,
    values: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Returns the configurations of a method, each with its batch size.

    Args:
      method: One of `RIVALS`.
      workload: What it trains on.
      values: Learning rates or dampings; None for all.
      sizes: Batch sizes; None for all.

    Returns:
      Settings for `contestants.build`.
    """
    name = "initial_damping" if method == "kfac_jax" else "learning_rate"
    values = values or (DAMPINGS if method == "kfac_jax" else RATES[method])
    own = (workload.batch_size, *workload.other_batch_sizes)
    if sizes is None:
        sizes = BATCH_SIZES.get(method, own)
        if workload.epochs is not None:
            # Epochs at the workload's own batch size are what is compared there.
            sizes = own
    sizes = [size for size in sizes if size <= workload.num_examples] or own
    # All values at one batch size first: the rest then starts from a good time.
    return [{"batch_size": n, name: x} for n, x in itertools.product(sizes, values)]


def contestant_of(
    method: str, workload: Workload, setting: dict[str, Any], last: Contestant | None
) -> Contestant:
    """Builds a contestant; kfac-jax's damping is in its state: compiled only once."""
    if method == "kfac_jax" and last and last.batch_size == setting["batch_size"]:
        damping = setting["initial_damping"]
        start = last.start

        def start_with(params: Any) -> Any:
            params, (state, count) = start(params)
            state.damping = jnp.full_like(state.damping, damping)
            return params, (state, count)

        return last._replace(start=start_with, options={"initial_damping": damping})
    return contestants.build(method, workload, **setting)


def score(result: dict[str, Any], threshold: float | None) -> tuple[float, float]:
    """Returns what is least for the best: seconds to the threshold, then the loss."""
    best = math.inf if result["best"] is None else result["best"]
    if threshold is None:
        return (0.0, best)
    crossing = result["thresholds"][f"{threshold:g}"]
    return (math.inf if crossing is None else crossing["seconds"], best)


def _setting(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("batch_size", "learning_rate", "initial_damping")
    return {name: row[name] for name in names if name in row}


def _row_score(row: Mapping[str, Any]) -> tuple[float, float]:
    if row["stopped"] == "epochs":
        return (0.0, row["loss"])
    seconds = row["seconds_to_threshold"]
    return (math.inf if seconds is None else seconds, row["loss"])


def tune_method(
    method: str,
    workload: Workload,
    *,
    threshold: float | None,
    budget: float,
    evaluate: Any,
    settings: list[dict[str, Any]] | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs a method's grid.

    Args:
      method: One of `RIVALS`.
      workload: What it trains on.
      threshold: The loss to reach; None to find the least loss in the workload's
        epochs.
      budget: The most seconds of a configuration.
      evaluate: Parameters to the loss over all the data.
      settings: The configurations; those of `grid` if None.
      known: The result for other configurations, to add to.

    Returns:
      The best configuration, what it reached, and all the grid's results.
    """
    why = contestants.missing(method)
    if why is not None:
        return {"skipped": why}
    settings = settings or grid(method, workload)
    rows, best, best_score, pace, last = [], None, (math.inf, math.inf), (), None
    if known and known.get("best"):
        rows = [row for row in known["grid"] if _setting(row) not in settings]
        best = known["best"]
        of_best = next((row for row in rows if _setting(row) == best), None)
        best_score = _row_score(of_best) if of_best else best_score
    for setting in settings:
        text = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        limit = min(budget, best_score[0]) if threshold is not None else budget
        try:
            last = contestant_of(method, workload, setting, last)
            if threshold is None:
                steps = workload.epochs * (
                    workload.num_examples // setting["batch_size"]
                )
                rules = Rules(budget, reference=method, reference_steps=steps)
            else:
                rules = Rules(limit, thresholds=(threshold,), pace=pace)
            result = race(
                workload,
                {method: last},
                rules,
                seed=0,
                evaluate=evaluate,
                description=f"{workload.name}: {method}, {text}",
            )[method]
        except Exception as error:  # a rival that cannot run here is a result too
            why = f"{type(error).__name__}: {error}"[:300]
            print(f"{method} failed: {why}")
            rows.append({**setting, "failed": why})
            if last is None:
                break
            continue
        new = score(result, threshold)
        if new < best_score:
            best, best_score, pace = setting, new, result["history"]
        rows.append(
            {
                **setting,
                "seconds_to_threshold": new[0]
                if threshold is not None and math.isfinite(new[0])
                else None,
                "loss": result["best"],
                "steps": result["steps"],
                "seconds": result["seconds"],
                "stopped": result["stopped"],
            }
        )
    if best is None:
        return {"skipped": rows[-1].get("failed", "diverged everywhere"), "grid": rows}
    return {"best": best, "loss": best_score[1], "grid": rows}


def tune(
    workload: Workload,
    *,
    budget: float,
    smoke: bool = False,
    methods: tuple[str, ...] = RIVALS,
    known: Mapping[str, Any] | None = None,
    values: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Tunes every rival on a workload.

    Args:
      workload: What they train on.
      budget: The most seconds of a configuration.
      smoke: Whether to try two configurations of each alone.
      methods: The rivals; Adam first where its best loss is the others' threshold.
      known: What this returned before.
      values: The only learning rates or dampings to try; the rest as ``known``.
      sizes: The only batch sizes to try; likewise.

    Returns:
      The threshold, and the result of `tune_method` by the method's name.
    """
    evaluate = workload.evaluator()
    known = known or {}
    threshold = workload.thresholds[-1] if workload.thresholds else None
    if threshold is None and "adam" not in methods:
        threshold = known["threshold"]
    adds = values is not None or sizes is not None
    found: dict[str, Any] = {}
    for method in methods:
        settings = grid(method, workload, values, sizes)
        found[method] = tune_method(
            method,
            workload,
            threshold=threshold,
            budget=budget,
            evaluate=evaluate,
            settings=settings[:2] if smoke else settings,
            known=known.get("methods", {}).get(method) if adds else None,
        )
        if threshold is None:
            threshold = found[method]["loss"]
    return {"threshold": threshold, "methods": found}
