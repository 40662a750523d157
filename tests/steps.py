"""A small problem and the training steps that the contract tests share."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import optax_cgfac
from training import squared_error, train_step

TRANSFORMS = {
    "cgfac": lambda: optax_cgfac.cgfac(damping_interval=2),
    "cgfac by cg": lambda: optax_cgfac.cgfac(solver="cg", damping_interval=2),
    "cgfac with a learning rate": lambda: optax_cgfac.cgfac(
        0.1, momentum=0.9, kl_clip=1e-2, l2=1e-3
    ),
    "scale_by_cgfac": lambda: optax_cgfac.scale_by_cgfac(0.1),
    "scale_by_cgfac on parameters": lambda: optax_cgfac.scale_by_cgfac(
        0.1, space="parameter"
    ),
    "scale_by_kfac": lambda: optax_cgfac.scale_by_kfac(0.1),
}


class MLP(nn.Module):
    """Two layers, one with a bias and one without."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="hidden")(x))
        return nn.Dense(3, use_bias=False, name="out")(x)


class Problem(NamedTuple):
    """Squared error of a small network on eight examples."""

    estimator: optax_cgfac.CurvatureEstimator
    params: Any
    batch: dict[str, jax.Array]
    weight: float = 1.0

    def loss(self, params, batch):
        return self.weight * squared_error(model_fn(params, batch["x"]), batch["y"])

    def curvature(self):
        return self.estimator.init(self.params, self.batch["x"])

    def start(self, tx):
        return self.params, tx.init(self.params), self.curvature()

    def step(self, tx):
        """``(state, batch, rng) -> (state, loss)``, as in the README."""
        return train_step(tx, self.estimator, self.loss)


def model_fn(params, x):
    return MLP().apply({"params": params}, x)


def make_problem(dtype=jnp.float32, **options) -> Problem:
    options = {"examples": 4, "window": 2, "model_examples": 8} | options
    x = jax.random.normal(jax.random.key(0), (8, 5), dtype)
    y = jax.random.normal(jax.random.key(1), (8, 3), dtype)
    params = jax.jit(MLP().init)(jax.random.key(2), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    estimator = optax_cgfac.fisher_estimator(model_fn, "squared_error", **options)
    return Problem(estimator, params, {"x": x, "y": y})


class Ingredients(NamedTuple):
    """What one ``tx.update`` takes."""

    grads: Any
    params: Any
    curvature: optax_cgfac.Curvature
    value: jax.Array


@functools.cache
def problem() -> Problem:
    return make_problem()


@functools.cache
def ingredients(num_updates=2) -> Ingredients:
    """Gradients and a curvature whose window is full."""
    p = problem()

    @jax.jit
    def make(params, curvature):
        value, grads = jax.value_and_grad(p.loss)(params, p.batch)
        for i in range(num_updates):
            rng = jax.random.key(i)
            curvature = p.estimator.update(curvature, params, p.batch["x"], rng=rng)
        return Ingredients(grads, params, curvature, value)

    return make(p.params, p.curvature())


def with_rows(a=1.0, g=1.0, layers=None):
    """The curvature with its rows, or others, in other units."""
    curvature = ingredients().curvature
    layers = {
        name: rows._replace(a=a * rows.a, g=g * rows.g)
        for name, rows in (layers or curvature.layers).items()
    }
    return dataclasses.replace(curvature, layers=layers)


def run(p: Problem, tx, num_steps, start=None):
    """``(state, losses)`` of a scan over steps."""
    step = p.step(tx)

    def body(state, seed):
        return step(state, p.batch, jax.random.key(seed))

    start = p.start(tx) if start is None else start
    return jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(num_steps)))(start)


def value_fn(params):
    return problem().loss(params, problem().batch)


def updating(tx, **extra):
    """``tx.update`` as a function of state and ingredients."""

    def run(opt_state, given):
        more = {"curvature": given.curvature, "value": given.value}
        more |= {"value_fn": value_fn} | extra
        return tx.update(given.grads, opt_state, given.params, **more)

    return run


def update(tx, opt_state, given: Ingredients | None = None, extra=None, **changes):
    """``tx.update`` on the ingredients, compiled."""
    given = (ingredients() if given is None else given)._replace(**changes)
    return jax.jit(updating(tx, **(extra or {})))(opt_state, given)


def first(tx, extra=None, **changes):
    """The first update."""
    return update(tx, tx.init(ingredients().params), None, extra, **changes)


def abstract_update(tx, **extra):
    """The shapes of the first update, which is not compiled."""
    given = ingredients()
    return jax.eval_shape(updating(tx, **extra), tx.init(given.params), given)
