"""The race: contestants train in turn, and only their steps are on the clock.

Whoever has used the least time takes the next step, so that other load on the machine
slows all of them alike. README.md describes the protocol.
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

History = Sequence[Sequence[Any]]  # steps, seconds and loss of each evaluation

MARKS = (1, 10, 25, 50, 100, 200, 500, 1000)  # steps that are always evaluated
GRID = 0.04  # distance of evaluations relative to the clock: the error of a time
SPARING = 0.5  # least distance of evaluations, relative to the time of one
HOPELESS = 1.25  # tuning gives up above this multiple of the best loss so far
WARM_UP = 3  # steps not counted in step times
# The same for pairs. `cgfac` does more work until its window of 8 captures is full.
PAIRED_WARM_UP = 40


class Rules(NamedTuple):
    """When a contestant stops."""

    budget: float  # seconds on its clock
    thresholds: Sequence[float] = ()  # it stops at the last one
    # This contestant takes so many steps; the others stop at its best loss.
    reference: str | None = None
    reference_steps: int = 0
    pace: History = ()  # it stops if far behind this run after a third of the budget


class Runner:
    """One training run: its state, its clock and its measurements."""

    def __init__(
        self, contestant: Contestant, workload: Workload, params: Any, seed: int
    ):
        self.contestant = contestant
        self.state = contestant.start(params)
        self.batches = workload.batches(contestant.batch_size, seed)
        self.key = jax.random.key(seed)
        self.times: list[float] = []
        self.seconds = 0.0
        self.next_evaluation = 0.0
        self.history: list[tuple[int, float, float]] = []
        self.loss = math.nan  # on the last batch
        self.stopped = ""

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def best(self) -> float:
        """The least evaluated loss so far."""
        losses = [loss for _, _, loss in self.history if math.isfinite(loss)]
        return min(losses, default=math.inf)

    def step(self) -> None:
        """Takes and times one step."""
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


def why_stop(runner: Runner, rules: Rules, reference: Runner | None) -> str:
    """Returns the reason why a contestant stops, or an empty string."""
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
    evaluate: Callable[[Any], float],
) -> dict[str, dict[str, Any]]:
    """Trains all contestants from the same parameters, in turn.

    ``seed`` determines parameters, batches and sampling; ``evaluate`` is the
    workload's `evaluator`. Returns the `summary` of each contestant.
    """
    params = workload.init(seed)
    initial_loss = evaluate(params)  # also compiles
    started = time.perf_counter()
    evaluate(params)
    spacing = SPARING * (time.perf_counter() - started)
    runners = {
        name: Runner(contestant, workload, params, seed)
        for name, contestant in contestants.items()
    }
    for runner in runners.values():
        runner.history.append((0, 0.0, initial_loss))
    reference = runners.get(rules.reference) if rules.reference else None
    active = dict(runners)
    with tqdm(
        total=rules.budget * len(active),
        desc=f"{workload.name}, seed {seed}",
        bar_format="{desc} |{bar:15}| {n:.0f}/{total:.0f} s {postfix}",
        mininterval=0.5,
    ) as bar:
        while active:
            name, runner = min(active.items(), key=lambda item: item[1].seconds)
            runner.step()
            bar.update(min(runner.times[-1], bar.total - bar.n))
            bests = [f"{name} {r.best:.4g}" for name, r in active.items()]
            bar.set_postfix_str(", ".join(bests), refresh=False)
            due = runner.num_steps in MARKS or runner.seconds >= runner.next_evaluation
            due |= not math.isfinite(runner.loss)
            if due or why_stop(runner, rules, reference):
                runner.evaluate(evaluate, spacing)
                runner.stopped = why_stop(runner, rules, reference)
            if runner.stopped:
                del active[name]
    return {name: summary(runner) for name, runner in runners.items()}


def first_crossing(history: History, threshold: float) -> dict[str, float] | None:
    """Returns steps and seconds of the first loss at or below a threshold, or None."""
    for steps, seconds, loss in history:
        if loss is not None and loss <= threshold:
            return {"steps": steps, "seconds": seconds}
    return None


def summary(runner: Runner) -> dict[str, Any]:
    """Returns a run as JSON values; losses that are not finite become None."""
    history = [
        [steps, seconds, loss if math.isfinite(loss) else None]
        for steps, seconds, loss in runner.history
    ]
    return {
        "history": history,
        "loss_at_steps": {str(n): loss for n, _, loss in history if n in MARKS},
        "best": runner.best if math.isfinite(runner.best) else None,
        "steps": runner.num_steps,
        "seconds": runner.seconds,
        "step_seconds": step_seconds(runner.times[WARM_UP:] or runner.times),
        "stopped": runner.stopped,
    }


def step_seconds(times: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(times)), "mean": float(np.mean(times))}


def paired_step_times(
    workload: Workload, ours: Contestant, other: Contestant, *, pairs: int, seed: int
) -> dict[str, Any]:
    """Times steps of two contestants in strict alternation on the same batches.

    `cgfac` does some of its work only every few steps; at small batches it renews
    eigenpairs every 64th step. The ratio of totals counts this work in full if
    ``pairs`` is a multiple of 64.
    """
    params = workload.init(seed)
    runners = [Runner(c, workload, params, seed) for c in (ours, other)]
    for i in tqdm(range(PAIRED_WARM_UP + pairs), desc=f"{workload.name} paired steps"):
        # Alternate who goes first, so that neither always finds warmer caches.
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
        "step_seconds": [step_seconds(slow), step_seconds(fast)],
    }
