"""The benchmarks run on tiny workloads and report their measurements."""

import json
import math
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    """Makes the benchmarks' modules importable by their bare names."""
    for package in ("matplotlib", "mlxtend", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def tiny(suite):
    """The CURVES workload with two layers, which compile fast."""
    import workloads
    from networks import Autoencoder

    return workloads.get("curves", smoke=True)._replace(model=Autoencoder((16,)))


def test_a_race_is_measured_and_reported(tiny, tmp_path, capsys):
    import measure
    import report
    import run

    settings = run.Settings(
        seeds=2, budget=0.3, pairs=2, smoke=True, only=("cgfac", "adam"), probes=False
    )
    result = run.benchmark(tiny, {}, settings)
    assert set(result["contestants"]) == {"cgfac", "adam"}
    for contestant in result["contestants"].values():
        for trained in contestant["runs"]:
            assert trained["history"][0][:2] == [0, 0.0]
            assert trained["best"] < trained["history"][0][2]
            assert trained["stopped"] in {"reached", "budget"}
    # Contestants start from equal parameters, seeds from different ones.
    starts = [
        [trained["history"][0][2] for trained in contestant["runs"]]
        for contestant in result["contestants"].values()
    ]
    assert starts[0] == starts[1]
    assert len(set(starts[0])) == 2
    assert [pair["pairs"] for pair in result["paired"]] == [2, 2]

    measured = {"environment": measure.environment(), **result}
    run.write(tmp_path / "curves.json", measured)
    report.report(tmp_path)
    assert "CURVES, batch 1000: step / Adam's step | ≤ 1.5" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.START}\n{report.END}\n\nThe end.\n")
    arguments = ["report", "--out", str(tmp_path), "--readme", str(readme)]
    with pytest.raises(ValueError, match="Smoke runs are no results: curves"):
        run.main(arguments)
    (tmp_path / "curves.json").write_text(json.dumps({**measured, "smoke": False}))
    with pytest.raises(SystemExit, match="differs from the results"):
        run.main([*arguments, "--check"])
    run.main(arguments)
    run.main([*arguments, "--check"])
    assert readme.read_text().endswith(f"{report.END}\n\nThe end.\n")
    readme.write_text("# No markers\n")
    with pytest.raises(ValueError, match="The README needs one line"):
        run.main(arguments)


def test_the_section_of_the_readme_is_what_the_results_give(suite):
    import report

    assert report.is_current(report.RESULTS, ROOT / "README.md")


def test_the_data_do_not_change(suite):
    """Published results hold for these data only."""
    import data

    images = data.make_curves(50)
    assert (images.shape, images.dtype) == ((50, 784), np.float32)
    assert images.sum() == pytest.approx(2565.0989, rel=1e-6)
    assert not np.allclose(images, data.make_curves(50, seed=1))
    assert len(data.text()) == 12_215


def test_rivals_are_tuned(tiny, tmp_path, monkeypatch):
    import run
    import tune

    settings = [{"batch_size": 50, "learning_rate": rate} for rate in (1e-2, 1e-6)]
    found = tune.tune("adam", tiny, settings, threshold=220.0, budget=30.0)
    assert found["best"] == settings[0]
    assert [row["stopped"] for row in found["grid"]] in (
        ["reached", "budget"],
        ["reached", "hopeless"],
    )
    failed = tune.tune("muon", tiny, [{"unknown": 1.0}], threshold=1.0, budget=1.0)
    assert "TypeError" in failed["skipped"]

    monkeypatch.setattr(run, "tune", lambda *_, **__: {"best": {}, "loss": 0.5})
    for method in ("adam", "sgd"):
        run.run_tune(tmp_path / "tuned.json", "mnist_mlp", method, 1.0, smoke=True)
    tuned = run.read(tmp_path / "tuned.json")["mnist_mlp"]
    assert tuned["threshold"] == 0.5
    assert all(tuned["methods"][m]["environment"]["jax"] for m in ("adam", "sgd"))


def test_ratios_of_times_to_a_loss(suite):
    import race
    import targets

    history = [[0, 0.0, 9.0], [1, 1.0, 5.0], [2, 2.5, None], [3, 4.0, 2.0]]
    assert race.first_crossing(history, 3.0) == {"steps": 3, "seconds": 4.0}
    assert race.first_crossing(history, 1.0) is None

    def contestant(*seconds):
        runs = [{"history": [[0, 0.0, 9.0], [1, s, 1.0]], "best": 1.0} for s in seconds]
        return {"runs": runs}

    result = {
        "settings": {"budget": 10.0},
        "workload": {"thresholds": [1.0]},
        "contestants": {"cgfac": contestant(2.0, 3.0), "adam": contestant(4.0, 3.0)},
    }
    ratio = targets.time_ratio("adam")
    assert ratio(result) == ((0.5, 1.0), False, "")
    result["workload"]["thresholds"] = []  # to Adam's best instead
    assert ratio(result) == ((0.5, 1.0), False, "")
    result["workload"]["thresholds"] = [1.0]
    result["contestants"]["adam"]["runs"][0]["history"] = [[0, 0.0, 9.0]]
    assert ratio(result) == ((0.2, 1.0), True, "")
    result["contestants"]["cgfac"]["runs"][1]["history"] = [[0, 0.0, 9.0]]
    assert ratio(result) == ((0.2, math.inf), True, "")


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([10.0, 5.0, 3.0, 2.0, 1.0, 1.0], "falls"),
        # One bad batch does not decide, nor does 1/50 of the decrease.
        ([10.0, 5.0, 3.0, 1.0, 1.0, 1.0, 9.0], "falls"),
        ([10.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.1], "falls"),
        ([10.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], "turned up"),
        ([10.0, 1.0, 1.0, 1.0, 11.0, 11.0, 11.0], "diverged"),
        ([10.0, 11.0, 12.0, 13.0], "diverged"),
        ([10.0, 1.0, None], "diverged"),
    ],
)
def test_a_training_that_rises_again_is_found(suite, losses, word):
    import sweeps

    assert sweeps.verdict(losses)["verdict"] == word
