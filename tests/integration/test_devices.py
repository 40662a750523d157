"""Many devices: tests/devices with eight of them in a process, and real processes."""

import json
import os
import re

import numpy as np

from training import python


def test_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    tail = python(
        *("-m", "pytest", "-q", "-p", "no:xdist", "tests/devices"),
        timeout=1500,
        XLA_FLAGS=f"{flags} --xla_force_host_platform_device_count=8",
        # Eight devices that call LAPACK at once hang otherwise.
        OPENBLAS_NUM_THREADS="1",
    )[-1000:]
    assert "passed" in tail, tail
    assert "skipped" not in tail, tail


def run_of(processes, folder):
    """Losses, of which the example prints some, and parameters."""
    written = folder / f"{processes}.json"
    arguments = ["--steps", "20", "--batch-size", "64", "--all-rows", "--out", written]
    arguments += ["--processes", processes]
    printed = python("examples/data_parallel.py", *arguments)
    assert f"{processes} processes, {processes} devices" in printed
    found = json.loads(written.read_text())
    losses = found["losses"]
    shown = [float(x) for x in re.findall(r"^ *\d+ +([\d.]+)$", printed, re.M)]
    np.testing.assert_allclose(shown, [losses[i] for i in (0, 5, 10, 19)], atol=1e-6)
    return found


def test_processes_take_the_steps_of_one(tmp_path):
    found, expected = run_of(4, tmp_path), run_of(1, tmp_path)
    losses = found["losses"]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["params"], expected["params"], rtol=0, atol=1e-5)
