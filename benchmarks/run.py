"""The one command: measures, writes JSON, and reports.

Every part writes its own file, so parts can be repeated one by one. The races use the
best configurations that `tune` wrote. README.md has examples.
"""

import argparse
import itertools
import json
import pathlib
import sys
from typing import Any, NamedTuple

import contestants
import report
import sweeps
import workloads
from contestants import METHODS, Contestant
from measure import measure_apart, with_environment
from race import Rules, paired_step_times, race
from tune import RIVALS, grid, tune
from workloads import WORKLOADS, Workload

PARTS = ("tune", *WORKLOADS, "robustness", "widths", "report")
SMOKE_RESULTS = report.RESULTS.parent / "smoke_results"
# Timed pairs of steps for each seed: one renewal of eigenpairs at small batches, eight
# at large ones.
PAIRS = 64
# What the report needs of a workload.
DESCRIPTION = ("title", "metric", "batch_size", "num_examples", "thresholds", "epochs")


class Settings(NamedTuple):
    """How a race is run."""

    seeds: int
    budget: float  # seconds on a contestant's clock in one race
    pairs: int = PAIRS
    smoke: bool = False  # whether the workload is the small one
    only: tuple[str, ...] | None = None  # names of contestants; None for all
    probes: bool = True  # whether to measure memory and compilation


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a JSON file, empty if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"written to {path}")


