"""Prints what is covered, for every kind of layer in Linen and in NNX.

For covered cases: how far gradients rebuilt from rows are from the real ones (in
float32), and how far an update by converged CG is from the dense solution (in float64).
From a clone:

    make layers
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nnx_models
import oracles
from layer_models import LAYER_CASES
from models import CASES
from optax_cgfac import check_gradients, scale_by_cgfac, value_and_grad
from optax_cgfac._layers import matrix_from_leaves
from optax_cgfac._paths import leaves_by_path
from optax_cgfac._rows import to_dense


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
      covered: Kinds of the covered layers.
      reported: Reported parameters.
      gradient_error: Largest relative error of a rebuilt gradient; None if nothing
        is covered.
      update_error: Largest relative error of a layer's update.
    """

    covered: tuple[str, ...]
    reported: tuple[str, ...]
    gradient_error: float | None
    update_error: float | None


def linen_cases():
    return {name: (make, "covered") for name, make in (CASES | LAYER_CASES).items()}


def nnx_cases():
    covered = {name: (make, "covered") for name, make in nnx_models.CASES.items()}
    return covered | {
        name: (make, "reported") for name, make in nnx_models.REPORTED.items()
    }


TABLE = {"linen": linen_cases, "nnx": nnx_cases}


def problem(framework, name):
    """Returns ``loss(params, inputs)``, the parameters and the inputs of a case."""
    make, expected = TABLE[framework]()[name]
    case = make()
    if framework == "linen":
        return case.loss, case.params, case.inputs
    if expected == "covered":
        return case.loss, case.model, case.inputs
    model, inputs = nnx_models.shifted(case[0]), case[1]
    return lambda m, x: jnp.mean(jnp.sum(m(x) ** 2, -1)), model, inputs


def examine(framework, name):
    """Returns the `Line` of a case."""
    loss, params, inputs = problem(framework, name)
    check = check_gradients(loss, params, inputs)
    with jax.enable_x64(True):
        loss, params, inputs = double(*problem(framework, name))
        _, grads, curvature = value_and_grad(loss, fallback=True)(params, inputs)
        error = update_error(grads, curvature)
    kinds = tuple(sorted({tag.kind for tag in curvature.tags}))
    gradient_error = max(check.errors.values(), default=None)
    return Line(kinds, tuple(check.uncovered), gradient_error, error)


def double(loss, params, inputs):
    def cast(x):
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float64) if is_float else x

    if isinstance(params, nnx.Module):
        graphdef, state = nnx.split(params)
        params = nnx.merge(graphdef, jax.tree.map(cast, state))
    else:
        params = jax.tree.map(cast, params)
    return loss, params, jax.tree.map(cast, inputs)


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
        tx = scale_by_cgfac(damping, max_steps=1000, rtol=1e-11)
        updates, _ = tx.update(grads, tx.init(grads), curvature=curvature)
        updated = leaves_by_path(updates)
        x = matrix_from_leaves(tag, {path: updated[path] for path in tag.leaves})
        error = oracles.relative_error(x, np.reshape(solved, b.shape))
        worst = error if worst is None else max(worst, error)
    return worst


def show(error):
    return "" if error is None else f"{error:.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the cases' names")
    only = parser.parse_args().only
    print(f"{'case':44} {'in':6} {'covered':28} {'gradient':9} {'update':7} reported")
    for framework, cases in TABLE.items():
        for name in cases():
            if only in name:
                line = examine(framework, name)
                print(
                    f"{name:44} {framework:6} {', '.join(line.covered):28} "
                    f"{show(line.gradient_error):9} {show(line.update_error):7} "
                    f"{', '.join(line.reported)}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
