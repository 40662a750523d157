"""The benchmarks' one entry point: measures, writes JSON, and reports.

    python benchmarks/run.py all --seeds 3              # hours
    python benchmarks/run.py tune curves                # some parts alone
    python benchmarks/run.py all --smoke                # minutes, only that it works
    python benchmarks/run.py report

Every part writes a file of its own and reads the best configurations of `tune`, so
that parts can be run again one by one.
"""

import argparse
import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import contestants
import jax
import probe
import report
import robustness
import workloads
from contestants import UNTUNED, Contestant
from curves import environment, others_seconds
from race import Rules, paired_step_times, race
from tune import RIVALS, tune
from widths import WIDTHS
from widths import benchmark as benchmark_widths
from workloads import Workload

HERE = pathlib.Path(__file__).parent
RESULTS, SMOKE_RESULTS = HERE / "results", HERE / "smoke_results"
RACES = {
    "curves": ("curves",),
    "mnist_autoencoder": ("mnist_autoencoder",),
    "classifiers": ("mnist_mlp", "mnist_cnn"),
    "transformer": ("transformer",),
}
PARTS = ("tune", *RACES, "robustness", "widths", "report")
# Timed pairs of steps for each seed: one renewal of eigenpairs at small batches, eight
# at large ones.
PAIRS = 64


