"""README and docs: their code runs as printed, prints what they show, links lead on."""

import math
import re

import jax
import pytest

import pages

# In tests/devices, with eight of them.
ELSEWHERE = {"docs/devices.md"}
WITH_CODE = {
    name: page
    for name, page in zip(pages.NAMES, pages.PAGES, strict=True)
    if name not in ELSEWHERE and pages.blocks(page, "python")
}
# How low the loss of a page must get; others must be finite.
LIMITS = {"README.md": 0.5}


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(
    name, capsys, monkeypatch, tmp_path
):
    if name == "docs/pictures.md":
        pytest.importorskip("matplotlib.pyplot").switch_backend("Agg")
    monkeypatch.chdir(tmp_path)  # for what a page saves
    names = pages.run(WITH_CODE[name])
    printed = capsys.readouterr().out
    for _, shown in pages.blocks(WITH_CODE[name], "text"):
        assert shown in printed
    assert float(names.get("loss", 0.0)) < LIMITS.get(name, math.inf)


@pytest.mark.parametrize("side", "-+")
def test_both_sides_of_the_migration_from_adam_train(side):
    """The loop with Adam, and the one that the diff makes of it."""
    ((_, diff),) = pages.blocks(pages.ROOT / "docs" / "migration.md", "diff")
    code = "\n".join(x[1:] for x in diff.splitlines() if x[:1] in (" ", side))
    names = pages.run(WITH_CODE["README.md"])
    exec(code, names)
    state = [names["params"], names["opt_state"]]
    rest = [names["batch"]]
    if side == "+":
        state.append(names["curvature"])
        rest.append(jax.random.key(0))
    losses = []
    for _ in range(5):
        *state, loss = names["train_step"](*state, *rest)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["vocabulary", "architecture"])
def test_files_that_a_page_names_exist(name):
    text = (pages.ROOT / "docs" / f"{name}.md").read_text("utf-8")
    files = set(re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", text))
    assert len(files) > 10
    folders = pages.ROOT, pages.ROOT / "optax_cgfac"
    assert not [f for f in files if not any((x / f).exists() for x in folders)]


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.NAMES)
def test_links_lead_to_files_and_headings(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert pages.leads(target, anchor), link
