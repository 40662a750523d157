"""The mutants of a source file: a choice of cosmic-ray's operators and a few more.

Code written for JAX has few statements and many calls, which cosmic-ray leaves alone.
The operators here change calls: another function, swapped branches of ``where``, one
keyword argument, operand, cast or statement less.
"""

import ast
import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators import (
    binary_operator_replacement,
    boolean_replacer,
    break_continue,
    comparison_operator_replacement,
    number_replacer,
    remove_decorator,
    unary_operator_replacement,
    zero_iteration_for_loop,
)
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword, Name
from parso.tree import BaseNode

# One or two replacements for each operator: most others are type errors for arrays,
# which any test finds.
REPLACEMENTS = {
    "Add_Sub",
    "Sub_Add",
    "Mul_Div",
    "Mul_Add",
    "Div_Mul",
    "FloorDiv_Mul",
    "Pow_Mul",
    "BitAnd_BitOr",
    "BitOr_BitAnd",
    "Delete_USub",
    "Delete_Invert",
    "Delete_Not",
}

COUNTERPARTS = {
    a: b
    for pair in (
        ("maximum", "minimum"),
        ("max", "min"),
        ("any", "all"),
        ("zeros", "ones"),
        ("zeros_like", "ones_like"),
        ("add", "subtract"),
        ("isfinite", "isnan"),
        ("argmax", "argmin"),
    )
    for a, b in (pair, pair[::-1])
}


class _CallOperator(Operator):
    """An operator that changes a node in place, at some of its children."""

    def sites(self, node):
        """Yields the indices of the children that it can change."""
        raise NotImplementedError

    def change(self, node, i):
        """Changes child ``i``."""
        raise NotImplementedError

    def mutation_positions(self, node):
        if isinstance(node, BaseNode):
            children = [node.children[i] for i in self.sites(node)]
            yield from [(child.start_pos, child.end_pos) for child in children]

    def mutate(self, node, index):
        self.change(node, list(self.sites(node))[index])
        return node


class ReplaceFunction(_CallOperator):
    """Replaces a function by its counterpart, such as ``maximum`` by ``minimum``."""

    def sites(self, node):
        for i, child in enumerate(node.children):
            if isinstance(child, Name) and child.value in COUNTERPARTS:
                before, after = child.get_previous_leaf(), child.get_next_leaf()
                if before == ".":
                    if before.get_previous_leaf().value in ("jnp", "np"):
                        yield i
                elif before != "def" and after == "(":
                    yield i

    def change(self, node, i):
        node.children[i].value = COUNTERPARTS[node.children[i].value]

    @classmethod
    def examples(cls):
        return (
            Example("jnp.maximum(x, y)", "jnp.minimum(x, y)"),
            Example("max(x, 1)", "min(x, 1)"),
        )


class SwapBranches(_CallOperator):
    """Swaps the last two of the three arguments of ``where``."""

    def sites(self, node):
        has_three = node.type == "arglist" and len(node.children) == 5
        if has_three and node.get_previous_leaf().get_previous_leaf().value == "where":
            yield 2

    def change(self, node, i):
        children = node.children
        children[i], children[i + 2] = children[i + 2], children[i]

    @classmethod
    def examples(cls):
        return (Example("where(a, b, c)", "where(a, c, b)"),)


class DropKeyword(_CallOperator):
    """Leaves out a keyword argument of a call."""

    def sites(self, node):
        if node.type in ("arglist", "trailer"):
            for i, child in enumerate(node.children):
                if child.type == "argument" and child.children[1] == "=":
                    yield i

    def change(self, node, i):
        has_comma = i + 1 < len(node.children) and node.children[i + 1] == ","
        del node.children[i : i + 1 + has_comma]

    @classmethod
    def examples(cls):
        return (Example("f(x, y=1, z=2)", "f(x, z=2)"), Example("f(y=1)", "f()"))


class DropOperand(_CallOperator):
    """Leaves out an operand of a sum, a product or a logical expression."""

    TYPES = ("arith_expr", "term", "expr", "and_expr", "and_test", "or_test")

    def sites(self, node):
        if node.type in self.TYPES:
            yield from range(0, len(node.children), 2)

    def change(self, node, i):
        prefix = node.get_first_leaf().prefix
        start = max(i - 1, 0)
        del node.children[start : start + 2]
        node.get_first_leaf().prefix = prefix

    @classmethod
    def examples(cls):
        return (Example("x = a + b", "x = b"), Example("x = a + b", "x = a", 1))


