#!/usr/bin/env python3
"""Mutation tests: small changes of a module, and whether any test notices them.

Every process works in its own copy of the tree. It changes one line there and runs the
tests of that module until the first one fails. The order is random but always the same,
so that what a limit leaves undone is a fair sample. Needs cosmic-ray:

  make mutants JOBS=14 ARGS="--seconds 500"
  make mutants ARGS="--again mutants.json"   only what was not caught
"""

import argparse
import compileall
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import platform
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# The tests that may notice a change of a module: those that notice most come first, and
# cheap ones before expensive ones. Patterns; what does not exist is left out.
BLOCKS = "tests/exactness/test_fisher_blocks.py"
CGFAC = "tests/contract/test_cgfac.py"
CERTIFIED = "tests/*/test_certified.py"
PROPERTIES = "tests/properties/test_solves.py"
TESTS = {
    "_cg": (
        "optax_cgfac/_cg.py",
        "tests/unit/test_cg.py",
        CERTIFIED,
        "tests/exactness/test_iterates.py",
        "tests/unit/test_sample_space.py",
        "tests/unit/test_factored.py",
        "tests/exactness/test_dense_solves.py",
        PROPERTIES,
    ),
    "_operators": (
        "optax_cgfac/_operators.py",
        "tests/unit/test_operators.py",
        "tests/exactness/test_algorithm2.py",
        "tests/unit/test_kfac.py",
        "tests/unit/test_factored.py",
        "tests/unit/test_curvature.py::test_the_damped_operator_is_larger_by_its_damping",
        "tests/unit/test_solve.py",
        "tests/exactness/test_dense_solves.py",
        PROPERTIES,
        f"{BLOCKS}::test_sample_space_has_the_iterates_of_parameter_space",
    ),
    "_sample_space": (
        "optax_cgfac/_sample_space.py",
        "tests/unit/test_sample_space.py",
        "tests/exactness/test_iterates.py",
        CERTIFIED,
        "tests/exactness/test_dense_solves.py",
        "tests/unit/test_solve.py",
        f"{BLOCKS}::test_sample_space_has_the_iterates_of_parameter_space",
        PROPERTIES,
        f"{BLOCKS}::test_the_update_is_the_dense_solution",
    ),
    "_damping": (
        "optax_cgfac/_damping.py",
        "tests/unit/test_damping.py",
        f"{CGFAC}::test_the_kl_clip_bounds_the_step",
        f"{CGFAC}::test_the_reduction_ratio_is_actual_over_predicted",
        f"{CGFAC}::test_the_damping_changes_at_the_interval_only_and_stays_in_its_bounds",
        f"{CGFAC}::test_a_loss_that_explodes_raises_the_damping",
        "tests/contract/test_trouble.py::test_a_bad_gradient_does_not_lower_the_damping",
        "tests/properties/test_damping.py",
    ),
}

# Survivors that are known, and why no test can notice them:
# - `reason == CONVERGED` to `<=`: only UNSOLVED is less, which no solve ends with.
# - `rr <= noise` to `<` in `cg_loop`: they differ where a residual is its rounding
#   error to the last bit, and a residual of zero has counted as converged before.
# - The step size 0 where none is usable, in `cg_loop`: what comes of it is not taken.
# - `_ROUNDING` 8 to 9: the size of rounding errors is not known better than that.
# - The 1 of `kl_clip_scale` where there is nothing to clip to 2: at most 1 is returned.
# - `shape[-1]` to `shape[-2]` in `to_dense`: of square matrices.
# - The 1 in `1 / where(positive, entries, 1)` and `clip / where(size > 0, size, 1)`
#   to another number: it reaches no value, no derivative.
# - `curvature + noise > 0` to `-` in `cg_loop`: another name for a refusal where the
#   curvature is within its rounding error.

# One example that fails is enough; the smallest one takes minutes to find.
NO_SHRINKING = """\
try:
    from hypothesis import Phase, settings
except ImportError:
    pass
else:
    options = {"derandomize": True, "deadline": None, "database": None}
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", phases=phases, **options)
    settings.load_profile("mutants")
"""

# What a mutant may do before it counts as one that never ends.
STALL = 60.0  # seconds without a test that ends
LONGEST = 300.0  # seconds in all


class Run(NamedTuple):
    """How pytest ended: ``failed`` names tests, "passed" means that none did."""

    outcome: str  # "passed", "failed", "timeout", or "stopped" at the limit of time
    failed: list[str]
    seconds: float
    tail: str


