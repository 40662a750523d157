"""The protocol: contestants train in turn, and only their steps are on the clock.

All start from the same parameters. Whoever has used the least time takes the next
step, on batches of its own size, so that a busy machine slows all of them alike.
Compilation, the making of batches and evaluation are off the clock. The loss over all
the training data is evaluated on a grid that grows with the contestant's clock; the
time to a threshold is that of the first evaluation at or below it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from contestants import Contestant
from tqdm import tqdm
from workloads import Workload

MARKS = (1, 10, 25, 50, 100, 200, 500, 1000)  # steps that are always evaluated
GRID = 0.04  # the grid's distance, of the clock: the error of the times to thresholds
SPARING = 0.5  # of an evaluation's own seconds: the least distance, against waiting
HOPELESS = 1.25  # so many times the loss of the best so far, in tuning
WARM_UP = 3  # steps that do not count for step times
# In pairs: while cgfac's window of 8 captures fills, it works more than later. Races
# count those steps.
PAIRED_WARM_UP = 40


class Rules(NamedTuple):
    """When a contestant stops.

    Attributes:
      budget: Seconds on its clock.
      thresholds: It stops at the last one.
      reference: The name of a contestant that takes ``reference_steps`` steps; the
        others stop when they have reached its best loss.
      reference_steps: See above.
      pace: The history of a training to keep up with: whoever is far behind it after
        a third of the budget stops.
    """

    budget: float
    thresholds: Sequence[float] = ()
    reference: str | None = None
    reference_steps: int = 0
    pace: Sequence[Sequence[float]] = ()


class Runner:
    """One contestant's training: its state, its clock and what was measured."""

    def __init__(
        self,
        name: str,
        contestant: Contestant,
        workload: Workload,
        params: Any,
        seed: int,
    ):
        self.name = name
        self.contestant = contestant
        self.state = contestant.start(params)
        self.batches = workload.batches(contestant.batch_size, seed)
        self.key = jax.random.key(seed)
        self.times: list[float] = []
        self.seconds = 0.0
        self.next_evaluation = 0.0
        self.history: list[tuple[int, float, float]] = []  # steps, seconds, loss
        self.loss = float("nan")  # of the last batch
        self.stopped = ""

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return len(self.times)

    @property
    def best(self) -> float:
        """The least loss over all the data so far."""
        losses = [loss for _, _, loss in self.history if math.isfinite(loss)]
        return min(losses, default=math.inf)

    def step(self) -> None:
        """Takes one step on the next batch, by the clock."""
        batch = next(self.batches)
        rng = jax.random.fold_in(self.key, self.num_steps)
        jax.block_until_ready((batch, rng))
        start = time.perf_counter()
        self.state, loss = self.contestant.step(self.state, batch, rng)
        jax.block_until_ready((self.state, loss))
        self.times.append(time.perf_counter() - start)
        self.seconds += self.times[-1]
        self.loss = float(loss)

    def evaluate(self, evaluate: Callable[[Any], float], spacing: float) -> None:
        """Adds the loss over all the data to the history."""
        loss = evaluate(self.state[0])
        self.history.append((self.num_steps, self.seconds, loss))
        self.next_evaluation = self.seconds + max(GRID * self.seconds, spacing)

    def due(self) -> bool:
        """Whether it is time to evaluate."""
        return (
            self.num_steps in MARKS
            or self.seconds >= self.next_evaluation
            or not math.isfinite(self.loss)
        )


def why_stop(runner: Runner, rules: Rules, reference: Runner | None) -> str:
    """Returns why a contestant stops, empty if it does not."""
    if runner.history and not math.isfinite(runner.history[-1][2]):
        return "diverged"
    if runner is reference:
        return "epochs" if runner.num_steps >= rules.reference_steps else ""
    goal = -math.inf
    if reference is not None and reference.stopped:
        goal = reference.best
    elif rules.thresholds:
        goal = rules.thresholds[-1]
    if runner.best <= goal and runner.num_steps >= runner.contestant.min_steps:
        return "reached"
    if runner.seconds >= rules.budget:
        return "budget"
    rung = rules.budget / 3
    if rules.pace and runner.seconds >= rung:
        there = [loss for _, seconds, loss in rules.pace if seconds <= rung and loss]
        if runner.best > HOPELESS * min(there, default=math.inf):
            return "hopeless"
    return ""


