"""A wrong call, what its error must say, and builders of calls with one mistake."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cgfac import (
    Curvature,
    Loss,
    cgfac,
    fisher_estimator,
    scale_by_cgfac,
    scale_by_kfac,
    value_and_grad,
)
from steps import ingredients, model_fn, problem, value_fn


class Given(NamedTuple):
    """What a training step has at hand, as arrays or as tracers."""

    params: Any
    grads: Any
    curvature: Curvature
    value: jax.Array
    x: jax.Array
    y: jax.Array
    key: jax.Array


@functools.cache
def given() -> Given:
    g, batch = ingredients(), problem().batch
    key = jax.random.key(0)
    return Given(g.params, g.grads, g.curvature, g.value, batch["x"], batch["y"], key)


class Case(NamedTuple):
    """A wrong call.

    Attributes:
      done: What was done, for the table.
      call: Makes the call.
      ways: Whether arrays are tracers, for each way to make the call.
    """

    done: str
    call: Callable[[Given], Any]
    ways: tuple[bool, ...]

    def error(self, *, traced: bool) -> tuple[type, str]:
        """Makes the call, and returns its error's class and text."""
        try:
            # What a call returns that is not refused may be no arrays.
            call = jax.jit(lambda g: [self.call(g)][:0]).trace if traced else self.call
            call(given())
        except (ValueError, TypeError) as error:
            return type(error), str(error)
        raise AssertionError(f"{self.done}: nothing was raised.")


class Topic(NamedTuple):
    """Wrong calls of one function.

    Attributes:
      title: The heading.
      both: Calls that must fail alike with arrays and with tracers.
      traced: Calls made with tracers only.
    """

    title: str
    both: dict[str, Callable[[Given], Any]]
    traced: dict[str, Callable[[Given], Any]]

    @property
    def cases(self) -> list[Case]:
        traced = [Case(*item, (True,)) for item in self.traced.items()]
        return traced + [Case(*item, (False, True)) for item in self.both.items()]


class Modes(nnx.Module):
    """A module with a mode."""

    def __init__(self):
        self.layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(self.layer(x))


def own_loss(**changes):
    functions = {
        "value": lambda z, t: jnp.sum((z - t) ** 2, -1),
        "sample": lambda rng, z: z + jax.random.normal(rng, z.shape),
        "hessian_product": lambda z, v: 2 * v,
    }
    return Loss(**{"name": "own", **functions, **changes})


def of_one_pass(g):
    """The curvature of `value_and_grad`."""
    batch = {"x": g.x, "y": g.y}
    return value_and_grad(problem().loss)(g.params, batch)[2]


def restored(g):
    """A curvature with the rows of another window."""
    layers = g.curvature.with_window(3).layers
    return dataclasses.replace(g.curvature, layers=layers)


def estimating(loss="squared_error", fn=model_fn, **options):
    return lambda g: fisher_estimator(fn, loss, **options)


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
        made = {"curvature": g.curvature, "params": g.params, "inputs": g.x}
        made |= {"rng": g.key} | {name: make(g) for name, make in changes.items()}
        return problem().estimator.update(**made)

    return call


def new_update(fn=model_fn, loss="squared_error", inputs=None, at=None, **options):
    """``init`` and ``update`` of a new estimator; ``targets`` is of the second."""
    targets = options.pop("targets", None)

    def call(g):
        estimator = fisher_estimator(fn, loss, examples=4, window=1, **options)
        first = g.x if inputs is None else inputs(g)
        curvature = estimator.init(g.params, first)
        later = first if at is None else at(g)
        made = {"rng": g.key} if targets is None else {"targets": targets(g)}
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
