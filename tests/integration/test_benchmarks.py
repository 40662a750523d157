"""The benchmark suite runs on a tiny workload and reports what it measured."""

import json
import math
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    """Lets the benchmarks' modules be imported by their bare names, as they do."""
    for package in ("matplotlib", "mlxtend", "scipy", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_race_of_two_is_measured_and_reported(suite, tmp_path, capsys):
    import report
    import run
    import workloads
    from curves import Autoencoder

    # Two layers, to compile in less time.
    workload = workloads.get("curves", smoke=True)._replace(model=Autoencoder((16,)))
    result = run.benchmark(
        workload,
        tuned={},
        seeds=2,
        budget=0.3,
        smoke=True,
        only=("cgfac", "adam"),
        pairs=2,
        probes=False,
    )
    assert set(result["contestants"]) == {"cgfac", "adam"}
    for contestant in result["contestants"].values():
        for trained in contestant["runs"]:
            history = trained["history"]
            assert history[0][:2] == [0, 0.0]
            assert trained["best"] < history[0][2]
            assert trained["stopped"] in {"reached", "budget"}
    ours, adam = (result["contestants"][name] for name in ("cgfac", "adam"))
    for seed in range(2):  # equal starts, and another for every seed
        starts = [runs["runs"][seed]["history"][0][2] for runs in (ours, adam)]
        assert starts[0] == starts[1]
    assert ours["runs"][0]["history"][0] != ours["runs"][1]["history"][0]
    assert [pair["pairs"] for pair in result["paired"]] == [2, 2]

    measured = {"environment": run.describe_environment(), **result}
    run.write(tmp_path / "curves.json", measured)
    assert report.report(tmp_path)
    printed = capsys.readouterr().out
    assert "CURVES, batch 1000: step / Adam's step | ≤ 1.5" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(ValueError, match="Smoke runs are no results: curves"):
        report.section(report.load(tmp_path))
    measured["smoke"] = False
    (tmp_path / "curves.json").write_text(json.dumps(measured))
    readme = tmp_path / "README.md"
    readme.write_text("# No markers\n")
    with pytest.raises(ValueError, match="The README needs one line"):
        report.report(tmp_path, readme)
    readme.write_text(f"# Title\n\n{report.START}\n{report.END}\n\nThe end.\n")
    assert not report.report(tmp_path, readme, check=True)
    assert report.report(tmp_path, readme)
    assert report.report(tmp_path, readme, check=True)
    assert readme.read_text().endswith(f"{report.END}\n\nThe end.\n")


def test_the_section_of_the_readme_is_what_the_results_give(suite):
    import report

    assert report.report(report.RESULTS, ROOT / "README.md", check=True)


def test_kfac_jax_takes_the_steps_it_is_set_to(suite):
    pytest.importorskip("kfac_jax")
    import contestants
    import jax
    import workloads

    workload = workloads.get("curves", smoke=True)
    contestant = contestants.build("kfac_jax", workload, initial_damping=3.0)
    state = contestant.start(workload.init(0))
    assert state[1][0].damping == 3.0
    batches = workload.batches(contestant.batch_size, 0)
    losses = []
    for i in range(3):
        state, loss = contestant.step(state, next(batches), jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_times_to_thresholds_and_their_ratios(suite):
    import race
    import targets

    history = [[0, 0.0, 9.0], [1, 1.0, 5.0], [2, 2.5, None], [3, 4.0, 2.0]]
    crossing = race.first_crossing(history, 3.0)
    assert crossing == {"steps": 3, "seconds": 4.0, "after_seconds": 2.5}
    assert race.first_crossing(history, 1.0) is None

    def contestant(*seconds):
        runs = [{"history": [[0, 0.0, 9.0], [1, s, 1.0]], "best": 1.0} for s in seconds]
        return {"runs": runs}

    result = {
        "settings": {"budget": 10.0},
        "contestants": {"cgfac": contestant(2.0, 3.0), "adam": contestant(4.0, 3.0)},
    }
    assert targets.time_ratio(result, "adam", 1.0) == ((0.5, 1.0), False)
    assert targets.time_ratio(result, "adam", None) == ((0.5, 1.0), False)
    result["contestants"]["adam"]["runs"][0]["history"] = [[0, 0.0, 9.0]]
    assert targets.time_ratio(result, "adam", 1.0) == ((0.2, 1.0), True)
    result["contestants"]["cgfac"]["runs"][1]["history"] = [[0, 0.0, 9.0]]
    assert targets.time_ratio(result, "adam", 1.0) == ((0.2, math.inf), True)


def test_the_exponent_is_the_slope_of_the_largest_widths(suite):
    import widths

    sizes = np.array([1, 256, 512, 1024, 2048])
    seconds = np.where(sizes == 1, 1.0, 1e-9 * sizes**2.5)
    assert widths.exponent(sizes, seconds) == pytest.approx(2.5)
    assert math.isnan(widths.exponent([256], [1.0]))


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([10.0, 5.0, 3.0, 2.0, 1.0, 1.0], "falls"),
        # One bad batch is no verdict, and neither is less than a fiftieth of the way.
        ([10.0, 5.0, 3.0, 1.0, 1.0, 1.0, 9.0], "falls"),
        ([10.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.1], "falls"),
        ([10.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], "turned up"),
        ([10.0, 1.0, 1.0, 1.0, 11.0, 11.0, 11.0], "diverged"),
        ([10.0, 11.0, 12.0, 13.0], "diverged"),
        ([10.0, 1.0, None], "diverged"),
    ],
)
def test_a_training_that_rises_again_is_found(suite, losses, word):
    import robustness

    assert robustness.verdict(losses)["verdict"] == word


