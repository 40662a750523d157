"""Finds the best configuration of every rival; `cgfac` keeps its defaults.

The score of a configuration is its time to the last threshold. Later configurations
get no more time than the best so far needed, and stop after a third of it if they are
far behind. Where the threshold is Adam's best loss in some epochs, Adam is tuned for
the least loss, which then is the threshold of the other rivals.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import contestants
from race import Rules, first_crossing, race
from workloads import Workload

RIVALS = ("adam", "sgd", "muon", "shampoo", "kfac_jax")

# Learning rates; for kfac-jax initial dampings, of which 150 is that of its own
# example. The likely best comes first, because a good start shortens the rest.
VALUES = {
    "adam": (1e-3, 3e-3, 3e-4, 1e-4, 1e-2),
    "sgd": (1e-2, 3e-3, 3e-2, 1e-3, 1e-1, 3e-1),
    "muon": (1e-2, 3e-3, 3e-2, 1e-3),
    "shampoo": (1e-3, 3e-3, 3e-4, 1e-2),
    "kfac_jax": (1.0, 0.1, 3.0, 10.0, 0.03, 0.01, 30.0, 150.0),
}
BATCH_SIZES = {  # the others use those of `cgfac`
    "adam": (256, 128, 64, 500, 1000),
    "sgd": (256, 128, 64, 1000),
    "muon": (256, 1000),
}

Setting = Mapping[str, Any]


def grid(method: str, workload: Workload) -> list[Setting]:
    """Returns a method's configurations, as options for `contestants.build`."""
    name = "initial_damping" if method == "kfac_jax" else "learning_rate"
    sizes = own = (workload.batch_size, *workload.other_batch_sizes)
    if workload.epochs is None:  # epochs are only comparable at one batch size
        sizes = BATCH_SIZES.get(method, own)
    sizes = [size for size in sizes if size <= workload.num_examples] or own
    # Try all values at one batch size first, so that the rest starts from a good time.
    pairs = itertools.product(sizes, VALUES[method])
    return [{"batch_size": size, name: value} for size, value in pairs]


def score(row: Mapping[str, Any]) -> tuple[float, float]:
    """Returns what the best configuration minimises: seconds, then the loss."""
    loss = math.inf if row["loss"] is None else row["loss"]
    if row["stopped"] == "epochs":
        return (0.0, loss)
    seconds = row["seconds_to_threshold"]
    return (math.inf if seconds is None else seconds, loss)


def try_setting(
    method: str, workload: Workload, setting: Setting, rules: Rules, evaluate: Any
) -> tuple[dict[str, Any], Sequence[Any]]:
    """Returns a configuration's row of the grid and its history."""
    print(f"{method}: {', '.join(f'{k} {v:g}' for k, v in setting.items())}")
    contestant = contestants.build(method, workload, **setting)
    run = race(workload, {method: contestant}, rules, seed=0, evaluate=evaluate)[method]
    crossings = [first_crossing(run["history"], x) for x in rules.thresholds]
    row = {
        **setting,
        "seconds_to_threshold": crossings[-1]["seconds"] if any(crossings) else None,
        "loss": run["best"],
        **{key: run[key] for key in ("steps", "seconds", "stopped")},
    }
    return row, run["history"]


def tune(
    method: str,
    workload: Workload,
    settings: Sequence[Setting],
    *,
    threshold: float | None,
    budget: float,
) -> dict[str, Any]:
    """Returns a method's best configuration, its loss, and a row for each one tried.

    Args:
      method: One of `RIVALS`.
      workload: The problem.
      settings: The configurations to try.
      threshold: The loss to reach; None minimises the loss in the workload's epochs.
      budget: Seconds for each configuration.
    """
    rows, best, best_score, pace = [], None, (math.inf, math.inf), ()
    evaluate = workload.evaluator()
    for setting in settings:
        if threshold is None:
            steps = workload.num_steps(setting["batch_size"])
            rules = Rules(budget, reference=method, reference_steps=steps)
        else:
            rules = Rules(min(budget, best_score[0]), (threshold,), pace=pace)
        try:
            row, history = try_setting(method, workload, setting, rules, evaluate)
        except Exception as error:  # a rival that cannot run here is a result too
            rows.append({**setting, "failed": contestants.reason(error)})
            continue
        rows.append(row)
        if score(row) < best_score:
            best, best_score, pace = setting, score(row), history
    if best is None:
        return {"skipped": rows[-1].get("failed", "diverged everywhere"), "grid": rows}
    return {"best": best, "loss": best_score[1], "grid": rows}