class Baseline(NamedTuple):
    """The tests that pass without a change."""

    tests: dict[str, tuple[str, ...]]
    deselect: list[str]


def run_pytest(tree: Path, tests: list[str], options: list[str], until: float) -> Run:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "--no-header"]
    command += ["-p", "no:cacheprovider", "-p", "no_shrinking", *options, *tests]
    log = tree.with_suffix(".log")
    started = last = time.monotonic()
    size, outcome = 0, None
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": python_path(tree)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and outcome is None:
                time.sleep(0.1)
                now, new_size = time.monotonic(), log.stat().st_size
                if new_size != size:
                    size, last = new_size, now
                if now > until:
                    outcome = "stopped"
                elif now - last > STALL or now - started > LONGEST:
                    outcome = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    if outcome is None:
        outcome = "failed" if process.returncode else "passed"
        if process.returncode and not failed:
            failed = [f"pytest's exit status {process.returncode}"]
    return Run(outcome, failed, time.monotonic() - started, text[-2000:])


def python_path(tree: Path) -> str:
    inherited = os.environ.get("PYTHONPATH")
    return str(tree) + (os.pathsep + inherited if inherited else "")


def set_environment(scratch: Path) -> None:
    """What every run of the tests shares: one cache, one thread, no surprises."""
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        JAX_COMPILATION_CACHE_DIR=str(scratch / "jax"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        MKL_NUM_THREADS="1",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        PYTHONDONTWRITEBYTECODE="1",  # a cached file may be older than a change
        PYTHONUNBUFFERED="1",
    )


def make_trees(scratch: Path, num: int) -> list[Path]:
    """Copies of what the tests need, with compiled modules in them."""
    trees = [scratch / f"tree-{i}" for i in range(num)]
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("optax_cgfac", "tests"):
        shutil.copytree(ROOT / part, trees[0] / part, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", trees[0])
    (trees[0] / "no_shrinking.py").write_text(NO_SHRINKING)
    compileall.compile_dir(trees[0] / "optax_cgfac", quiet=2)
    for tree in trees[1:]:
        shutil.copytree(trees[0], tree)
    command = [sys.executable, "-c", "import optax_cgfac; print(optax_cgfac.__file__)"]
    environment = os.environ | {"PYTHONPATH": python_path(trees[0])}
    found = subprocess.check_output(command, cwd=scratch, env=environment, text=True)
    if not Path(found.strip()).is_relative_to(trees[0]):
        sys.exit(f"The copy is not what is imported, but {found.strip()}.")
    return trees


def existing(pattern: str) -> list[str]:
    path, _, test = pattern.partition("::")
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(path))
    return [f"{file}::{test}" if test else file for file in files]


def measure_baseline(modules, pool, in_a_tree, until) -> Baseline:
    """Runs the tests on the unchanged tree: what fails there can notice nothing."""
    tests = {
        module: tuple(file for pattern in TESTS[module] for file in existing(pattern))
        for module in modules
    }
    files = list(dict.fromkeys(file for chosen in tests.values() for file in chosen))
    runs = pool.map(
        lambda file: in_a_tree(lambda tree: run_pytest(tree, [file], [], until)), files
    )
    unusable, deselect = set(), []
    for file, run in zip(files, runs, strict=True):
        print(f"  {run.seconds:6.1f} s  {run.outcome:8} {file}", flush=True)
        if run.outcome != "passed":
            by_name = [name for name in run.failed if "::" in name]
            deselect += by_name
            if run.outcome != "failed" or len(by_name) < len(run.failed):
                unusable.add(file)
                print(run.tail, file=sys.stderr)
    if deselect:
        print("Left out, as they fail without a change:", *deselect, sep="\n  ")
    tests = {
        module: tuple(file for file in chosen if file not in unusable)
        for module, chosen in tests.items()
    }
    for module, chosen in tests.items():
        if not chosen:
            sys.exit(f"No test of {module} passes without a change.")
    return Baseline(tests, deselect)


