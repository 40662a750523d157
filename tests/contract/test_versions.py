"""The oldest versions that the metadata admit are those that are tested."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST = ROOT / ".ci" / "oldest.txt"


def ends(lines, operator):
    """The versions that requirements name after an operator."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        for specifier in requirement.specifier:
            if specifier.operator == operator:
                found[requirement.name] = specifier.version
    return found


def test_the_floors_of_pyproject_are_the_versions_that_ci_tests_as_oldest():
    texts = [line.partition("#")[0].strip() for line in OLDEST.read_text().splitlines()]
    pins = ends(filter(None, texts), "==")
    floors = ends(PROJECT["dependencies"], ">=")
    assert floors.items() <= pins.items()
    assert {"jax", "jaxlib", "flax", "optax"} <= set(floors)


def test_ci_installs_the_oldest_versions_and_tests_the_oldest_python():
    script = (ROOT / ".ci" / "run").read_text()
    assert "oldest.txt" in script + (ROOT / "Makefile").read_text()
    [oldest] = re.findall(r"^OLDEST=([\d.]+)$", script, re.MULTILINE)
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]