def describe_environment() -> dict[str, Any]:
    """`curves.environment` and the versions of the rivals."""
    facts = environment()
    for package in ("kfac-jax", "precondition-opt"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def with_environment(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Adds to a measurement where it was made and how busy the machine was."""
    facts, others, start = describe_environment(), others_seconds(), time.perf_counter()
    result = measure()
    seconds = time.perf_counter() - start
    busy = max(others_seconds() - others, 0) / seconds
    facts["others used"] = f"{busy:.2f} cores meanwhile"
    facts["took"] = f"{seconds:.0f} s"
    return {"environment": facts, **result}


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes JSON, which has no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"written to {path}")


def configurations(
    workload: Workload, tuned: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns who takes part, each with its method, batch size and options."""
    cases = {"cgfac": {"method": "cgfac", "batch_size": workload.batch_size}}
    for size in workload.other_batch_sizes:
        cases[f"cgfac@{size}"] = {"method": "cgfac", "batch_size": size}
    methods = tuned.get(workload.name, {}).get("methods", {})
    for method in RIVALS:
        best = methods.get(method, {}).get("best")
        size = {"batch_size": workload.batch_size}
        cases[method] = {"method": method, **(best or {**size, **UNTUNED[method]})}
    return cases


def build_all(
    workload: Workload, cases: dict[str, dict[str, Any]], skip: dict[str, str]
) -> dict[str, Contestant]:
    """Compiles those that can run; the others' reasons go to ``skip``."""
    built = {}
    for name, case in cases.items():
        why = contestants.missing(case["method"])
        if why is None:
            print(f"compiling {name} ...", flush=True)
            try:
                built[name] = contestants.build(workload=workload, **case)
            except Exception as error:  # a rival that cannot run here is a result
                if case["method"] == "cgfac":
                    raise
                why = f"{type(error).__name__}: {error}"[:300]
        if why is not None:
            skip[name] = why
            print(f"without {name}: {why}")
    return built


def benchmark(
    workload: Workload,
    *,
    tuned: dict[str, Any],
    seeds: int,
    budget: float,
    smoke: bool = False,
    only: tuple[str, ...] | None = None,
    pairs: int = PAIRS,
    probes: bool = True,
) -> dict[str, Any]:
    """Races all contestants on a workload, from several seeds.

    Args:
      workload: What they train on.
      tuned: The content of ``tuned.json``.
      seeds: How many, from 0.
      budget: Seconds on each contestant's clock in one race.
      smoke: Whether the workload is the small one.
      only: The names of the contestants; None for all.
      pairs: Timed pairs of steps of `cgfac` and Adam for each seed.
      probes: Whether to measure memory and compilation in processes of their own.

    Returns:
      What was measured, which `json` can write.
    """
    everyone = configurations(workload, tuned)
    cases = {k: v for k, v in everyone.items() if only is None or k in only}
    skipped: dict[str, str] = {}
    built = build_all(workload, cases, skipped)
    if (
        workload.name == "curves" and "cgfac" in built
    ):  # its loss at step 100 is reported
        built["cgfac"] = built["cgfac"]._replace(min_steps=10 if smoke else 100)
    reference_steps = (workload.epochs or 0) * (
        workload.num_examples // workload.batch_size
    )
    rules = Rules(
        budget,
        workload.thresholds,
        reference="adam" if workload.epochs and "adam" in built else None,
        reference_steps=reference_steps,
    )
    evaluate = workload.evaluator()
    runs: dict[str, list[Any]] = {name: [] for name in built}
    paired = []
    sizes = {c.batch_size for c in built.values() if c.method == "cgfac"}
    opponents = {
        size: contestants.build(
            "adam",
            workload,
            batch_size=size,
            learning_rate=everyone["adam"]["learning_rate"],
        )
        for size in sorted({workload.batch_size, *sizes})
    }
    for seed in range(seeds):
        results = race(
            workload,
            built,
            rules,
            seed=seed,
            evaluate=evaluate,
            description=f"{workload.name}, seed {seed}",
        )
        for name, result in results.items():
            runs[name].append({"seed": seed, **result})
        for contestant in built.values():
            if contestant.method == "cgfac":
                other = opponents[contestant.batch_size]
                paired.append(
                    paired_step_times(
                        workload, contestant, other, pairs=pairs, seed=seed
                    )
                )
    return {
        "benchmark": workload.name,
        "smoke": smoke,
        "workload": {
            "title": workload.title,
            "metric": workload.metric,
            "batch_size": workload.batch_size,
            "num_examples": workload.num_examples,
            "num_params": sum(x.size for x in jax.tree.leaves(workload.init(0))),
            "thresholds": list(workload.thresholds),
            "epochs": workload.epochs,
        },
        "settings": {"seeds": seeds, "budget": budget, "pairs": pairs},
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
        "probes": probe_all(workload, built, opponents, smoke) if probes else {},
    }


def probe_all(
    workload: Workload,
    built: dict[str, Contestant],
    opponents: dict[int, Contestant],
    smoke: bool,
) -> dict[str, Any]:
    """Measures each contestant, and Adam at `cgfac`'s batch sizes, in its process."""
    everyone = {**built, **{f"adam@{n}": c for n, c in opponents.items()}}
    return {
        name: probe.run(
            workload.name,
            contestant.method,
            batch_size=contestant.batch_size,
            options=contestant.options,
            smoke=smoke,
        )
        for name, contestant in everyone.items()
    }


def run_tune(
    names: list[str],
    methods: tuple[str, ...],
    out: pathlib.Path,
    budget: float,
    smoke: bool,
    **options: Any,
) -> None:
    """Tunes rivals on workloads; keeps what the file has of the others."""
    path = out / "tuned.json"
    # One at a time: what was found is written before the next one starts.
    for name, method in itertools.product(names, methods):
        tuned = read(path)
        workload = workloads.get(name, smoke)
        known = tuned.get(name, {})
        tuned[name] = with_environment(
            lambda workload=workload, method=method, known=known: tune(
                workload,
                budget=budget,
                smoke=smoke,
                methods=(method,),
                known=known,
                **options,
            )
        )
        before, found = known.get("methods", {}), tuned[name]["methods"][method]
        # Methods are tuned at different times, some of them in parts.
        adds = any(values is not None for values in options.values())
        earlier = before.get(method, {}).get("environments", []) if adds else []
        found["environments"] = [*earlier, tuned[name]["environment"]]
        tuned[name]["methods"] = {**before, method: found}
        write(path, tuned)


def run_robustness(
    names: list[str], out: pathlib.Path, smoke: bool, sizes: list[int] | None = None
) -> None:
    """Trains on workloads at many batch sizes; keeps what the file has of others."""
    path = out / "robustness.json"
    for name in names:
        known = read(path)
        result = with_environment(
            lambda name=name: robustness.benchmark(
                (name,), sizes or robustness.BATCH_SIZES, smoke=smoke
            )
        )
        for row in result["rows"]:
            row["date"] = result["environment"]["date"]
        run = {(row["workload"], row["batch_size"]) for row in result["rows"]}
        others = [
            row
            for row in known.get("rows", [])
            if (row["workload"], row["batch_size"]) not in run
        ]
        result["rows"] = others + result["rows"]
        write(path, result)


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a JSON file, empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: list[str] | None = None) -> None:
    """Runs the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description="cgfac() against kfac-jax, Adam, SGD, Muon and Shampoo",
    )
    parser.add_argument(
        "parts",
        nargs="+",
        choices=("all", *PARTS),
        metavar="PART",
        help=f"all, or some of: {', '.join(PARTS)}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of every race (3)")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds on a contestant's clock in one race (100; smoke: 1)",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, to see it work")
    parser.add_argument(
        "--only",
        nargs="+",
        help="tune: these workloads, rivals; robustness: these workloads; races: "
        "these contestants",
    )
    parser.add_argument(
        "--values",
        type=float,
        nargs="+",
        help="tune: only these learning rates or dampings, beside what is known",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="tune, robustness: only these batch sizes, beside what is known",
    )
    parser.add_argument("--widths", type=int, nargs="+", help=f"{WIDTHS}")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="a folder (benchmarks/results, or benchmarks/smoke_results)",
    )
    parser.add_argument(
        "--readme", type=pathlib.Path, help="rewrite its section of performance"
    )
    args = parser.parse_args(argv)
    parts = PARTS if "all" in args.parts else args.parts
    out = args.out or (SMOKE_RESULTS if args.smoke else RESULTS)
    budget = args.budget or (1.0 if args.smoke else 100.0)
    if "tune" in parts:
        wanted = [n for n in args.only or () if n in workloads.WORKLOADS]
        methods = tuple(m for m in RIVALS if not args.only or m in args.only)
        names = wanted or list(workloads.WORKLOADS)
        run_tune(
            names,
            methods or RIVALS,
            out,
            budget,
            args.smoke,
            values=args.values,
            sizes=args.sizes,
        )
    for name in (name for part in RACES if part in parts for name in RACES[part]):
        workload = workloads.get(name, args.smoke)
        result = with_environment(
            lambda workload=workload: benchmark(
                workload,
                tuned=read(out / "tuned.json"),
                seeds=args.seeds,
                budget=budget,
                smoke=args.smoke,
                only=tuple(args.only) if args.only else None,
                pairs=5 if args.smoke else PAIRS,
            )
        )
        write(out / f"{name}.json", result)
    if "robustness" in parts:
        names = [n for n in args.only or () if n in workloads.WORKLOADS]
        run_robustness(names or list(workloads.WORKLOADS), out, args.smoke, args.sizes)
    if "widths" in parts:
        chosen = args.widths or ((64, 128) if args.smoke else WIDTHS)
        result = with_environment(lambda: benchmark_widths(chosen, smoke=args.smoke))
        write(out / "widths.json", {"smoke": args.smoke, **result})
    if "report" in parts:
        report.report(out, args.readme)


if __name__ == "__main__":
    main()