def test_robustness_is_measured_and_reported(suite):
    import report
    import robustness

    result = robustness.benchmark(("mnist_mlp",), (50,), smoke=True)
    (row,) = result["rows"]
    assert row["steps"] == 60
    assert row["losses"][-1] < row["losses"][0] / 2
    assert row["dampings"][0] > 0
    table = report.robustness_table(result)
    assert table.count("|") > 6
    row["verdict"] = "turned up"
    assert "turned up" in report.robustness_table(result)


def test_tuning_adds_to_what_is_known(suite):
    import tune
    import workloads
    from curves import Autoencoder

    workload = workloads.get("curves", smoke=True)._replace(model=Autoencoder((16,)))
    settings = tune.grid("adam", workload, values=[1e-3], sizes=[50])
    assert settings == [{"batch_size": 50, "learning_rate": 1e-3}]
    best = {"batch_size": 100, "learning_rate": 3e-3}
    row = {**best, "seconds_to_threshold": 1e-9, "loss": 200.0, "stopped": "reached"}
    old = {**settings[0], "seconds_to_threshold": None, "loss": 1.0, "stopped": "x"}
    found = tune.tune_method(
        "adam",
        workload,
        threshold=220.0,
        budget=60.0,
        evaluate=workload.evaluator(),
        settings=settings,
        known={"best": best, "loss": 200.0, "grid": [row, old]},
    )
    # Tried again, for no longer than the best took, which stays the best.
    assert (found["best"], found["grid"][0]) == (best, row)
    (again,) = found["grid"][1:]
    assert (again["batch_size"], again["steps"], again["stopped"]) == (50, 1, "budget")


def test_every_tuning_keeps_where_it_was_made(suite, tmp_path, monkeypatch):
    import run

    def tune(workload, *, methods, **options):
        del workload, options
        return {"threshold": 60.0, "methods": {m: {"best": {}} for m in methods}}

    monkeypatch.setattr(run, "tune", tune)
    options = {"out": tmp_path, "budget": 1.0, "smoke": True}
    run.run_tune(["curves"], ("adam", "sgd"), **options)
    run.run_tune(["curves"], ("sgd",), **options, values=[1e-3], sizes=None)
    methods = run.read(tmp_path / "tuned.json")["curves"]["methods"]
    counts = {name: len(found["environments"]) for name, found in methods.items()}
    assert counts == {"adam": 1, "sgd": 2}
    assert methods["adam"]["environments"][0]["jax"]
    run.run_tune(["curves"], ("sgd",), **options)  # anew, nothing of before is kept
    methods = run.read(tmp_path / "tuned.json")["curves"]["methods"]
    assert len(methods["sgd"]["environments"]) == 1
