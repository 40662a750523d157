"""The size of the house: prints what is counted, and fails beyond the limits.

From a clone: ``python .ci/house.py``. Needs nothing but Python. A line of checks is one
of a function named ``check...`` or ``warn...``, of a ``__post_init__``, or of an ``if``
that raises.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optax_cgfac"
# Their keywords are Optax's idiom; their docstrings group them.
FACTORIES = {"cgfac", "fisher_estimator", "scale_by_cgfac"}
LIMITS = {
    "lines of optax_cgfac/": 10_000,
    "of them checks": 700,
    "lines of tests/": 12_000,
    "lines of benchmarks/": 2_200,
    "public names": 24,
    "files in a folder": 8,
    "lines of a module": 400,
    "lines of code of a function": 60,
    "parameters of a function": 7,
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields all functions and methods of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function: ast.AST, lines: list[str]) -> int:
    """Counts the lines that are not blank, a comment or part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(function):
        first = getattr(node, "body", None)
        first = first[0] if isinstance(first, list) and first else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            documented |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    numbers = range(function.lineno, function.end_lineno + 1)  # type: ignore[attr-defined]
    texts = ((n, lines[n - 1].strip()) for n in numbers)
    return sum(n not in documented and t != "" and t[0] != "#" for n, t in texts)


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the parameters that a caller gives by name or position."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def check_lines(tree: ast.AST) -> set[int]:
    """Returns the numbers of the lines that check."""
    found: set[int] = set()
    for node in ast.walk(tree):
        is_check = isinstance(node, ast.Raise)
        if isinstance(node, ast.FunctionDef):
            name = node.name.lstrip("_")
            is_check = name.startswith(("check", "warn")) or name == "post_init__"
            is_check &= name != "check_gradients"
        elif isinstance(node, ast.If) and not node.orelse:
            is_check = any(isinstance(line, ast.Raise) for line in node.body)
        if is_check:
            found |= set(range(node.lineno, (node.end_lineno or 0) + 1))  # type: ignore
    return found


def num_lines(folder: Path) -> int:
    """Counts the lines of all modules below a folder."""
    return sum(len(p.read_text().splitlines()) for p in folder.rglob("*.py"))


def measure() -> dict[str, tuple[int, str]]:
    """Returns every count, and where the largest is."""
    counts = {
        f"lines of {name}/": (num_lines(ROOT / name), "")
        for name in ("optax_cgfac", "tests", "benchmarks")
    }
    checks = 0
    modules, lengths, widths = [(0, "")], [(0, "")], [(0, "")]
    for path in sorted(PACKAGE.rglob("*.py")):
        text, where = path.read_text(), str(path.relative_to(ROOT))
        lines, tree = text.splitlines(), ast.parse(text)
        checks += len(check_lines(tree))
        modules.append((len(lines), where))
        for function in functions(tree):
            if function.name not in FACTORIES:
                place = f"{where}: {function.name}"
                lengths.append((code_lines(function, lines), place))
                widths.append((num_parameters(function), place))
    folders = [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]
    files = [
        (sum(p.name != "__init__.py" for p in f.glob("*.py")), str(f.relative_to(ROOT)))
        for f in folders
    ]
    init = ast.parse((PACKAGE / "__init__.py").read_text())
    [names] = [
        node.value.elts  # type: ignore[attr-defined]
        for node in init.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return counts | {
        "of them checks": (checks, ""),
        "public names": (len(names), ""),
        "files in a folder": max(files),
        "lines of a module": max(modules),
        "lines of code of a function": max(lengths),
        "parameters of a function": max(widths),
    }


def main() -> None:
    """Prints the counts; exits with 1 if one is beyond its limit."""
    counts, failed = measure(), False
    for name, limit in LIMITS.items():
        count, where = counts[name]
        failed |= count > limit
        verdict = "  TOO MANY" if count > limit else ""
        place = f"  ({where})" if where else ""
        print(f"{name:28}{count:>7,} of {limit:>6,}{place}{verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
