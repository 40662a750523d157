"""Prints what is covered, for every kind of layer in Linen and in NNX.

For covered cases: how far gradients rebuilt from rows are from the real ones (in
float32), and how far an update by converged CG is from the dense solution (in float64).
From a clone:

    make layers
    make layers ARGS="--page docs/layers.md"   # rewrites the page's tables
"""

import argparse
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import linen_reported
import nnx_models
import oracles
from layer_models import LAYER_CASES
from linen_reported import X
from models import CASES, NUM_EXAMPLES, Compact, init
from optax_cgfac import scale_by_cgfac, value_and_grad
from optax_cgfac.curvature.check_gradients import gradient_errors
from optax_cgfac.layers.layer import matrix_from_leaves
from optax_cgfac.operators.rows import to_dense
from optax_cgfac.utils.paths import leaves_by_path


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
      covered: Kinds of the covered layers.
      reported: Reported parameters.
      gradient_errors: By parameter, the relative error of the rebuilt gradient.
      update_error: Largest relative error of a layer's update; None if nothing is
        covered.
    """

    covered: tuple[str, ...]
    reported: tuple[str, ...]
    gradient_errors: dict[str, float]
    update_error: float | None


def rows_of_linen():
    """Returns ``{name: (is covered, function that makes the problem)}``."""

    def reported(model, inputs):
        def model_fn(params, x):
            return model.apply({"params": params}, x)

        return loss_of(model_fn), init(model, inputs), inputs

    table = {
        name: (True, functools.partial(linen_problem, make))
        for name, make in (CASES | LAYER_CASES).items()
    }
    table |= {
        name: (False, functools.partial(reported, model, inputs))
        for name, (model, inputs, _, _) in linen_reported.UNCOVERED.items()
        if name != "while_loop"  # has no gradient
    }
    return table | {
        f"whole model {name}": (
            False,
            lambda make=make: (loss_of(make()), init(Compact(), X), X),
        )
        for name, make in linen_reported.HIDDEN.items()
    }


def linen_problem(make):
    case = make()
    return case.loss, case.params, case.inputs


def rows_of_nnx():
    """Returns ``{name: (is covered, function that makes the problem)}``."""

    def covered(make):
        case = make()
        return case.loss, case.model, case.inputs

    def reported(make):
        model, inputs, *_ = make()
        return loss_of(lambda m, x: m(x)), nnx_models.shifted(model), inputs

    table = {
        name: (True, functools.partial(covered, make))
        for name, make in nnx_models.CASES.items()
    }
    return table | {
        name: (False, functools.partial(reported, make))
        for name, make in nnx_models.REPORTED.items()
    }


def loss_of(model_fn):
    """A loss under which no gradient vanishes (a norm's squares add to a constant)."""

    def loss(params, inputs):
        outputs = model_fn(params, inputs)
        outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
        outputs = outputs.reshape(NUM_EXAMPLES, -1)
        weights = jnp.linspace(0.5, 1.5, outputs.shape[-1], dtype=outputs.dtype)
        return jnp.mean(jnp.sum(weights * (outputs - 0.3) ** 2, -1))

    return loss


TABLE = {"linen": rows_of_linen(), "nnx": rows_of_nnx()}


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
    leaves = leaves_by_path(grads)
    worst = None
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        b = matrix_from_leaves(tag, {path: leaves[path] for path in tag.leaves})
        a, g = oracles.float64(to_dense(rows.a)), oracles.float64(rows.g)
        used = np.any(g != 0, -1)
        stack = b.shape[:-2]
        flat = [x.reshape(-1, *x.shape[len(stack) :]) for x in (a, g, used, b)]
        solved, dampings = [], []
        factors = []
        for one_a, one_g, one_used, _ in zip(*flat, strict=True):
            a_factor = one_a.T @ one_a / max(one_used.sum(), 1)
            g_factor = one_g.T @ one_g * tag.positions * tag.columns / len(one_g)
            factors.append((a_factor, g_factor))
            dampings.append(np.linalg.norm(a_factor, 2) * np.linalg.norm(g_factor, 2))
        damping = 0.03 * max(dampings)
        for (a_factor, g_factor), one_b in zip(factors, flat[3], strict=True):
            dense = np.kron(a_factor, g_factor) + damping * np.eye(one_b.size)
            solved.append(oracles.solve(dense, one_b))
        updated = leaves_by_path(solve(grads, curvature, damping))
        x = matrix_from_leaves(tag, {path: updated[path] for path in tag.leaves})
        error = oracles.relative_error(x, np.reshape(solved, b.shape))
        worst = error if worst is None else max(worst, error)
    return worst


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
    parser.add_argument("--only", default="", help="part of the cases' names")
    parser.add_argument("--page", type=pathlib.Path, help="a page to rewrite")
    args = parser.parse_args()
    if args.page and args.only:
        parser.error("--page takes all cases")
    print(f"{'case':44} {'in':6} {'covered':28} {'gradient':9} {'update':7} reported")
    lines = {framework: {} for framework in TABLE}
    for framework, cases in TABLE.items():
        for name in cases:
            if args.only in name:
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