def find_mutants(modules, options) -> tuple[list, list[dict]]:
    """The mutants to try, and what an earlier run has to say of the others."""
    from mutations import mutants_of  # needs cosmic-ray

    mutants = []
    for module in modules:
        file = f"optax_cgfac/{module}.py"
        mutants += mutants_of(file, (ROOT / file).read_text())
    random.Random(options.seed).shuffle(mutants)
    known = []
    if options.again:
        earlier = json.loads(options.again.read_text())["mutants"]
        # Lines move: what is equal in several places counts where all were caught.
        caught = {(m["file"], m["diff"]): m for m in earlier}
        for m in earlier:
            if m["status"] not in ("killed", "timeout"):
                caught.pop((m["file"], m["diff"]), None)
        known = [caught.get((m.file, m.diff)) for m in mutants]
        pairs = zip(mutants, known, strict=True)
        mutants = [mutant for mutant, entry in pairs if entry is None]
        known = [entry for entry in known if entry is not None]
    return mutants[: options.sample], known


def try_mutant(mutant, tree: Path, baseline: Baseline, until: float) -> Run:
    path = tree / mutant.file
    original = path.read_bytes()
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    path.write_text(mutant.source)
    try:
        options = ["-x", *(f"--deselect={name}" for name in baseline.deselect)]
        return run_pytest(tree, baseline.tests[path.stem], options, until)
    finally:
        path.write_bytes(original)


STATUS = {
    "passed": "survived",
    "failed": "killed",
    "timeout": "timeout",
    "stopped": "not run",
}


def record(mutant, run: Run | None) -> dict:
    """One mutant as the file of results shows it."""
    return {
        "file": mutant.file,
        "line": mutant.line,
        "operator": mutant.operator,
        "diff": mutant.diff,
        "status": STATUS[run.outcome if run else "stopped"],
        "killed_by": run.failed[0] if run and run.failed else None,
        "seconds": round(run.seconds, 1) if run else 0.0,
    }


def totals_of(records) -> dict[str, dict[str, int]]:
    totals = {}
    for entry in records:
        counts = totals.setdefault(entry["file"], dict.fromkeys(STATUS.values(), 0))
        counts[entry["status"]] += 1
    return totals


def print_summary(records) -> None:
    totals = totals_of(records)
    counts = {
        status: sum(c[status] for c in totals.values()) for status in STATUS.values()
    }
    print(f"\n{'':32}" + "".join(f"{name:>10}" for name in (*counts, "caught")))
    for name, row in (*sorted(totals.items()), ("all", counts)):
        caught = row["killed"] + row["timeout"]
        num_run = caught + row["survived"]
        share = f"{100 * caught / num_run:9.1f}%" if num_run else f"{'-':>10}"
        print(f"{name:32}" + "".join(f"{n:10}" for n in row.values()) + share)
    survivors = [entry for entry in records if entry["status"] == "survived"]
    for entry in survivors:
        print(f"\n{entry['file']}:{entry['line']} survived ({entry['operator']})")
        print(entry["diff"])
    if left := counts["not run"]:
        print(f"\nNOT RUN, as the limit of time came first: {left} mutants.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    parser.add_argument("--sample", type=int, help="try only so many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of their order")
    parser.add_argument(
        "--again", type=Path, help="an earlier run: try only what it did not catch"
    )
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    options = parser.parse_args()
    started = time.monotonic()
    until = started + (options.seconds or float("inf"))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        set_environment(scratch)
        mutants, records = find_mutants(options.modules, options)
        free_trees = queue.SimpleQueue()
        for tree in make_trees(scratch, options.jobs):
            free_trees.put(tree)

        def in_a_tree(task):
            tree = free_trees.get()
            try:
                return task(tree)
            finally:
                free_trees.put(tree)

        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(options.jobs))
        print(f"{len(mutants)} mutants. Without a change:", flush=True)
        baseline = measure_baseline(options.modules, pool, in_a_tree, until)

        def try_one(mutant):
            if time.monotonic() > until:
                return None
            return in_a_tree(lambda tree: try_mutant(mutant, tree, baseline, until))

        runs = zip(mutants, pool.map(try_one, mutants), strict=True)
        for count, (mutant, run) in enumerate(runs, 1):
            records.append(record(mutant, run))
            if count % 20 == 0:
                elapsed = time.monotonic() - started
                print(f"{count} of {len(mutants)}, {elapsed:.0f} s", flush=True)
    records.sort(key=lambda entry: (entry["file"], entry["line"], entry["operator"]))
    result = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "cosmic-ray")},
        "seconds": round(time.monotonic() - started, 1),
        "jobs": options.jobs,
        "seed": options.seed,
        "tests": baseline.tests,
        "left_out": baseline.deselect,
        "totals": totals_of(records),
        "mutants": records,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_summary(records)
    print(f"\n{options.out} holds every mutant; {result['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
