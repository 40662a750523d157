"""The pages that people read: their code, run as it is printed, and their links."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks(page, language):
    """Returns ``(line, code)`` of every fenced block of a language."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in _FENCE.finditer(text)
        if found[1] == language
    ]


def run(page):
    """Runs the Python of a page from top to bottom; returns the names it leaves."""
    names = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        # The lines of a traceback are those of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    return names


def links(page):
    """Returns the targets of the links that lead to other files or places here."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    found = _LINK.findall(text)
    return [x for x in found if not re.match(r"[a-z]+:", x)]


def anchors(page):
    """Returns what can be linked to in a page, as GitHub and MyST name headings."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", x.lower()) for x in _HEADING.findall(text))
    return {x.strip().replace(" ", "-") for x in plain}


def leads(target, anchor):
    """Returns whether a link leads to a file, and to a heading of it."""
    return target.exists() and (not anchor or anchor in anchors(target))