def race(
    workload: Workload,
    contestants: Mapping[str, Contestant],
    rules: Rules,
    *,
    seed: int,
    evaluate: Callable[[Any], float] | None = None,
    description: str = "",
) -> dict[str, dict[str, Any]]:
    """Trains all contestants from the same parameters, in turn.

    Args:
      workload: What they train on.
      contestants: By the names of the result.
      rules: When they stop.
      seed: Of the parameters, the batches and the sampling.
      evaluate: Parameters to the loss; compiled here if None.
      description: For the progress bar.

    Returns:
      What was measured of each, which `json` can write.
    """
    evaluate = evaluate or workload.evaluator()
    params = workload.init(seed)
    initial_loss = evaluate(params)
    started = time.perf_counter()
    evaluate(params)
    spacing = SPARING * (time.perf_counter() - started)
    runners = {
        name: Runner(name, contestant, workload, params, seed)
        for name, contestant in contestants.items()
    }
    for runner in runners.values():
        runner.history.append((0, 0.0, initial_loss))
    reference = runners.get(rules.reference) if rules.reference else None
    active = list(runners.values())
    with tqdm(
        total=rules.budget * len(active),
        desc=description or workload.name,
        bar_format="{desc} |{bar:15}| {n:.0f}/{total:.0f} s {postfix}",
        mininterval=0.5,
    ) as bar:
        while active:
            runner = min(active, key=lambda runner: runner.seconds)
            runner.step()
            bar.update(min(runner.times[-1], bar.total - bar.n))
            bar.set_postfix_str(
                ", ".join(f"{r.name} {r.best:.4g}" for r in active), refresh=False
            )
            stop = why_stop(runner, rules, reference)
            if stop or runner.due():
                runner.evaluate(evaluate, spacing)
                runner.stopped = why_stop(runner, rules, reference)
            if runner.stopped:
                active.remove(runner)
    return {name: summary(runner, rules) for name, runner in runners.items()}


def first_crossing(
    history: Sequence[Sequence[float]], threshold: float
) -> dict[str, float] | None:
    """Returns the first evaluation at or below a threshold.

    Args:
      history: Triples of steps, seconds and loss.
      threshold: The loss to reach.

    Returns:
      Its ``steps`` and ``seconds``, and ``after_seconds``, when the loss was still
      above; None if it was not reached.
    """
    before = 0.0
    for steps, seconds, loss in history:
        if loss is not None and loss <= threshold:
            return {"steps": steps, "seconds": seconds, "after_seconds": before}
        before = seconds
    return None


def summary(runner: Runner, rules: Rules) -> dict[str, Any]:
    """What JSON keeps of a training; losses that are not finite become None."""
    history = [
        [steps, seconds, loss if math.isfinite(loss) else None]
        for steps, seconds, loss in runner.history
    ]
    times = runner.times[WARM_UP:] or runner.times
    return {
        "history": history,
        "thresholds": {
            f"{threshold:g}": first_crossing(history, threshold)
            for threshold in rules.thresholds
        },
        "loss_at_steps": {str(n): loss for n, _, loss in history if n in MARKS},
        "best": runner.best if math.isfinite(runner.best) else None,
        "steps": runner.num_steps,
        "seconds": runner.seconds,
        "step_seconds": {
            "median": float(np.median(times)),
            "mean": float(np.mean(times)),
        },
        "stopped": runner.stopped,
    }


def paired_step_times(
    workload: Workload, ours: Contestant, other: Contestant, *, pairs: int, seed: int
) -> dict[str, Any]:
    """Times two contestants' steps in strict alternation on the same batches.

    A step of `cgfac` does some of its work only every few steps, eigenpairs at small
    batches every 64th: the ratio of the totals counts these in full if ``pairs`` is a
    multiple of 64.

    Args:
      workload: What they train on.
      ours: The numerator.
      other: The denominator, with the same batch size.
      pairs: How many steps of each are timed, after `PAIRED_WARM_UP` ones.
      seed: Of parameters, batches and sampling.

    Returns:
      The ratio of the totals, median and quartiles of the ratios of pairs, and both
      step times.

    Raises:
      ValueError: If the batch sizes differ.
    """
    if ours.batch_size != other.batch_size:
        raise ValueError(
            f"Paired step times need one batch size, got {ours.batch_size} and "
            f"{other.batch_size}."
        )
    params = workload.init(seed)
    runners = [Runner(c.method, c, workload, params, seed) for c in (ours, other)]
    total = PAIRED_WARM_UP + pairs
    for i in tqdm(range(total), desc=f"{workload.name} paired steps"):
        # Who goes first alternates, so that neither always has the warmer caches.
        for runner in runners if i % 2 else reversed(runners):
            runner.step()
    slow, fast = (np.array(runner.times[PAIRED_WARM_UP:]) for runner in runners)
    return {
        "batch_size": ours.batch_size,
        "pairs": pairs,
        "seed": seed,
        "of_totals": float(slow.sum() / fast.sum()),
        "median": float(np.median(slow / fast)),
        "quartiles": np.quantile(slow / fast, (0.25, 0.75)).tolist(),
        "step_seconds": [
            {"median": float(np.median(times)), "mean": float(np.mean(times))}
            for times in (slow, fast)
        ],
        "settings": [ours.settings, other.settings],
    }
