"""The printed report: what is covered, how it is solved, and what is left."""

import re

import jax
import pytest

import optax_cgfac
from models import NUM_EXAMPLES, Heads, Scanned, init, normal
from steps import problem


def table(report):
    """The rows of the table by layer name, cells by column name."""
    lines = report.split(" layers, ")[0].splitlines()[:-1]
    ends = [m.end() for m in re.finditer(r"-+ *", lines[1])]
    starts = [0, *ends[:-1]]

    def cells(line):
        return [
            line[i:j].strip() for i, j in zip(starts, [*ends[:-1], None], strict=True)
        ]

    rows = [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]
    return {row["layer"]: row for row in rows}


def estimate(model, inputs, **options):
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x),
        "squared_error",
        examples=4,
        **options,
    )
    return estimator.init(init(model, inputs), inputs)


def test_the_table_names_layers_kinds_shapes_and_rows():
    rows = table(problem().curvature().report())
    assert list(rows) == ["hidden", "out"]
    expected = {"kind": "dense", "matrix": "(5+1)x4", "rows/step": "4"}
    assert rows["hidden"].items() >= (expected | {"window": "2 x 4"}).items()
    assert rows["out"]["matrix"] == "4x3"


def test_stacked_layers_show_their_stack():
    rows = table(estimate(Scanned(), normal(0, NUM_EXAMPLES, 5)).report())
    assert rows["blocks/Dense_0"]["matrix"] == "3x(4+1)x4"
    rows = table(estimate(Heads(), normal(0, NUM_EXAMPLES, 2, 5)).report())
    assert rows["heads"]["kind"] == "dense_general"
    assert rows["heads"]["matrix"] == "2x(5+1)x6"


def test_bytes_are_those_of_the_arrays():
    curvature = problem().curvature()
    rows = table(curvature.report())
    total = 0
    for name, held in curvature.layers.items():
        num_bytes = held.a.nbytes + held.g.nbytes
        assert rows[name]["bytes"] == f"{num_bytes} B"
        total += num_bytes
    # 8 rows of float32: (6 + 4) and (4 + 3) numbers wide.
    assert total == 8 * 4 * (10 + 7)
    expected = f"2 layers, {6 * 4 + 4 * 3} parameters preconditioned, {total} B of rows"
    assert expected in curvature.report()


@pytest.mark.parametrize(
    ("options", "solve"),
    [
        ({}, "factor 6 | factor 4, cholesky"),
        ({"space": "parameter"}, "parameter, cg"),
        ({"damping_form": "tikhonov", "space": "sample"}, "sample, cg"),
    ],
)
def test_the_solve_column_follows_the_options_and_says_why(options, solve):
    row = table(problem().curvature().report(**options))["hidden"]
    assert row["solve"] == solve
    assert "sample" in row["why"]
    assert "parameter" in row["why"]
    assert row["why"].startswith("asked for") == ("space" in options)


@pytest.mark.parametrize(
    ("width", "window", "solve", "sign"),
    [(5, 8, "parameter, cg", ">"), (500, 1, "sample, cg", "≤")],
)
def test_tikhonov_takes_the_space_that_costs_less(width, window, solve, sign):
    curvature = estimate(Heads(), normal(0, NUM_EXAMPLES, 2, width), window=window)
    row = table(curvature.report(damping_form="tikhonov"))["heads"]
    assert row["solve"] == solve
    assert sign in row["why"]


def test_uncovered_parameters_are_listed_with_the_reason():
    model = Scanned(axes=False)
    curvature = estimate(model, normal(0, NUM_EXAMPLES, 5), fallback=True)
    report = curvature.report()
    _, uncovered = report.split("Parameters without curvature:\n")
    lines = uncovered.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "blocks/Dense_0/bias",
        "blocks/Dense_0/kernel",
    ]
    assert all("capture_axes()" in line for line in lines)
    assert "Every parameter is covered" not in report
    assert "blocks/Dense_0" not in table(report)


def test_a_report_is_static_and_works_under_jit():
    reports = []

    @jax.jit
    def traced(curvature):
        reports.append(curvature.report())
        return curvature

    traced(problem().curvature())
    assert reports == [problem().curvature().report()]
    assert reports[0].endswith("Every parameter is covered.")