def configurations(
    workload: Workload, tuned: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns every contestant's method, batch size and options by name."""
    own = {"batch_size": workload.batch_size}
    cases = {"cgfac": {"method": "cgfac", **own}}
    for size in workload.other_batch_sizes:
        cases[f"cgfac@{size}"] = {"method": "cgfac", "batch_size": size}
    methods = tuned.get(workload.name, {}).get("methods", {})
    for method in RIVALS:
        best = methods.get(method, {}).get("best")
        usual = {**own, **METHODS[method].options}
        cases[method] = {"method": method, **(best or usual)}
    return cases


def build_all(
    workload: Workload, cases: dict[str, dict[str, Any]], skipped: dict[str, str]
) -> dict[str, Contestant]:
    """Compiles all contestants that run here; adds the others' reasons to a dict."""
    built = {}
    for name, case in cases.items():
        print(f"compiling {name} ...", flush=True)
        try:
            built[name] = contestants.build(workload=workload, **case)
        except Exception as error:  # a rival that cannot run here is a result
            if case["method"] == "cgfac":
                raise
            skipped[name] = contestants.reason(error)
            print(f"without {name}: {skipped[name]}")
    if "cgfac" in built:
        built["cgfac"] = built["cgfac"]._replace(min_steps=workload.min_steps)
    return built


def benchmark(
    workload: Workload, tuned: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """Races all contestants on a workload, from several seeds."""
    everyone = configurations(workload, tuned)
    wanted = settings.only or everyone
    chosen = {name: case for name, case in everyone.items() if name in wanted}
    skipped: dict[str, str] = {}
    built = build_all(workload, chosen, skipped)
    ours = [c for c in built.values() if c.method == "cgfac"]
    rate = everyone["adam"]["learning_rate"]
    opponents = {
        size: contestants.build("adam", workload, batch_size=size, learning_rate=rate)
        for size in sorted({workload.batch_size, *(c.batch_size for c in ours)})
    }
    runs, paired = race_seeds(workload, built, opponents, settings)
    adams = {f"adam@{size}": adam for size, adam in opponents.items()}
    probes = {
        name: measure_apart(
            workload=workload.name,
            method=c.method,
            batch_size=c.batch_size,
            options=c.options,
            smoke=settings.smoke,
        )
        for name, c in {**built, **adams}.items()
        if settings.probes
    }
    return {
        "benchmark": workload.name,
        "smoke": settings.smoke,
        "workload": {key: getattr(workload, key) for key in DESCRIPTION},
        "settings": settings._asdict(),
        "tuned": workload.name in tuned,
        "skipped": skipped,
        "contestants": {
            name: {
                "settings": contestant.settings,
                "compile_seconds": contestant.compile_seconds,
                "state_bytes": contestant.state_bytes,
                "runs": runs[name],
            }
            for name, contestant in built.items()
        },
        "paired": paired,
        "probes": probes,
    }


def race_seeds(
    workload: Workload,
    built: dict[str, Contestant],
    opponents: dict[int, Contestant],
    settings: Settings,
) -> tuple[dict[str, list[Any]], list[Any]]:
    """Returns each contestant's runs and the paired step times, for every seed."""
    rules = Rules(
        settings.budget,
        workload.thresholds,
        reference="adam" if workload.epochs and "adam" in built else None,
        reference_steps=workload.num_steps(workload.batch_size),
    )
    evaluate = workload.evaluator()
    runs: dict[str, list[Any]] = {name: [] for name in built}
    paired = []
    for seed in range(settings.seeds):
        results = race(workload, built, rules, seed=seed, evaluate=evaluate)
        for name, result in results.items():
            runs[name].append({"seed": seed, **result})
        for ours in (c for c in built.values() if c.method == "cgfac"):
            adam = opponents[ours.batch_size]
            paired.append(
                paired_step_times(workload, ours, adam, pairs=settings.pairs, seed=seed)
            )
    return runs, paired


def run_tune(
    path: pathlib.Path, name: str, method: str, budget: float, smoke: bool
) -> None:
    """Tunes one rival on one workload and adds the result to the file."""
    everything = read(path)
    known = everything.get(name, {"methods": {}})
    workload = workloads.get(name, smoke)
    settings = grid(method, workload)[: 2 if smoke else None]
    threshold = workload.thresholds[-1] if workload.thresholds else None
    if threshold is None and method != "adam":
        threshold = known["threshold"]  # Adam's best: tune Adam first
    found = with_environment(
        tune, method, workload, settings, threshold=threshold, budget=budget
    )
    if threshold is None:
        threshold = found["loss"]
    methods = {**known["methods"], method: found}
    write(path, {**everything, name: {"threshold": threshold, "methods": methods}})


def run_robustness(
    path: pathlib.Path, name: str, sizes: list[int] | None, smoke: bool
) -> None:
    """Trains on one workload at many batch sizes and updates the file's rows."""
    result = with_environment(
        sweeps.robustness_sweep, name, sizes or sweeps.BATCH_SIZES, smoke=smoke
    )
    for row in result["rows"]:
        row["date"] = result["environment"]["date"]
    new = {(row["workload"], row["batch_size"]) for row in result["rows"]}
    others = [
        row
        for row in read(path).get("rows", [])
        if (row["workload"], row["batch_size"]) not in new
    ]
    write(path, {**result, "rows": others + result["rows"]})


def run_report(folder: pathlib.Path, readme: pathlib.Path | None, check: bool) -> None:
    """Reports, or checks the README's section and exits with 1 if it is outdated."""
    if not check:
        report.report(folder, readme)
    elif readme is None:
        sys.exit("--check needs --readme.")
    elif not report.is_current(folder, readme):
        sys.exit(f"{readme} differs from the results; run this without --check.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="cgfac() against kfac-jax, Adam, SGD, Muon and Shampoo"
    )
    add = parser.add_argument
    parts = ("all", *PARTS)
    add("parts", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    add("--seeds", type=int, default=3, help="of every race (3)")
    add("--budget", type=float, help="seconds of a contestant (100; smoke: 1)")
    add("--smoke", action="store_true", help="tiny workloads, to see that it works")
    add("--only", nargs="+", help="workloads and rivals, or contestants of a race")
    add("--sizes", type=int, nargs="+", help="robustness: these batch sizes")
    add("--widths", type=int, nargs="+", help=f"{sweeps.WIDTHS}")
    add("--out", type=pathlib.Path, help="the folder of the results")
    add("--readme", type=pathlib.Path, help="report: rewrite its performance section")
    add("--check", action="store_true", help="report: only compare that section")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the parts that the command line names."""
    args = parse(argv)
    smoke = args.smoke
    parts = PARTS if "all" in args.parts else args.parts
    out = args.out or (SMOKE_RESULTS if smoke else report.RESULTS)
    budget = args.budget or (1.0 if smoke else 100.0)
    only = tuple(args.only or ())
    names = [name for name in WORKLOADS if name in only] or list(WORKLOADS)
    rivals = [method for method in RIVALS if method in only] or RIVALS
    if "tune" in parts:
        for name, method in itertools.product(names, rivals):
            run_tune(out / "tuned.json", name, method, budget, smoke)
    pairs = 5 if smoke else PAIRS
    settings = Settings(args.seeds, budget, pairs, smoke, only or None)
    for name in (name for name in WORKLOADS if name in parts):
        workload, tuned = workloads.get(name, smoke), read(out / "tuned.json")
        result = with_environment(benchmark, workload, tuned, settings)
        write(out / f"{name}.json", result)
    if "robustness" in parts:
        for name in names:
            run_robustness(out / "robustness.json", name, args.sizes, smoke)
    if "widths" in parts:
        widths = args.widths or ((64, 128) if smoke else sweeps.WIDTHS)
        result = with_environment(sweeps.width_sweep, widths, smoke=smoke)
        write(out / "widths.json", result)
    if "report" in parts:
        run_report(out, args.readme, args.check)


if __name__ == "__main__":
    main()
