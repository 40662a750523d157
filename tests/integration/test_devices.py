"""Runs tests/devices in a process of its own, whose CPU counts as eight devices."""

import os
import pathlib
import subprocess
import sys

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
