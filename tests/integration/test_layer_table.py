"""Every line of `make layers`: covered or reported, how exactly, and on its page."""

import pytest

import pages
from layer_table import END, START, TABLE, examine, page_line

CASES = [(framework, name) for framework, table in TABLE.items() for name in table]
# Relative errors of gradients in float32; rounding of bfloat16 where that computes.
TOLERANCES = {"half precision": 2e-2, "cast on the way": 1e-2}


def lines_of_the_page():
    """The lines of docs/layers.md, by framework."""
    text = (pages.ROOT / "docs" / "layers.md").read_text("utf-8")
    tables = text.split(START)[1].split(END)[0]
    linen, nnx = tables.split("## NNX")
    return {
        framework: [x for x in table.splitlines() if x.startswith("|")][2:]
        for framework, table in (("linen", linen), ("nnx", nnx))
    }


@pytest.mark.parametrize(("framework", "name"), CASES)
def test_the_line_of_a_case(framework, name):
    is_covered, _ = TABLE[framework][name]
    line = examine(framework, name)
    assert is_covered == (line.reported == ())
    tolerance = TOLERANCES.get(name, 1e-5)
    for path, error in line.gradient_errors.items():
        assert error <= tolerance, (path, error)
    if line.covered:
        assert line.update_error <= 1e-7
    shown = page_line(name, line)
    written = lines_of_the_page()[framework]
    assert shown in written, 'run make layers ARGS="--page docs/layers.md"'


def test_the_page_has_a_line_for_every_case_and_no_other():
    shown = lines_of_the_page()
    for framework, cases in TABLE.items():
        names = [line.split(" | ")[0].removeprefix("| ") for line in shown[framework]]
        assert names == list(cases)
