"""README and docs: their code runs as printed, prints what they show, links lead on."""

import math

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


def test_there_are_pages_with_code():
    assert {"README.md", "docs/pipelines.md"} < set(WITH_CODE)


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


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.NAMES)
def test_links_lead_to_files_and_headings(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(target), link
