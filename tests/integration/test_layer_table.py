"""Every line of `make layers`: covered or reported, and how exactly."""

import pytest

from layer_table import TABLE, examine

CASES = [(framework, name) for framework, table in TABLE.items() for name in table]
# Relative errors of gradients in float32; rounding of bfloat16 where that computes.
TOLERANCES = {"half precision": 2e-2, "cast on the way": 1e-2}


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
