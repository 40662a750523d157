"""Reads the results' JSON: targets, tables, plots and the README's section.

python benchmarks/report.py                     # prints, draws
python benchmarks/report.py --readme README.md  # rewrites the section as well
python benchmarks/report.py --readme README.md --check   # exits 1 if it differs
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contestants import LABELS
from plots import draw_race, draw_widths, label
from targets import Results, Target, crossings, number, targets
from tune import RIVALS
from workloads import WORKLOADS

RESULTS = pathlib.Path(__file__).parent / "results"
START, END = "<!-- performance: start -->", "<!-- performance: end -->"
MIB = 2**20


def load(folder: pathlib.Path) -> Results:
    """Returns the results in a folder by name, those that are there."""
    names = (*WORKLOADS, "widths", "robustness", "tuned")
    paths = {name: folder / f"{name}.json" for name in names}
    return {k: json.loads(p.read_text()) for k, p in paths.items() if p.exists()}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def target_table(found: Sequence[Target]) -> str:
    """Returns targets with what was measured."""
    rows = [[t.what, t.goal(), t.figure(), t.verdict()] for t in found]
    return markdown(["target", "wanted", "measured", ""], rows)


def _reached(result: Mapping[str, Any], name: str, threshold: float | None) -> str:
    found = crossings(result, name, threshold)
    seconds = [c["seconds"] for c in found if c is not None]
    if not seconds:
        return "not reached"
    steps = int(np.median([c["steps"] for c in found if c is not None]))
    text = f"{number(np.median(seconds))} s in {steps:,}"
    if len(seconds) > 1:
        text += f" ({number(min(seconds))} to {number(max(seconds))} s)"
    if len(seconds) < len(found):
        text += f", {len(seconds)} of {len(found)} seeds"
    return text


def race_table(result: Mapping[str, Any]) -> str:
    """Returns a row for each contestant: its costs and when it got to the last loss."""
    thresholds = result["workload"]["thresholds"]
    last = thresholds[-1] if thresholds else None
    goal = f"{last:g}" if thresholds else "Adam's best"
    rows = []
    for name, contestant in result["contestants"].items():
        probe = result["probes"].get(name, {})
        steps = [run["step_seconds"]["mean"] for run in contestant["runs"]]
        memory = probe.get("memory")
        compilation = probe.get("compile_seconds", contestant["compile_seconds"])
        rows.append(
            [
                label(contestant["settings"]),
                _reached(result, name, last),
                number(1e3 * np.median(steps)) if steps else "-",
                number(compilation),
                number(contestant["state_bytes"] / MIB),
                number(memory["of_training"] / MIB) if memory else "-",
            ]
        )
    for name, why in result["skipped"].items():
        rows.append([f"{name}: {why}", *["-"] * 5])
    header = [
        f"{result['workload']['title']}, {result['workload']['metric']}",
        f"to {goal}: seconds, steps",
        "ms/step",
        "compile, s",
        "state, MiB",
        "peak, MiB",
    ]
    return markdown(header, rows)


def threshold_table(result: Mapping[str, Any]) -> str:
    """Returns when each contestant reached each loss."""
    names = list(result["contestants"])
    losses = result["workload"]["thresholds"]
    rows = [[f"{x:g}", *(_reached(result, n, x) for n in names)] for x in losses]
    labels = [label(result["contestants"][n]["settings"]) for n in names]
    return markdown([result["workload"]["metric"], *labels], rows)


def paired_table(result: Mapping[str, Any]) -> str:
    """Returns the ratios of step times, `cgfac` to Adam, at the same batch size."""
    rows = []
    for pair in result["paired"]:
        low, high = pair["quartiles"]
        rows.append(
            [
                f"batch {pair['batch_size']}, seed {pair['seed']}",
                number(pair["of_totals"]),
                number(pair["median"]),
                f"{number(low)} to {number(high)}",
                str(pair["pairs"]),
            ]
        )
    header = ["step, `cgfac()` / Adam", "of totals", "median", "quartiles", "pairs"]
    return markdown(header, rows)


def width_table(result: Mapping[str, Any]) -> str:
    """Returns step time and peak memory of one layer, by width and method."""
    rows = {(row["method"], row["width"]): row for row in result["rows"]}
    widths = sorted({width for _, width in rows})
    methods = list(dict.fromkeys(method for method, _ in rows))
    body = []
    for method in methods:
        cells = []
        for width in widths:
            row = rows.get((method, width))
            if row is None:
                cells.append("-")
            elif "failed" in row:
                cells.append("failed")
            else:
                seconds, memory = row["step_seconds"]["mean"], row["memory"]
                mebibytes = number(memory["of_training"] / MIB)
                cells.append(f"{number(1e3 * seconds)} ms, {mebibytes} MiB")
        power = result["exponents"].get(method)
        body.append([LABELS[method], *cells, "-" if power is None else f"{power:.2f}"])
    header = ["one dense layer, batch 256", *map(str, widths), "exponent"]
    return markdown(header, body)


def robustness_table(result: Mapping[str, Any]) -> str:
    """Returns the last loss of each training, and what became of it."""
    rows = {(r["workload"], r["batch_size"]): r for r in result["rows"]}
    sizes = sorted({size for _, size in rows})
    body = []
    for name in (n for n in WORKLOADS if any(n == key[0] for key in rows)):
        cells = []
        for size in sizes:
            row = rows.get((name, size))
            if row is None:
                cells.append("-")
                continue
            last = "" if row["last"] is None else number(row["last"])
            falls = row["verdict"] == "falls"
            cells.append(last if falls else f"{last} {row['verdict']}".strip())
        body.append([name, *cells])
    header = [f"loss after {result['steps']:,} steps, batch", *map(str, sizes)]
    return markdown(header, body)


def tuning_table(tuned: Mapping[str, Any]) -> str:
    """Returns the best configuration of every rival and how long it took in tuning."""
    names = [name for name in WORKLOADS if name in tuned]
    methods = [m for m in RIVALS if any(m in tuned[n]["methods"] for n in names)]
    rows = []
    for method in methods:
        cells = [_tuned(tuned[name]["methods"].get(method)) for name in names]
        rows.append([LABELS[method], *cells])
    return markdown(["best of its grid, seed 0", *names], rows)


def _tuned(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found.get("best") is None:
        return found["skipped"].split(":")[0]
    rows = [r for r in found["grid"] if "failed" not in r]
    value = found["best"].get("learning_rate", found["best"].get("initial_damping"))
    text = f"{value:g}, batch {found['best']['batch_size']}: "
    times = [r["seconds_to_threshold"] for r in rows if r["seconds_to_threshold"]]
    if times:
        return text + f"{number(min(times))} s"
    if any(row["stopped"] == "epochs" for row in rows):
        return text + f"loss {number(found['loss'])}"
    row = next(r for r in rows if found["best"].items() <= r.items())
    seconds, end = row["seconds"], row["stopped"]
    text += f"{number(found['loss'])} in {seconds:.0f} s"
    return text + (", diverged" if end == "diverged" else "")


def environment_line(results: Results) -> str:
    """Returns where the figures come from, in a sentence."""
    # Of the first file; `details` ends with those of all.
    names = [n for n in (*WORKLOADS, "widths", "robustness") if n in results]
    facts = results[names[0]]["environment"]
    races = [results[name] for name in WORKLOADS if name in results]
    counts = {race["settings"]["seeds"] for race in races} or {1}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    packages = ("jax", "flax", "optax", "kfac-jax")
    versions = ", ".join(f"{name} {facts[name]}" for name in packages)
    return (
        f"{facts['cores']} cores ({facts['cpu']}), Python {facts['python']}, "
        f"{versions}; medians over {seeds} seeds, the least and the greatest in "
        "brackets."
    )


def section(results: Results) -> str:
    """Returns what stands between the README's markers.

    Raises:
      ValueError: If there is no result, or one of a smoke run.
    """
    measured = [
        name for name in (*WORKLOADS, "widths", "robustness") if name in results
    ]
    if not measured:
        raise ValueError("There are no results: run `benchmarks/run.py all` first.")
    smoke = [name for name in measured if results[name].get("smoke")]
    if smoke:
        raise ValueError(f"Smoke runs are no results: {', '.join(smoke)}.")
    parts = [environment_line(results)]
    races = [name for name in WORKLOADS if name in results]
    untuned = [name for name in races if not results[name]["tuned"]]
    if untuned:
        parts.append(f"Rivals at usual settings, not tuned: {', '.join(untuned)}.")
    parts += [race_table(results[name]) for name in races]
    if "tuned" in results:
        parts.append(
            "Tuning of the rivals: the seconds to the last loss, or the loss that was "
            "reached; a dash was not measured. Not all of them are raced above."
        )
        parts.append(tuning_table(results["tuned"]))
    if "widths" in results:
        parts.append(width_table(results["widths"]))
    if "robustness" in results:
        parts.append(robustness_table(results["robustness"]))
    found = targets(results)
    parts.append("What the project wants to reach, and has or has not:")
    parts.append(target_table([t for t in found if t.measured is not None]))
    rest = "; ".join(t.what for t in found if t.measured is None)
    parts += [f"Not measured yet: {rest}."] if rest else []
    return "\n\n".join(parts)


def replace_section(text: str, new: str) -> str:
    """Returns a README's text with the section between the markers replaced.

    Args:
      text: The README's.
      new: The section's.

    Returns:
      The text.

    Raises:
      ValueError: If a marker is not there exactly once, in this order.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"The README needs one line {START!r} and one {END!r}.")
    before, rest = text.split(START)
    if END not in rest:
        raise ValueError(f"In the README {END!r} stands before {START!r}.")
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{new}\n\n{END}{after}"


