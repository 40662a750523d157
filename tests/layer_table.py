"""Prints what is covered, for every kind of layer in Linen and in NNX.

For covered cases: how far gradients rebuilt from rows are from the real ones (in
float32), and how far an update by converged CG is from the dense solution (in float64).
From a clone:

    make layers
    make layers ARGS="--page docs/layers.md"   # rewrites the page's tables
"""

import argparse
import dataclasses
import pathlib
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import oracles
from models import Compact, init
from models.common import NUM_EXAMPLES, loss_of
from models.nnx_modules import shifted
from models.reported import HIDDEN, REPORTED, UNCOVERED, X
from models.table import CASES, LAYER_CASES, NNX_CASES
from optax_cgfac import scale_by_cgfac, value_and_grad
from optax_cgfac.curvature.check_gradients import gradient_errors
from optax_cgfac.layers.layer import matrix_from_leaves
from optax_cgfac.operators.rows import to_dense
from optax_cgfac.utils.paths import leaves_by_path


class Line(NamedTuple):
    """One line of the table; ``update_error`` is None if nothing is covered."""

    covered: tuple[str, ...]
    reported: tuple[str, ...]
    gradient_errors: dict[str, float]
    update_error: float | None


def covered(make):
    case = make()
    return case.loss, case.params, case.inputs


def reported(make, framework):
    """A problem whose model is not covered whole."""
    if framework == "nnx":
        module, inputs, *_ = make()
        return loss_of(lambda m, x: m(x)), shifted(module), inputs
    model, inputs, *_ = make
    loss = loss_of(lambda params, x: model.apply({"params": params}, x))
    return loss, init(model, inputs), inputs


def hidden(make):
    return loss_of(make()), init(Compact(), X), X


def tables():
    """Returns ``{framework: {name: (is covered, what makes the problem)}}``."""
    found = {
        framework: {
            name: (True, partial(covered, make)) for name, make in cases.items()
        }
        for framework, cases in (("linen", CASES | LAYER_CASES), ("nnx", NNX_CASES))
    }
    for framework, cases in (("linen", UNCOVERED), ("nnx", REPORTED)):
        for name, make in cases.items():
            if name != "while_loop":  # has no gradient
                found[framework][name] = False, partial(reported, make, framework)
    for name, make in HIDDEN.items():
        found["linen"][f"whole model {name}"] = False, partial(hidden, make)
    return found


TABLE = tables()


def examine(framework, name):
    """Returns the `Line` of a case."""
    _, make = TABLE[framework][name]
    jit = jax.jit if framework == "linen" else nnx.jit

    loss, params, inputs = make()
    run = value_and_grad(loss, fallback=True, num_examples=NUM_EXAMPLES)
    _, grads, curvature = jit(run)(params, inputs)
    errors = gradient_errors(grads, curvature)
    errors = {path: float(error) for path, error in errors.items()}
    with jax.enable_x64(True):
        error = update_error(*double(grads, curvature))
    kinds = tuple(sorted({tag.kind for tag in curvature.tags}))
    uncovered = tuple("/".join(path) for path, _ in curvature.spec.uncovered)
    return Line(kinds, uncovered, errors, error)


def double(grads, curvature):
    """Returns both in float64, which not every layer computes in itself."""

    def cast(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    grads, curvature = jax.tree.map(cast, (grads, curvature))
    tags = tuple(dataclasses.replace(tag, dtype="float64") for tag in curvature.tags)
    spec = dataclasses.replace(curvature.spec, tags=tags)
    return grads, dataclasses.replace(curvature, spec=spec)


@jax.jit
def solve(grads, curvature, damping):
    tx = scale_by_cgfac(damping, max_steps=1000, rtol=1e-11)
    return tx.update(grads, tx.init(grads), curvature=curvature)[0]


def update_error(grads, curvature):
    """The largest relative error of a layer's update against the dense solution."""
    leaves, errors = leaves_by_path(grads), []
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        b = matrix_from_leaves(tag, {path: leaves[path] for path in tag.leaves})
        stack = b.shape[:-2]
        a, g = oracles.float64(to_dense(rows.a)), oracles.float64(rows.g)
        a, g, flat_b = (x.reshape(-1, *x.shape[len(stack) :]) for x in (a, g, b))
        factors = [
            (
                oracles.moment(one_a, 1 / max(np.any(one_g != 0, -1).sum(), 1)),
                oracles.moment(one_g, tag.positions * tag.columns / len(one_g)),
            )
            for one_a, one_g in zip(a, g, strict=True)
        ]
        norms = [np.linalg.norm(x, 2) * np.linalg.norm(y, 2) for x, y in factors]
        damping = 0.03 * max(norms)
        solved = [
            oracles.solve(np.kron(*pair) + damping * np.eye(one_b.size), one_b)
            for pair, one_b in zip(factors, flat_b, strict=True)
        ]
        updated = leaves_by_path(solve(grads, curvature, damping))
        x = matrix_from_leaves(tag, {path: updated[path] for path in tag.leaves})
        errors.append(oracles.relative_error(x, np.reshape(solved, b.shape)))
    return max(errors, default=None)


def show(error):
    return "" if error is None else f"{error:.0e}"


START, END = "<!-- layers: start -->", "<!-- layers: end -->"


def page_line(name, line):
    """Returns a case's line of docs/layers.md."""
    reported = ", ".join(f"`{path}`" for path in line.reported)
    return f"| {name} | {', '.join(line.covered)} | {reported} |"


def page_tables(lines):
    """Returns the tables of docs/layers.md, of `Line`s by framework and case."""
    parts = []
    for framework, title in (("linen", "Linen"), ("nnx", "NNX")):
        body = [page_line(name, line) for name, line in lines[framework].items()]
        header = ["| case | layers that are covered | reported |", "|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *header, *body]))
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=pathlib.Path, help="a page to rewrite")
    args = parser.parse_args()
    print(f"{'case':44} {'in':6} {'covered':28} {'gradient':9} {'update':7} reported")
    lines = {framework: {} for framework in TABLE}
    for framework, cases in TABLE.items():
        for name in cases:
            line = lines[framework][name] = examine(framework, name)
            worst = max(line.gradient_errors.values(), default=None)
            print(
                f"{name:44} {framework:6} {', '.join(line.covered):28} "
                f"{show(worst):9} {show(line.update_error):7} "
                f"{', '.join(line.reported)}",
                flush=True,
            )
    if args.page:
        before, rest = args.page.read_text().split(START)
        after = rest.split(END)[1]
        tables = page_tables(lines)
        args.page.write_text(f"{before}{START}\n\n{tables}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
