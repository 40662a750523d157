"""Notebooks: they run, their outputs are there, their links and badges lead on."""

import re
import tomllib

import pytest

import pages
from training import python

nbformat = pytest.importorskip("nbformat")

ROOT = pages.ROOT
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in PATHS]
every_notebook = pytest.mark.parametrize("path", PATHS, ids=NAMES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
COLAB = "https://colab.research.google.com/"


def badge(name):
    """The Markdown of a badge that opens a notebook of the repository in Colab."""
    owner = REPOSITORY.removeprefix("https://github.com/")
    target = f"{COLAB}github/{owner}/blob/main/notebooks/{name}"
    return f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({target})"


def read(path):
    """The notebook, and the cells with code."""
    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells):
    """Returns how many pictures every cell has."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in cells
    ]


def test_there_are_notebooks_and_the_readme_names_each():
    assert NAMES
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", readme) == NAMES
    for name in NAMES:
        assert badge(name) in readme
    assert readme.count(COLAB) == 2 * len(NAMES)


@every_notebook
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    command = ["notebooks/run.py", path.name, "--smoke", "--output", tmp_path]
    # Compiling is nearly all that they do.
    python(*command, timeout=None, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    # A picture that is missing in the one or the other was not drawn as it is now.
    assert pictures(read(path)[1]) == pictures(read(tmp_path / path.name)[1])


@every_notebook
def test_it_opens_and_installs_the_repository(path):
    notebook, cells = read(path)
    title, install = notebook.cells[:2]
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert badge(path.name) in title.source
    assert install.cell_type == "code"
    requirement = f'"optax_cgfac[examples] @ git+{REPOSITORY}"'
    assert f"    %pip install -q {requirement}" in install.source.splitlines()
    assert "OPTAX_CGFAC_SMOKE" in "".join(x.source for x in cells)


@every_notebook
def test_its_outputs_are_committed_and_name_no_machine(path):
    assert path.stat().st_size < 2**20
    notebook, cells = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert sum(pictures(cells)) > 0
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(^|\s)(/\w|[A-Z]:\\)|0x[0-9a-f]{6}|\r", text)


@every_notebook
def test_its_links_lead_to_files_and_headings(path):
    notebook, _ = read(path)
    prose = "\n".join(x.source for x in notebook.cells if x.cell_type == "markdown")
    start = f"{REPOSITORY}/blob/main/"
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith(REPOSITORY):
            # In Colab only full addresses lead anywhere.
            assert link.startswith("https://"), link
            continue
        assert link.startswith(start), link
        name, _, anchor = link.removeprefix(start).partition("#")
        assert pages.leads(ROOT / name, anchor), link
