"""Whether `cgfac()` at its defaults keeps falling, at any batch size.

A training has diverged if its loss over all the data is not finite or above where it
began, and has turned up if at its end that loss has risen again by more than
`TOLERANCE` of the whole way down. Medians of three evaluations stand for the loss, so
that one bad batch is no verdict.
"""

import math
from collections.abc import Sequence
from typing import Any

import contestants
import jax
import numpy as np
import workloads
from tqdm import tqdm

BATCH_SIZES = (64, 128, 256, 512, 1000)
STEPS = 1000
EVERY = 20  # steps between evaluations
TOLERANCE = 0.02


def verdict(losses: Sequence[float | None]) -> dict[str, Any]:
    """Judges a training.

    Args:
      losses: Over all the data, the first one before the first step; None where not
        finite.

    Returns:
      The ``least`` and the ``last`` median of three, how far the last is above the
      least as a share of the way down, ``rise``, and the ``verdict``.
    """
    if None in losses:
        return {"least": None, "last": None, "rise": None, "verdict": "diverged"}
    windows = np.lib.stride_tricks.sliding_window_view(np.array(losses, float), 3)
    medians = np.median(windows, axis=-1)
    least, last = float(medians.min()), float(medians[-1])
    way = losses[0] - least
    rise = (last - least) / way if way > 0 else math.inf
    word = "falls" if rise <= TOLERANCE else "turned up"
    if last >= losses[0]:
        word = "diverged"
    finite = rise if math.isfinite(rise) else None
    return {"least": least, "last": last, "rise": finite, "verdict": word}


def train(
    workload: workloads.Workload, batch_size: int, *, steps: int, every: int, seed: int
) -> dict[str, Any]:
    """Trains with `cgfac` at its defaults and judges the training.

    Args:
      workload: What it trains on.
      batch_size: Of every step.
      steps: How many.
      every: Steps between two evaluations.
      seed: Of the parameters, the batches and the sampling.

    Returns:
      The losses, the damping, and `verdict`.
    """
    contestant = contestants.build("cgfac", workload, batch_size=batch_size)
    evaluate, batches = workload.evaluator(), workload.batches(batch_size, seed)
    state, key = contestant.start(workload.init(seed)), jax.random.key(seed)
    losses, dampings = [evaluate(state[0])], []
    title = f"{workload.name}, batch {batch_size}, seed {seed}"
    for i in (bar := tqdm(range(steps), desc=title, mininterval=1.0)):
        state, _ = contestant.step(state, next(batches), jax.random.fold_in(key, i))
        if (i + 1) % every == 0:
            losses.append(evaluate(state[0]))
            dampings.append(float(state[1][0].damping))
            bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
            if not math.isfinite(losses[-1]):
                break
    kept = [x if math.isfinite(x) else None for x in losses]
    return {
        "workload": workload.name,
        "batch_size": batch_size,
        "seed": seed,
        "steps": i + 1,
        "every": every,
        "losses": kept,
        "dampings": dampings,
        "num_rejected": int(state[1][0].num_rejected),
        **verdict(kept),
    }


def benchmark(
    names: Sequence[str],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    seeds: int = 1,
    smoke: bool = False,
) -> dict[str, Any]:
    """Trains on every workload with every batch size.

    Args:
      names: Of the workloads.
      batch_sizes: Of the steps; those beyond a workload's data are left out.
      seeds: How many, from 0.
      smoke: Whether to take the small workloads and few steps.

    Returns:
      What `train` returns, for each.
    """
    steps, every = (60, 10) if smoke else (STEPS, EVERY)
    rows = []
    for name in names:
        workload = workloads.get(name, smoke)
        for size in (n for n in batch_sizes if n <= workload.num_examples):
            for seed in range(seeds):
                row = train(workload, size, steps=steps, every=every, seed=seed)
                print(
                    f"{name}, batch {size}, seed {seed}: {row['verdict']}, "
                    f"least {row['least']}, last {row['last']}",
                    flush=True,
                )
                rows.append(row)
    return {"smoke": smoke, "steps": steps, "rows": rows}
