"""All wrong calls; as a script, writes the table of their errors, `docs/errors.md`.

From a clone: ``python tests/wrong_calls.py``
"""

import re
from pathlib import Path

from wrong import estimator, optimizer, others
from wrong.case import Case

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"

TOPICS = [*estimator.TOPICS, *optimizer.TOPICS, *others.TOPICS]
CASES = [case for topic in TOPICS for case in topic.cases]

_HEAD = """# Errors

Wrong calls, their errors, and what to do. All are a `ValueError` or a `TypeError`,
raised while Python runs or JAX traces, before anything is compiled.
The numbers inside an array cannot be seen then: a step in which one is not finite
is not taken, and counted (`diagnostics(opt_state)["num_rejected"]`).

The tests make every one of these calls, and `python tests/wrong_calls.py` writes this
page from the errors that they raise.
"""


# What was expected and what came, as far as words tell.
EXPECTED = re.compile(
    r"(?i)must|expected|needs?\b|takes|agree|fit|acts on|names|tagged|works in|adapts"
    r"|initialised|at estimator.init|captured|belong|have \d|\bno\b"
)
GOT = re.compile(
    r"(?i)\bgot\b|\bha(?:s|d|ve)\b|\bis\b|without|hold|absent|found|unknown|keeps|="
    r"|\bnot?\b"
)
# The last part of a message: a sentence, what follows a colon, or code.
_REMEDY = re.compile(
    r"(?:^|(?<=[.:;])\s+)(?:(?:For|With|To) [^.:]{1,70} )?"
    r"(?:Add|Bring|[Cc]all|Cast|Convert|Cut|Drop|Initialise|It must|Leave|Lower|Merge"
    r"|Move|[Pp]ass|Put|Reshape|Return|Set|Split|Start|Sum|Test|The first axis|Use"
    r"|[Ww]rite|\w+(?:, \w+)* = \w+)\b.*",
    re.DOTALL | re.MULTILINE,
)
_EXAMPLE = re.compile("such as (lambda .*?); got", re.DOTALL)


def parts(text: str) -> tuple[str, str]:
    """Returns what an error says, and what to do."""
    if example := _EXAMPLE.search(text):
        return text, f"Use `{example[1]}`."
    found = re.search("Ways out:.*", text, re.DOTALL) or _REMEDY.search(text)
    assert found is not None, f"This error does not say what to do:\n{text}"
    first, *rest = text[: found.start()].strip().splitlines()
    if first.endswith(":") and rest:
        first = f"{first} {rest[0]}"
    return first, re.sub("^(pass|call) ", lambda m: m[0].title(), found[0].strip())


def row(case: Case, error: type[Exception], text: str) -> str:
    """Returns a line of the table."""
    said, todo = parts(text)
    cells = case.done, f"{error.__name__}: {said}", todo
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    text = " ".join(text.split()).rstrip(":")
    # What Markdown would take for markup, where it is not code.
    return text if "`" in text else re.sub(r"([|*<])", r"\\\1", text)


def document() -> str:
    """Returns the page."""
    parts = [_HEAD]
    for topic in TOPICS:
        rows = [row(case, *case.error(traced=case.ways[0])) for case in topic.cases]
        lines = ["| what was done | the error | what to do |", "|---|---|---|", *rows]
        parts.append(f"## {topic.title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"{len(CASES)} calls: {DOCUMENT}")
