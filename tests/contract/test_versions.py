"""The oldest versions that the metadata admit are those that are tested."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
OLDEST = ROOT / ".ci" / "oldest.txt"


def floors():
    """The lower ends of the dependencies that have one."""
    found = {}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        ends = [s.version for s in requirement.specifier if s.operator == ">="]
        if ends:
            [found[requirement.name]] = ends
    return found


def pins():
    if not OLDEST.exists():
        pytest.fail(
            ".ci/oldest.txt is missing: it pins the oldest versions of the "
            "dependencies, which .ci/run tests. Expected, one a line: "
            + " ".join(f"{name}=={version}" for name, version in floors().items()),
            pytrace=False,
        )
    found = {}
    for line in OLDEST.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            [pin] = requirement.specifier
            assert pin.operator == "==", f".ci/oldest.txt must pin by ==, got {text!r}"
            found[requirement.name] = pin.version
    return found


def test_the_floors_of_pyproject_are_the_versions_that_ci_tests_as_oldest():
    tested = {name: version for name, version in pins().items() if name in floors()}
    assert floors() == tested, (
        "pyproject.toml admits versions that .ci/oldest.txt does not test (or the "
        f"other way round).\n  pyproject.toml: {floors()}\n  .ci/oldest.txt: {tested}"
    )
    assert {"jax", "jaxlib", "flax", "optax"} <= set(tested)


def test_ci_installs_the_oldest_versions():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "oldest.txt" in script + makefile, (
        "Neither .ci/run nor the Makefile uses .ci/oldest.txt: the floors of "
        "pyproject.toml are then promises that nothing tests."
    )


def test_the_oldest_python_is_the_one_that_ci_tests():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [oldest] = re.findall(r"^OLDEST=([\d.]+)$", script, re.MULTILINE)
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]