class DropAttribute(_CallOperator):
    """Leaves out a cast ``.astype(...)`` or a transposition ``.mT`` or ``.T``."""

    def sites(self, node):
        if node.type == "atom_expr":
            for i, child in enumerate(node.children):
                is_attribute = child.type == "trailer" and child.children[0] == "."
                if is_attribute and child.children[1].value in ("astype", "mT", "T"):
                    yield i

    def change(self, node, i):
        is_call = node.children[i].children[1].value == "astype"
        del node.children[i : i + 1 + is_call]

    @classmethod
    def examples(cls):
        return (Example("x.mT", "x"), Example("x.astype(t)", "x"))


class DropCall(_CallOperator):
    """Replaces a statement that is only a call by ``pass``."""

    def sites(self, node):
        if node.type == "simple_stmt" and node.children[0].type == "atom_expr":
            yield 0

    def change(self, node, i):
        first = node.get_first_leaf()
        node.children[i] = Keyword("pass", first.start_pos, first.prefix)

    @classmethod
    def examples(cls):
        return (Example("check(x)\n", "pass\n"),)


OWN = (
    ReplaceFunction,
    SwapBranches,
    DropKeyword,
    DropOperand,
    DropAttribute,
    DropCall,
)


def operators() -> list[Operator]:
    """Returns the operators that make mutants."""
    replacing = (
        *binary_operator_replacement.operators(),
        *unary_operator_replacement.operators(),
    )
    chosen = [
        op for op in replacing if op.__name__.split("Operator_")[1] in REPLACEMENTS
    ]
    if len(chosen) != len(REPLACEMENTS):
        raise RuntimeError("cosmic-ray has renamed an operator of REPLACEMENTS.")
    comparisons = [
        op
        for op in comparison_operator_replacement.operators()
        if op.__name__.count("Is") in (0, 2)  # "is" in place of "<" compares nothing
    ]
    classes = (
        *chosen,
        *comparisons,
        boolean_replacer.AddNot,
        boolean_replacer.ReplaceTrueWithFalse,
        boolean_replacer.ReplaceFalseWithTrue,
        boolean_replacer.ReplaceAndWithOr,
        boolean_replacer.ReplaceOrWithAnd,
        break_continue.ReplaceBreakWithContinue,
        break_continue.ReplaceContinueWithBreak,
        number_replacer.NumberReplacer,
        remove_decorator.RemoveDecorator,
        zero_iteration_for_loop.ZeroIterationForLoop,
        *OWN,
    )
    return [cls() for cls in classes]


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
      file: The file, relative to the repository.
      line: The first line that differs.
      operator: The name of the operator that made it.
      diff: The lines that differ.
      source: The whole changed file.
    """

    file: str
    line: int
    operator: str
    diff: str
    source: str


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Yields the mutants of a file whose program is not the file's own.

    Docstrings, annotations and the texts of errors are no part of the program. Of
    mutants that are the same program only the first is given.

    Args:
      file: The name of the file.
      source: What it holds.

    Yields:
      The mutants, in a fixed order.
    """
    nodes = list(ast_nodes(get_ast(source)))
    seen = {_program(source)}
    for operator in operators():
        places = [
            (node, start[0])
            for node in nodes
            for start, _ in operator.mutation_positions(node)
        ]
        for occurrence, (node, line) in enumerate(places):
            if node.parent is not None and node.parent.type in (
                "parameters",
                "lambdef",
            ):
                continue  # the star before keyword-only parameters is no product
            mutated = mutate_code(source, operator, occurrence)
            try:
                program = _program(mutated)
            except SyntaxError:
                continue
            if program not in seen:
                seen.add(program)
                diff = _diff(source, mutated)
                yield Mutant(file, line, type(operator).__name__, diff, mutated)


def _diff(source: str, mutated: str) -> str:
    old, new = source.split("\n"), mutated.split("\n")
    lines = difflib.unified_diff(old, new, n=0, lineterm="")
    marks = ("---", "+++", "@@")
    return "\n".join(line for line in lines if not line.startswith(marks))


def _program(source: str) -> str:
    return ast.dump(_Strip().visit(ast.parse(source)))


class _Strip(ast.NodeTransformer):
    """Takes out what no test should look at."""

    def visit_Expr(self, node: ast.Expr) -> Any:
        is_docstring = isinstance(node.value, ast.Constant)
        return ast.Pass() if is_docstring else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node
