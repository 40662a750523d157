"""Calls that are right but for what a case changes."""

from flax import nnx

from optax_cgfac import cgfac, fisher_estimator, scale_by_cgfac, scale_by_kfac
from steps import model_fn, problem, value_fn

# What several errors say.
PASS_TREE = "Pass the tree of parameters"
INSIDE_INPUTS = "Pass counters and statistics inside inputs"
CONVERT = r"Convert it by jnp\.asarray"


class Modes(nnx.Module):
    """A module with a mode."""

    def __init__(self):
        self.layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(self.layer(x))


def init(params=None, inputs=None, fn=model_fn, loss="squared_error", **options):
    """``init`` with parameters or inputs made from the right ones."""

    def call(g):
        estimator = fisher_estimator(fn, loss, **({"examples": 4} | options))
        return estimator.init(
            g.params if params is None else params(g),
            g.x if inputs is None else inputs(g),
        )

    return call


def update(**changes):
    """``update`` with arguments made from the right ones."""

    def call(g):
        made = {name: make(g) for name, make in changes.items()}
        return problem().estimator.update(
            made.pop("curvature", g.curvature),
            made.pop("params", g.params),
            made.pop("inputs", g.x),
            **({"rng": g.key} | made),
        )

    return call


def new_update(fn=model_fn, loss="squared_error", inputs=None, at=None, **options):
    """``init`` and ``update`` of a new estimator."""
    arguments = {
        name: options.pop(name) for name in ("rng", "targets") if name in options
    }

    def call(g):
        estimator = fisher_estimator(
            fn, loss, **({"examples": 4, "window": 1} | options)
        )
        first = g.x if inputs is None else inputs(g)
        curvature = estimator.init(g.params, first)
        made = {name: make(g) for name, make in arguments.items()}
        later = first if at is None else at(g)
        return estimator.update(curvature, g.params, later, **made)

    return call


BLOCK = {
    "cgfac": cgfac,
    "scale_by_cgfac": lambda: scale_by_cgfac(0.1),
    "scale_by_kfac": lambda: scale_by_kfac(0.1),
}


def step(tx="cgfac", **changes):
    """``tx.update`` with arguments made from the right ones."""

    def call(g):
        made = {name: make(g) for name, make in changes.items()}
        own = BLOCK[tx]() if isinstance(tx, str) else tx()
        params = made.pop("params", g.params)
        grads = made.pop("grads", g.grads)
        state = made.pop("state") if "state" in made else own.init(g.params)
        extra = {"curvature": g.curvature, "value": g.value, "value_fn": value_fn}
        return own.update(grads, state, params, **(extra | made))

    return call
