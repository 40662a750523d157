"""Measures one contestant in its own process, and describes the machine.

    python benchmarks/measure.py '{"workload": "curves", "method": "adam"}'

prints one line of JSON; the keys are the arguments of `measure`. The peak memory is
the high-water mark of the resident memory of that process. Where Linux allows a reset,
it covers only the steps, without what compilation needed.
"""

import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import contestants
import jax
import workloads
from race import Runner, step_seconds

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "optax_cgfac")
RIVALS = ("kfac-jax", "precondition-opt")
STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident(key: str) -> int:
    """Returns VmRSS (the resident memory) or VmHWM (its peak) in bytes."""
    if STATUS.exists():
        return 1024 * int(STATUS.read_text().split(f"{key}:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Resets the memory's high-water mark and returns whether that worked."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # frees what compilation left
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def measure(
    workload: str,
    method: str,
    *,
    batch_size: int | None = None,
    options: dict[str, float] | None = None,
    warm_up: int = 3,
    steps: int = 10,
    smoke: bool = False,
) -> dict[str, Any]:
    """Measures memory, compilation and steps of a contestant in this process."""
    problem = workloads.get(workload, smoke)
    jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
    at_start = resident("VmRSS")
    contestant = contestants.build(
        method, problem, batch_size=batch_size, **(options or {})
    )
    runner = Runner(contestant, problem, problem.init(0), seed=0)
    jax.block_until_ready(runner.state)
    was_reset = reset_peak()
    before = resident("VmRSS")
    for _ in range(warm_up + steps):
        runner.step()
    peak = resident("VmHWM")
    timed = runner.times[warm_up:]
    return {
        "workload": workload,
        **contestant.settings,
        "compile_seconds": contestant.compile_seconds,
        "state_bytes": contestant.state_bytes,
        "step_seconds": {**step_seconds(timed), "least": min(timed), "steps": steps},
        "memory": {
            "at_start": at_start,  # Python, JAX and the data
            "peak": peak,
            "of_training": peak - at_start,
            "of_steps": peak - before,
            "without_compilation": was_reset,
        },
    }


def measure_apart(*, timeout: float = 600.0, **asked: Any) -> dict[str, Any]:
    """Runs `measure` with the other arguments in a new process.

    Returns its result, or the arguments and the reason of failure under ``failed``.
    """
    command = [sys.executable, __file__, json.dumps(asked)]
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


def environment() -> dict[str, Any]:
    """Returns versions, processor, device and load: what results depend on."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    device = jax.devices()[0]
    variables = ("XLA_FLAGS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in (*PACKAGES, *RIVALS)},
        "platform": platform.platform(terse=True),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": f"{device.platform} ({device.device_kind})",
        **{name: os.environ[name] for name in variables if name in os.environ},
        "load before": round(os.getloadavg()[0], 2),  # of the minute before
    }


def others_seconds() -> float:
    """Returns the CPU seconds of all other processes so far; NaN if not on Linux."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return math.nan
    fields = stat.read_text().splitlines()[0].split()[1:9]
    _, _, _, idle, wait, *_ = fields = [int(field) for field in fields]
    ticks = sum(fields) - idle - wait
    own = sum(os.times()[:4])  # of this process and its children
    return ticks / os.sysconf("SC_CLK_TCK") - own


def with_environment(function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """Calls a function and adds the environment and the load to its result."""
    facts, others, start = environment(), others_seconds(), time.perf_counter()
    result = function(*args, **kw)
    seconds = time.perf_counter() - start
    busy = max(others_seconds() - others, 0) / seconds
    facts["others used"] = f"{busy:.2f} cores meanwhile"
    facts["took"] = f"{seconds:.0f} s"
    return {"environment": facts, **result}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
