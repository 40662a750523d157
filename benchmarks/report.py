"""Tables from the results' JSON, for the terminal, the README and the documentation."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contestants import METHODS
from plots import draw_race, draw_widths, label
from targets import TARGETS, Result, Results, crossings, last_threshold, number
from tune import RIVALS
from workloads import WORKLOADS

RESULTS = pathlib.Path(__file__).parent / "results"
MEASURED = (*WORKLOADS, "widths", "robustness")
START, END = "<!-- performance: start -->", "<!-- performance: end -->"
MIB = 2**20


def load(folder: pathlib.Path) -> Results:
    """Returns the results in a folder by name."""
    paths = {name: folder / f"{name}.json" for name in (*MEASURED, "tuned")}
    return {k: json.loads(p.read_text()) for k, p in paths.items() if p.exists()}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with all but the first column aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def target_table(results: Results) -> str:
    """Returns the measured targets."""
    rows = [target.row(results) for target in TARGETS]
    return markdown(["target", "wanted", "measured", ""], [r for r in rows if r])


def reached(result: Result, name: str, threshold: float | None) -> str:
    """Returns when a contestant reached a loss, over all seeds."""
    every = crossings(result, name, threshold)
    found = [crossing for crossing in every if crossing is not None]
    if not found:
        return "not reached"
    seconds = [crossing["seconds"] for crossing in found]
    steps = int(np.median([crossing["steps"] for crossing in found]))
    text = f"{number(np.median(seconds))} s in {steps:,}"
    if len(seconds) > 1:
        text += f" ({number(min(seconds))} to {number(max(seconds))} s)"
    if len(found) < len(every):
        text += f", {len(found)} of {len(every)} seeds"
    return text


def race_table(result: Result) -> str:
    """Returns each contestant's costs and its time to the last loss."""
    last = last_threshold(result)
    goal = "Adam's best" if last is None else f"{last:g}"
    rows = []
    for name, contestant in result["contestants"].items():
        probe = result["probes"].get(name, {})
        steps = [run["step_seconds"]["mean"] for run in contestant["runs"]]
        memory = probe.get("memory")
        compilation = probe.get("compile_seconds", contestant["compile_seconds"])
        rows.append(
            [
                label(contestant["settings"]),
                reached(result, name, last),
                number(1e3 * np.median(steps)) if steps else "-",
                number(compilation),
                number(contestant["state_bytes"] / MIB),
                number(memory["of_training"] / MIB) if memory else "-",
            ]
        )
    rows += [[f"{k}: {why}", *["-"] * 5] for k, why in result["skipped"].items()]
    header = [
        f"{result['workload']['title']}, {result['workload']['metric']}",
        f"to {goal}: seconds, steps",
        "ms/step",
        "compile, s",
        "state, MiB",
        "peak, MiB",
    ]
    return markdown(header, rows)


def threshold_table(result: Result) -> str:
    """Returns when each contestant reached each loss."""
    contestants, work = result["contestants"], result["workload"]
    rows = [
        [f"{x:g}", *(reached(result, name, x) for name in contestants)]
        for x in work["thresholds"]
    ]
    labels = [label(contestant["settings"]) for contestant in contestants.values()]
    return markdown([work["metric"], *labels], rows)


def paired_table(result: Result) -> str:
    """Returns the ratios of step times of `cgfac` and Adam."""
    rows = [
        [
            f"batch {pair['batch_size']}, seed {pair['seed']}",
            number(pair["of_totals"]),
            number(pair["median"]),
            " to ".join(map(number, pair["quartiles"])),
            str(pair["pairs"]),
        ]
        for pair in result["paired"]
    ]
    header = ["step, `cgfac()` / Adam", "of totals", "median", "quartiles", "pairs"]
    return markdown(header, rows)


