"""Many devices: tests/devices with eight of them in a process, and real processes."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

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


def run_of(processes, folder):
    """Losses, of which the example prints some, and parameters."""
    command = ["examples/data_parallel.py", "--steps", "20", "--batch-size", "64"]
    command += ["--all-rows", "--out", str(folder / f"{processes}.json")]
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
    found = json.loads((folder / f"{processes}.json").read_text())
    losses = found["losses"]
    printed = [float(x) for x in re.findall(r"^ *\d+ +([\d.]+)$", result.stdout, re.M)]
    np.testing.assert_allclose(printed, [losses[i] for i in (0, 5, 10, 19)], atol=1e-6)
    return found


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    return run_of(1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_take_the_steps_of_one(processes, of_one_process, tmp_path):
    found = run_of(processes, tmp_path)
    losses = found["losses"]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, of_one_process["losses"], rtol=1e-5)
    expected = of_one_process["params"]
    np.testing.assert_allclose(found["params"], expected, rtol=0, atol=1e-5)


def test_a_process_that_dies_ends_the_others(monkeypatch, tmp_path):
    """Its status is the script's, a signal as shells count it."""
    example = load_example()
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "if '--index 1' in ' '.join(sys.argv):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(example, "__file__", str(script))
    started = time.monotonic()
    assert example.launch(2, []) == 128 + 9
    assert time.monotonic() - started < 30


def load_example():
    path = TESTS.parent / "examples" / "data_parallel.py"
    spec = importlib.util.spec_from_file_location("data_parallel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["collectives", "scale", "measured"])
def test_the_page_shows_what_was_measured_and_counted(part, monkeypatch):
    benchmarks = TESTS.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    page = (TESTS.parent / "docs" / "devices.md").read_text()
    shown = page.split(f"<!-- {part}: start -->")[1].split(f"<!-- {part}: end -->")[0]
    module = importlib.import_module("scale" if part == "measured" else part)
    if part == "measured":
        result = json.loads((benchmarks / "results" / "scale.json").read_text())
        assert result["transformer"] == dataclasses.asdict(module.SMALL)
        expected = module.measured_table(result)
    elif part == "scale":
        expected = module.table(module.Transformer())
    else:
        path = benchmarks / "results" / "collectives.json"
        result = json.loads(path.read_text())
        assert tuple(result["programs"]) == (*module.PROGRAMS, "kfac-jax, pmap")
        expected = module.table(result)
    assert shown.strip() == expected.strip()