def details(results: Results) -> str:
    """Returns everything as text: targets, and tables of each workload."""
    parts = ["# Targets", target_table(targets(results))]
    if any(result.get("smoke") for result in results.values()):
        parts.insert(0, "A SMOKE RUN: tiny models, batches and data; no figure counts.")
    for name in WORKLOADS:
        if name not in results:
            continue
        result = results[name]
        parts += [f"# {result['workload']['title']}", race_table(result)]
        if result["workload"]["thresholds"]:
            parts.append(threshold_table(result))
        parts.append(paired_table(result))
    if "widths" in results:
        parts += ["# Widths", width_table(results["widths"])]
    if "robustness" in results:
        parts += ["# Every default", robustness_table(results["robustness"])]
    if "tuned" in results:
        parts += ["# Tuning", tuning_table(results["tuned"])]
    for name, result in results.items():
        if "environment" in result:
            facts = [f"{key} {value}" for key, value in result["environment"].items()]
            parts.append(f"{name}: {', '.join(facts)}")
    return "\n\n".join(parts)


def report(
    folder: pathlib.Path, readme: pathlib.Path | None = None, *, check: bool = False
) -> bool:
    """Prints everything and draws; writes a README's section or compares it.

    Args:
      folder: Where the JSON is and where ``report.md`` and the plots go.
      readme: Whose section to rewrite; None for none.
      check: Whether to compare the section instead, and write nothing.

    Returns:
      Whether the section is, or now is, what the results give.
    """
    results = load(folder)
    if check:
        if readme is None:
            raise ValueError("--check needs --readme.")
        text = readme.read_text()
        return replace_section(text, section(results)) == text
    text = details(results)
    print(text)
    (folder / "report.md").write_text(text + "\n")
    for name in WORKLOADS:
        if name in results:
            draw_race(folder / f"{name}.png", results[name])
    if "widths" in results:
        draw_widths(folder / "widths.png", results["widths"])
    if readme is not None:
        readme.write_text(replace_section(readme.read_text(), section(results)))
        print(f"\nwritten to {readme}")
    return True


def main(argv: list[str] | None = None) -> None:
    """Reports from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the folder")
    parser.add_argument("--readme", type=pathlib.Path, help="rewrite its section")
    parser.add_argument("--check", action="store_true", help="only compare it")
    args = parser.parse_args(argv)
    try:
        same = report(args.out, args.readme, check=args.check)
    except ValueError as error:
        sys.exit(f"report: {error}")
    if not same:
        sys.exit(
            f"report: {args.readme} differs from the results; run this without --check"
        )


if __name__ == "__main__":
    main()
