"""Many devices: tests/devices with eight of them in a process, and real processes."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parents[1]


def test_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            str(TESTS / "devices"),
        ],
        cwd=TESTS.parent,
        env=os.environ
        | {
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            # Eight devices that call LAPACK at once hang otherwise.
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    tail = (result.stdout + result.stderr)[-8000:]
    assert result.returncode == 0, tail
    assert "passed" in tail, tail
    assert "skipped" not in tail, tail


def losses_of(processes):
    """The losses that the example prints, and what it says of itself."""
    command = ["examples/data_parallel.py", "--steps", "20", "--batch-size", "64"]
    result = subprocess.run(
        [sys.executable, *command, "--processes", str(processes)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"{processes} processes, {processes} devices" in result.stdout
    return [float(x) for x in re.findall(r"loss ([0-9.]+)", result.stdout)]


@pytest.fixture(scope="module")
def of_one_process():
    return losses_of(1)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_take_the_steps_of_one(processes, of_one_process):
    found = losses_of(processes)
    assert len(found) == 4
    assert found[-1] < 0.8 * found[0]
    # Sums over devices are rounded in another order, and eigenpairs amplify that.
    np.testing.assert_allclose(found[0], of_one_process[0], rtol=1e-6)
    np.testing.assert_allclose(found, of_one_process, rtol=1e-3)


@pytest.mark.parametrize("part", ["collectives", "scale"])
def test_the_page_shows_what_was_measured_and_counted(part, monkeypatch):
    benchmarks = TESTS.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    page = (TESTS.parent / "docs" / "devices.md").read_text()
    shown = page.split(f"<!-- {part}: start -->")[1].split(f"<!-- {part}: end -->")[0]
    module = importlib.import_module(part)
    if part == "scale":
        expected = module.table(module.Transformer())
    else:
        path = benchmarks / "results" / "collectives.json"
        expected = module.table(json.loads(path.read_text()))
    assert shown.strip() == expected.strip()
