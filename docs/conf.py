"""Sphinx's configuration: `make docs` builds the site, and warnings are errors."""

import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import each other so

project = "optax_cgfac"
author = "The optax_cgfac authors"
project_copyright = author
release = importlib.metadata.version(project)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# ---------------------------------------------------------------- pages

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the code of pages and notebooks

# The notebooks are outside docs/, where Sphinx does not look. They link to the
# repository by full addresses, which Colab needs; their copies link to the pages here.
NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FILES = PROJECT["urls"]["Repository"] + "/blob/main/"


def copy_notebooks():
    NOTEBOOKS.mkdir(exist_ok=True)
    originals = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for stale in {p.name for p in NOTEBOOKS.iterdir()} - {p.name for p in originals}:
        (NOTEBOOKS / stale).unlink()
    for path in originals:
        text = path.read_text("utf-8")
        text = text.replace(f"]({FILES}notebooks/", "](")
        text = re.sub(rf"\]\({re.escape(FILES)}docs/(\w+\.md)", r"](../\1", text)
        copy = NOTEBOOKS / path.name
        if not copy.exists() or copy.read_text("utf-8") != text:
            copy.write_text(text, "utf-8")


copy_notebooks()

# ---------------------------------------------------------------- the reference

# Docstrings name functions in single backticks, as Optax's do.
default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True
# Names of other projects; their own sites are out of reach where this one is built.
OTHERS = "chex|flax|jax|jnp|lax|matplotlib|nn|nnx|np|numpy|optax|typing|collections"
nitpick_ignore_regex = [
    ("py:.*", rf"({OTHERS})(\..*)?"),
    ("py:class", "Any|Array|ArrayTree|Axes|Callable|Literal|Mapping|Sequence|PyTree"),
    # Types of the folders in signatures; public ones are known by both names.
    ("py:class", r"optax_cgfac\.\w+\..*"),
]

# ---------------------------------------------------------------- how it looks

html_theme = "sphinx_book_theme"
html_title = "optax_cgfac"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
# The theme's own, without a second field to search in.
html_sidebars = {"**": ["navbar-logo.html", "sbt-sidebar-nav.html"]}


def results_page(app, docname, source):
    """Puts the measurements into the page of them."""
    del app
    if docname != "performance":
        return
    from report import RESULTS, WORKLOADS, details, load

    results = load(RESULTS)
    text = re.sub("^# ", "## ", details(results), flags=re.MULTILINE)
    titles = {"widths": "Widths"}
    titles |= {n: r["workload"]["title"] for n, r in results.items() if n in WORKLOADS}
    for name, title in titles.items():
        if (RESULTS / f"{name}.png").exists():
            path = f"../benchmarks/results/{name}.png"
            picture = f"![{title}: what was measured]({path})"
            text = text.replace(f"## {title}\n", f"## {title}\n\n{picture}\n")
    # The races first, the targets after them, the machines last.
    wanted, *races = re.split("^(?=## )", text, flags=re.MULTILINE)[1:]
    first = next(name for name, result in results.items() if "environment" in result)
    measured, facts = "".join(races).split(f"\n\n{first}: ")
    parts = [measured, wanted, "## Machines", f"{first}: {facts}"]
    source[0] = source[0].replace("<!-- results -->", "\n\n".join(parts))


def links_to_notebooks(app, docname, source):
    """Makes pages link to the copies."""
    del app, docname
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def setup(app):
    app.connect("source-read", results_page)
    app.connect("source-read", links_to_notebooks)
