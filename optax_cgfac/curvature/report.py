"""The coverage report: a table of tagged layers, then the parameters left out."""

import math
from collections.abc import Mapping

from optax_cgfac.curvature.spec import CaptureSpec
from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.operators.rows import num_bytes, num_features, num_rows
from optax_cgfac.solve.choose import Plan, SolveSpec, make_plan
from optax_cgfac.solve.factored import sides_in_sample_space
from optax_cgfac.utils.paths import text
from optax_cgfac.utils.types import LayerRows

_HEADER = ("layer", "kind", "matrix", "rows/step", "window", "bytes", "solve", "why")


def format_report(
    spec: CaptureSpec,
    layers: Mapping[str, LayerRows],
    solve_spec: SolveSpec,
    model_bytes: int,
    ranks: Mapping[str, tuple[int, int]],
) -> str:
    """Formats `Curvature.report`; ``ranks`` counts the eigenpairs kept by layer."""
    table: list[tuple[str, ...]] = [_HEADER]
    total = 0
    for tag in spec.tags:
        rows, pair, step = layers[tag.name], ranks.get(tag.name), tag.rows_per_step
        held = num_bytes(rows)
        total += held
        plan = make_plan(solve_spec, num_rows(rows.a), tag.n_in, tag.n_out, pair)
        solve = f"{_space(plan, solve_spec, rows, pair)}, {plan.solver}"
        cells = tag.name, tag.kind, _shape(tag), step, f"{spec.window} x {step}"
        table.append((*map(str, cells), human_bytes(held), solve, plan.reason))
    parameters = sum(tag.size for tag in spec.tags)
    lines = [
        *_align(table),
        f"{len(spec.tags)} layers, {parameters:,} parameters preconditioned, "
        f"{human_bytes(total)} of rows held ({solve_spec.damping_form} damping).",
    ]
    if model_bytes:
        lines.append(f"{human_bytes(model_bytes)} of examples for the quadratic model.")
    if spec.uncovered:
        lines.append("Parameters without curvature:")
        lines += [f"  {text(path)}: {reason}" for path, reason in spec.uncovered]
    else:
        lines.append("Every parameter is covered.")
    return "\n".join(lines)


def human_bytes(num_bytes: int) -> str:
    """Returns a size as text, such as ``"3.0 MiB"``."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    power = min(int(math.log(num_bytes, 1024)), 4)
    return f"{num_bytes / 1024**power:.1f} {('', 'K', 'M', 'G', 'T')[power]}iB"


def _space(
    plan: Plan, solve_spec: SolveSpec, rows: LayerRows, ranks: tuple[int, int] | None
) -> str:
    """Returns the space of the solve, for each side where they separate."""
    if plan.solver == "eigenpairs" and ranks is not None:
        return " | ".join(f"rank {rank}" for rank in ranks)
    if plan.space != "sample" or solve_spec.damping_form != "factored":
        return plan.space
    count, texts = num_rows(rows.a), []
    for side, in_sample_space in zip(rows, sides_in_sample_space(rows), strict=True):
        factor = f"factor {num_features(side)}"
        texts.append(f"sample {count}" if in_sample_space else factor)
    return " | ".join(texts)


def _shape(tag: LayerTag) -> str:
    n_in = tag.n_in if tag.bias is None else f"({tag.n_in - 1}+1)"
    return "x".join(map(str, (*tag.stack, n_in, tag.n_out)))


def _align(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]
