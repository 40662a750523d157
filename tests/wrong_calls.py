"""All wrong calls; as a script, writes the table of their errors, `docs/errors.md`.

From a clone: ``python tests/wrong_calls.py``
"""

import re
from pathlib import Path

from wrong import (
    batches,
    curvature,
    estimator_init,
    estimator_options,
    estimator_update,
    optimizer_calls,
    optimizer_curvature,
    optimizer_options,
    single_pass,
)
from wrong.case import Case

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"

TOPICS = [
    *estimator_options.TOPICS,
    *estimator_init.TOPICS,
    *estimator_update.TOPICS,
    *batches.TOPICS,
    *single_pass.TOPICS,
    *optimizer_options.TOPICS,
    *optimizer_curvature.TOPICS,
    *optimizer_calls.TOPICS,
    *curvature.TOPICS,
]
CASES = [case for topic in TOPICS for case in topic.cases]

_HEAD = """# Errors

Wrong calls, what is said of them, and what to do: all are a `ValueError` or a
`TypeError`, raised while Python runs or JAX traces, before anything is compiled.
The numbers inside an array cannot be seen then: a step in which one is not finite
is not taken, and counted (`diagnostics(opt_state)["num_rejected"]`).

The tests make every one of these calls, and this page is written by
`python tests/wrong_calls.py` from what they raise.
"""


def message(case: Case) -> str:
    """Returns what the call says."""
    try:
        case.run(traced=case.ways[0])
    except case.error as error:
        return str(error)
    raise AssertionError(f"{case.done}: nothing was raised.")


def row(case: Case, text: str) -> str:
    """Returns a line of the table."""
    found = re.search(case.remedy, text, re.DOTALL)
    assert found is not None, f"{case.done}: {case.remedy!r} is not in {text!r}."
    if found.groups():
        todo = f"Use `{found[1]}`."
    else:
        text, todo = text[: found.start()], text[found.start() :]
    first, *rest = text.strip().splitlines()
    if first.endswith(":") and rest:
        first = f"{first} {rest[0]}"
    todo = re.sub("^pass ", "Pass ", todo)
    return f"| {' | '.join(_cell(part) for part in (case.done, first, todo))} |"


def _cell(text: str) -> str:
    text = " ".join(text.split()).rstrip(":")
    # What Markdown would take for markup, where it is not code.
    return text if "`" in text else re.sub(r"([|*<])", r"\\\1", text)


def document() -> str:
    """Returns the page."""
    parts = [_HEAD]
    for topic in TOPICS:
        rows = [row(case, message(case)) for case in topic.cases]
        lines = ["| what was done | the error | what to do |", "|---|---|---|", *rows]
        parts.append(f"## {topic.title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"{len(CASES)} calls: {DOCUMENT}")
