"""What goes wrong in training runs: a training step, and the cases that befall it.

A case is numbers by which one step's inputs are multiplied, so that one compiled step
serves them all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cgfac
from steps import TRANSFORMS, problem

NUM_EXAMPLES = 8


class Trouble(NamedTuple):
    """Factors of one step; ones are a good step.

    Attributes:
      x: Of every example of the batch.
      rows: Of every example as the captured rows see it, beside ``x``.
      same: 1 where every example is the first one.
      loss: Of the loss, and so of the gradients.
      value: Of the loss that is reported.
      hidden: Of the first layer's gradients.
      out: Of the last layer's gradients.
      entry: Of a single gradient.
    """

    x: Any = 1.0
    rows: Any = 1.0
    same: float = 0.0
    loss: float = 1.0
    value: float = 1.0
    hidden: float = 1.0
    out: float = 1.0
    entry: float = 1.0


def one_of(number, index=1):
    """Factors of the examples, all one but the second's."""
    return np.where(np.arange(NUM_EXAMPLES) == index, number, 1.0)


# Numbers that are not finite: the step is rejected, or the row is dropped, and counted.
POISON = {
    f"{bad} in {where}": make(float(bad))
    for bad in ("nan", "inf", "-inf")
    for where, make in {
        "all gradients": lambda bad: Trouble(hidden=bad, out=bad),
        "one layer's gradients": lambda bad: Trouble(out=bad),
        "one gradient": lambda bad: Trouble(entry=bad),
        "all rows": lambda bad: Trouble(rows=bad),
        "one row": lambda bad: Trouble(rows=one_of(bad)),
        "one example": lambda bad: Trouble(x=one_of(bad)),
        "the batch": lambda bad: Trouble(x=bad),
        "loss and gradients": lambda bad: Trouble(loss=bad),
    }.items()
}
# Only `cgfac` is told the loss.
LOSS = {f"{bad} in the loss": Trouble(value=float(bad)) for bad in ("nan", "inf")}
# Finite numbers from the ends of float32, and batches without information.
FINITE = {
    "no gradients": Trouble(hidden=0.0, out=0.0),
    "no gradients in one layer": Trouble(hidden=0.0),
    "a batch of zeros": Trouble(x=0.0),
    "rows of zeros": Trouble(rows=0.0),
    "one example eight times": Trouble(same=1.0),
} | {
    f"{what} times {scale:.0e}": Trouble(**{field: scale})
    for scale in (1e-38, 1e-30, 1e-22, 1e-10, 1e10, 1e22, 1e30, 1e38)
    for field, what in {
        "x": "inputs",
        "rows": "rows",
        "loss": "loss and gradients",
        "hidden": "one layer's gradients",
        "entry": "one gradient",
    }.items()
}
CASES = POISON | LOSS | FINITE


class Run(NamedTuple):
    """What one run did, every entry with one axis of steps."""

    params: Any
    rows: Any
    losses: jax.Array
    counted: jax.Array


def transformation(name):
    """A transform of `steps`, with the learning rate that it lacks."""
    tx = TRANSFORMS[name]()
    return tx if name.startswith("cgfac") else optax.chain(tx, optax.scale(-0.02))


def num_counted(opt_state):
    """How much the optimizer says it left out or replaced."""
    result = optax_cgfac.diagnostics(opt_state)
    counts = [result.get("num_rejected", jnp.zeros((), jnp.int32))]
    for layer in result["layers"].values():
        counts += [layer["num_replaced"], layer["num_dropped"]]
    return sum(counts)


def train_step(p, tx, state, trouble, rng):
    """One step of the README's kind, with something wrong."""
    params, opt_state, curvature = state
    x, y = p.batch["x"], p.batch["y"]

    def times(x, factor):
        factor = jnp.broadcast_to(jnp.asarray(factor, jnp.float32), NUM_EXAMPLES)
        return (x * factor[:, None]).astype(x.dtype)

    x = jnp.where(trouble.same > 0, x[:1], x)
    y = jnp.where(trouble.same > 0, y[:1], y)
    x = times(x, trouble.x)

    def loss_fn(params):
        return trouble.loss * p.loss(params, {"x": x, "y": y})

    value, grads = jax.value_and_grad(loss_fn)(params)
    grads = {
        name: jax.tree.map(lambda g, f=factor: (g * f).astype(g.dtype), grads[name])
        for name, factor in (("hidden", trouble.hidden), ("out", trouble.out))
    }
    kernel = grads["out"]["kernel"]
    entry = (kernel[1, 2] * trouble.entry).astype(kernel.dtype)
    grads["out"]["kernel"] = kernel.at[1, 2].set(entry)
    curvature = p.estimator.update(curvature, params, times(x, trouble.rows), rng=rng)
    updates, opt_state = tx.update(
        grads,
        opt_state,
        params,
        curvature=curvature,
        value=value * trouble.value,
        value_fn=lambda p: loss_fn(p) * trouble.value,
    )
    params = optax.apply_updates(params, updates)
    return (params, opt_state, curvature), value


def runner(p, tx):
    """``run(state, troubles) -> (state, Run)`` for troubles with an axis of steps."""

    @jax.jit
    def run(state, troubles):
        def body(state, given):
            index, trouble = given
            state, loss = train_step(p, tx, state, trouble, jax.random.key(index))
            params, opt_state, curvature = state
            rows = jax.tree.leaves(curvature.layers)
            return state, Run(params, rows, loss, num_counted(opt_state))

        count = len(troubles.same)
        return jax.lax.scan(body, state, (jnp.arange(count), troubles))

    return run


@functools.cache
def shared_runner(name):
    """The runner of a transform on the problem of `steps`, compiled once."""
    return runner(problem(), transformation(name))


def steps(*troubles):
    """Troubles one after the other, as a scan takes them."""
    full = [
        t._replace(
            x=np.broadcast_to(t.x, NUM_EXAMPLES),
            rows=np.broadcast_to(t.rows, NUM_EXAMPLES),
        )
        for t in troubles
    ]
    stacked = [np.asarray(x, np.float32) for x in zip(*full, strict=True)]
    return Trouble(*stacked)


# The steps of a sequence that are bad, and how many there are.
BAD, COUNT = slice(3, 5), 20


def sequence(trouble):
    """A run in which two steps are bad."""
    bad = range(COUNT)[BAD]
    return steps(*[trouble if i in bad else Trouble() for i in range(COUNT)])


def start(name):
    return problem().start(transformation(name))