def pivot(
    title: str, cells: Mapping[tuple[str, int], str], order: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of cells by name and size; a dash for missing ones."""
    sizes = sorted({size for _, size in cells})
    present = {name for name, _ in cells}
    rows = [
        [name, *(cells.get((name, size), "-") for size in sizes)]
        for name in order
        if name in present
    ]
    return [title, *map(str, sizes)], rows


def width_table(result: Result) -> str:
    """Returns step time and peak memory of one layer, by method and width."""
    cells = {}
    for row in result["rows"]:
        cell = "failed"
        if "failed" not in row:
            milliseconds = number(1e3 * row["step_seconds"]["mean"])
            memory = number(row["memory"]["of_training"] / MIB)
            cell = f"{milliseconds} ms, {memory} MiB"
        cells[row["method"], row["width"]] = cell
    methods = list(dict.fromkeys(method for method, _ in cells))
    header, rows = pivot("one dense layer, batch 256", cells, methods)
    for row in rows:
        power = result["exponents"].get(row[0])
        row.append("-" if power is None else f"{power:.2f}")
        row[0] = METHODS[row[0]].label
    return markdown([*header, "exponent"], rows)


def robustness_table(result: Result) -> str:
    """Returns the last loss of each training, and its verdict unless it falls."""
    cells = {}
    for row in result["rows"]:
        last = "" if row["last"] is None else number(row["last"])
        word = "" if row["verdict"] == "falls" else row["verdict"]
        cells[row["workload"], row["batch_size"]] = f"{last} {word}".strip()
    title = f"loss after {result['steps']:,} steps, batch"
    return markdown(*pivot(title, cells, list(WORKLOADS)))


def tuning_table(tuned: Result) -> str:
    """Returns the best configuration of every rival and its time or loss."""
    names = [name for name in WORKLOADS if name in tuned]
    methods = [m for m in RIVALS if any(m in tuned[n]["methods"] for n in names)]
    rows = [
        [METHODS[m].label, *(best_found(tuned[n]["methods"].get(m)) for n in names)]
        for m in methods
    ]
    return markdown(["best of its grid, seed 0", *names], rows)


def best_found(found: Mapping[str, Any] | None) -> str:
    """Returns one cell of `tuning_table`."""
    if found is None:
        return "-"
    if found.get("best") is None:
        return found["skipped"].split(":")[0]
    rows = [row for row in found["grid"] if "failed" not in row]
    value = found["best"].get("learning_rate", found["best"].get("initial_damping"))
    text = f"{value:g}, batch {found['best']['batch_size']}: "
    times = [r["seconds_to_threshold"] for r in rows if r["seconds_to_threshold"]]
    if times:
        return text + f"{number(min(times))} s"
    if any(row["stopped"] == "epochs" for row in rows):
        return text + f"loss {number(found['loss'])}"
    row = next(row for row in rows if found["best"].items() <= row.items())
    text += f"{number(found['loss'])} in {row['seconds']:.0f} s"
    return text + (", diverged" if row["stopped"] == "diverged" else "")


def environment_line(results: Results) -> str:
    """Returns the environment of the first result and the number of seeds."""
    facts = next(results[name]["environment"] for name in MEASURED if name in results)
    counts = {
        results[name]["settings"]["seeds"] for name in WORKLOADS if name in results
    }
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)} if counts else {1})))
    packages = ("jax", "flax", "optax", "kfac-jax")
    versions = ", ".join(f"{name} {facts[name]}" for name in packages)
    return (
        f"{facts['cores']} cores ({facts['cpu']}), Python {facts['python']}, "
        f"{versions}; medians over {seeds} seeds, the least and the greatest in "
        "brackets."
    )


def section(results: Results) -> str:
    """Returns the README's section."""
    measured = [name for name in MEASURED if name in results]
    if not measured:
        raise ValueError("There are no results: run `benchmarks/run.py all` first.")
    if smoke := [name for name in measured if results[name].get("smoke")]:
        raise ValueError(f"Smoke runs are no results: {', '.join(smoke)}.")
    parts = [environment_line(results)]
    races = [name for name in WORKLOADS if name in results]
    if untuned := [name for name in races if not results[name]["tuned"]]:
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
    parts.append("What the project wants to reach, and has or has not:")
    parts.append(target_table(results))
    open_ones = [target.what for target in TARGETS if target.row(results) is None]
    parts += [f"Not measured yet: {'; '.join(open_ones)}."] if open_ones else []
    return "\n\n".join(parts)


def replace_section(text: str, new: str) -> str:
    """Returns a README with the section between the markers replaced."""
    match text.split(START):
        case [before, rest] if rest.count(END) == text.count(END) == 1:
            return f"{before}{START}\n\n{new}\n\n{END}{rest.split(END)[1]}"
    raise ValueError(f"The README needs one line {START!r}, and later one {END!r}.")


def details(results: Results) -> str:
    """Returns all tables and environments; docs/conf.py makes a page of them."""
    parts = ["# Targets", target_table(results)]
    if any(result.get("smoke") for result in results.values()):
        parts.insert(0, "A SMOKE RUN: tiny models, batches and data; no figure counts.")
    for name in (name for name in WORKLOADS if name in results):
        result = results[name]
        parts += [f"# {result['workload']['title']}", race_table(result)]
        if result["workload"]["thresholds"]:
            parts.append(threshold_table(result))
        parts.append(paired_table(result))
    for name, title, table in (
        ("widths", "Widths", width_table),
        ("robustness", "Every default", robustness_table),
        ("tuned", "Tuning", tuning_table),
    ):
        if name in results:
            parts += [f"# {title}", table(results[name])]
    for name, result in results.items():
        if "environment" in result:
            facts = [f"{key} {value}" for key, value in result["environment"].items()]
            parts.append(f"{name}: {', '.join(facts)}")
    return "\n\n".join(parts)


def is_current(folder: pathlib.Path, readme: pathlib.Path) -> bool:
    """Returns whether the README's section is what the results give."""
    text = readme.read_text()
    return replace_section(text, section(load(folder))) == text


def report(folder: pathlib.Path, readme: pathlib.Path | None = None) -> None:
    """Prints all tables, draws the plots and rewrites a README's section."""
    results = load(folder)
    text = details(results)
    print(text)
    (folder / "report.md").write_text(text + "\n")
    for name in (name for name in WORKLOADS if name in results):
        draw_race(folder / f"{name}.png", results[name])
    if "widths" in results:
        draw_widths(folder / "widths.png", results["widths"])
    if readme is not None:
        readme.write_text(replace_section(readme.read_text(), section(results)))
        print(f"\nwritten to {readme}")
