"""Measures one contestant in a process of its own: memory, compile and step time.

    python benchmarks/probe.py curves adam --batch-size 256 --options '{...}'

prints one line of JSON. The high-water mark of the resident memory is that of this
process alone; where Linux lets it be reset, it is taken over the steps, without what
compilation needed.
"""

import argparse
import ctypes
import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident(key: str) -> int:
    """Returns VmRSS (now) or VmHWM (the most so far) in bytes."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Sets the high-water mark back to the present; returns whether it could."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compilation no longer needs
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def measure(
    workload_name: str,
    method: str,
    *,
    batch_size: int | None,
    options: dict[str, float],
    warm_up: int,
    steps: int,
    smoke: bool,
) -> dict[str, Any]:
    """Builds a contestant and times its steps, in this process."""
    import contestants
    import jax
    import workloads

    workload = workloads.get(workload_name, smoke)
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend starts
    at_start = resident("VmRSS")
    contestant = contestants.build(method, workload, batch_size=batch_size, **options)
    state = contestant.start(workload.init(0))
    batches = workload.batches(contestant.batch_size, 0)
    jax.block_until_ready(state)
    was_reset = reset_peak()
    before = resident("VmRSS")
    times = []
    for i in range(warm_up + steps):
        batch = next(batches)
        rng = jax.random.fold_in(jax.random.key(0), i)
        jax.block_until_ready((batch, rng))
        start = time.perf_counter()
        state, loss = contestant.step(state, batch, rng)
        jax.block_until_ready((state, loss))
        times.append(time.perf_counter() - start)
    peak = resident("VmHWM")
    timed = sorted(times[warm_up:])
    return {
        "workload": workload_name,
        **contestant.settings,
        "compile_seconds": contestant.compile_seconds,
        "state_bytes": contestant.state_bytes,
        "step_seconds": {
            "median": timed[len(timed) // 2],
            "mean": sum(timed) / len(timed),
            "least": timed[0],
            "steps": steps,
        },
        "memory": {
            "at_start": at_start,  # Python, JAX and the data
            "before_steps": before,
            "peak": peak,
            "of_training": peak - at_start,
            "of_steps": peak - before,
            "without_compilation": was_reset,
        },
    }


def run(
    workload: str,
    method: str,
    *,
    batch_size: int | None = None,
    options: dict[str, float] | None = None,
    warm_up: int = 3,
    steps: int = 10,
    smoke: bool = False,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Measures a contestant in a new process.

    Args:
      workload: Its name, for `workloads.get`.
      method: As for `contestants.build`.
      batch_size: As for `contestants.build`.
      options: As for `contestants.build`.
      warm_up: Steps before the timed ones.
      steps: Timed steps.
      smoke: Whether to take the small workload.
      timeout: Seconds after which the process is ended.

    Returns:
      What was measured, or ``{"failed": why}`` with the settings.
    """
    command = [sys.executable, __file__, workload, method]
    command += ["--options", json.dumps(options or {}), "--steps", str(steps)]
    command += ["--warm-up", str(warm_up)]
    command += ["--batch-size", str(batch_size)] if batch_size else []
    command += ["--smoke"] if smoke else []
    asked = {"workload": workload, "method": method, "batch_size": batch_size}
    asked |= options or {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {**asked, "failed": f"more than {timeout:g} seconds"}
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {**asked, "failed": last[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures from the command line and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload")
    parser.add_argument("method")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="the small workload")
    args = parser.parse_args(argv)
    result = measure(
        args.workload,
        args.method,
        batch_size=args.batch_size,
        options=args.options,
        warm_up=args.warm_up,
        steps=args.steps,
        smoke=args.smoke,
    )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
