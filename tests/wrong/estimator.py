"""Wrong calls of `fisher_estimator`, of its two functions, and of `Loss`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_cgfac import fisher_estimator
from steps import MLP, model_fn
from wrong.case import (
    CURVATURES,
    Modes,
    Topic,
    estimating,
    init,
    new_update,
    of_one_pass,
    own_loss,
    update,
)

TWO = ("squared_error", "squared_error")


def two(params, x):
    return model_fn(params, x), model_fn(params, x)


OPTIONS = {
    "a Linen module as `model_fn`": estimating(fn=MLP()),
    "a module's class as `model_fn`": estimating(fn=MLP),
    "a `model_fn` of three arguments": estimating(fn=lambda params, x, mask: x),
    "an unknown loss": estimating("mse"),
    "a function as the loss": estimating(optax.squared_error),
    "`kind='fisher'`": estimating(kind="fisher"),
    "`window=0`": estimating(window=0),
    "`kind='exact'`, no `hessian_columns`": estimating(own_loss(), kind="exact"),
    "a text as `where`": estimating(where="Dense"),
    "`refresh_every=8` and `rank=None`": estimating(rank=None, refresh_every=8),
    "`whole_batch` and `model_examples=4`": estimating(
        whole_batch=True, model_examples=4
    ),
    "`1` in `input_axes`": estimating(input_axes={"x": 1}),
    "`rows_dtype='int32'`": estimating(rows_dtype="int32"),
    "`weights` of two arguments": estimating(weights=lambda params, inputs: inputs),
    "`Loss(weight=-1.0)`": lambda g: own_loss(weight=-1.0),
    "a loss whose `value` takes outputs only": lambda g: own_loss(value=lambda z: z),
}


def outputs(change, **options):
    """``init`` with a model whose outputs are changed."""
    return init(fn=lambda p, x: change(model_fn(p, x)), **options)


def adding(make):
    """``init`` with more parameters."""
    return init(lambda g: g.params | make(g))


def calling(make):
    """``init`` of a function that calls a module, with what is made of one."""
    return init(lambda g: make(Modes()), fn=lambda module, x: module(x))


INIT = {
    "`None` as the parameters": init(lambda g: None),
    "the inputs before the parameters": init(lambda g: g.x, lambda g: g.params),
    "an integer as a parameter": adding(lambda g: {"steps": np.zeros(3, np.int32)}),
    "the state of an `nnx.Module` that has more than parameters": calling(nnx.state),
    "the state of an `nnx.Module` for a `model_fn` that calls a module": calling(
        lambda module: nnx.state(module, nnx.Param)
    ),
    "an empty batch": init(inputs=lambda g: g.x[:0]),
    "fewer examples than `examples`": init(inputs=lambda g: g.x[:3]),
    "a `model_fn` that returns the loss": outputs(lambda z: z.sum()),
    "a `model_fn` that returns a number for each example": outputs(lambda z: z[:, 0]),
    "a `model_fn` that returns classes": outputs(lambda z: z.argmax(-1)[:, None]),
    "a `model_fn` that returns updated statistics too": outputs(lambda z: (z, {})),
    "a tuple of losses for one output": init(loss=TWO),
    "two outputs of other lengths": outputs(lambda z: (z, z[:4]), loss=TWO),
    "outputs whose first axis is not the batch": outputs(lambda z: z.T[:2], examples=2),
    "`input_axes` None for all inputs": init(input_axes=None),
    "a `where` that is never true": init(where=lambda path: "Dense" in path),
    "a `where` for a bias without its kernel": init(where=lambda path: "bias" in path),
    "`input_axes` 0 for a leaf without examples": init(
        inputs=lambda g: {"x": g.x, "scale": g.x[0]},
        fn=lambda p, inputs: model_fn(p, inputs["x"]),
        input_axes=0,
    ),
    "a parameter that no layer reads": adding(lambda g: {"old": {"kernel": g.x}}),
    # A new function every time: JAX remembers what it has traced.
    "a `model_fn` that is jitted": lambda g: init(
        fn=jax.jit(lambda p, x: MLP().apply({"params": p}, x))
    )(g),
}


def in_double_precision(g):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), g.params)
        return update(params=lambda g: params)(g)


def of_module(change):
    """``update`` with what a function makes of the module of ``init``."""

    def call(g):
        module = Modes()
        estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
        curvature = estimator.init(module, g.x)
        return estimator.update(curvature, change(module), g.x, rng=g.key)

    return call


def evaluating(module):
    module.eval()
    return module


def more(name):
    return lambda g: g.params | {name: {"kernel": np.ones((4, 7))}}


UPDATE = {
    "`None` as the curvature": update(curvature=lambda g: None),
    "the curvature of another estimator": update(
        curvature=lambda g: estimating(examples=2)(g).init(g.params, g.x)
    ),
    **{name: update(curvature=make) for name, make in CURVATURES.items()},
    "parameters of a wider layer than at `init`": update(params=more("out")),
    "parameters with a layer more than at `init`": update(params=more("new")),
    "all variables as parameters": update(params=lambda g: {"params": g.params}),
}
UPDATE_TRACED = {
    "float64 parameters, which were float32 at `init`": in_double_precision,
    "the curvature of `value_and_grad`": update(curvature=of_one_pass),
    "an `nnx.Module` whose mode was changed after `init`": of_module(evaluating),
    "the state of the `nnx.Module` that `init` was given": of_module(
        lambda module: nnx.state(module, nnx.Param)
    ),
}

KEYS = {
    "no key for `kind='mc'`": update(rng=lambda g: None),
    "the key of the inputs": update(inputs=lambda g: {"x": g.x, "dropout": g.key}),
}


def empirical(targets, loss="softmax_cross_entropy", fn=model_fn):
    return new_update(fn, loss, kind="empirical", targets=targets)


BATCHES = {
    "inputs of another shape": update(inputs=lambda g: g.x[:, :4]),
    "inputs of another dtype": update(inputs=lambda g: g.x.astype(jnp.bfloat16)),
    "inputs of another structure": update(inputs=lambda g: {"x": g.x}),
    "a smaller batch than the curvature keeps": update(inputs=lambda g: g.x[:6]),
    "a batch without examples": update(inputs=lambda g: g.x[:0]),
    "`targets` for `kind='mc'`": update(targets=lambda g: g.y),
}
BATCHES_TRACED = {
    "leaves of inputs of other numbers of examples": new_update(
        fn=lambda p, inputs: model_fn(p, inputs[0]),
        inputs=lambda g: (g.x, g.x),
        at=lambda g: (g.x, jnp.concatenate([g.x, g.x])),
    ),
    "no `targets` for `kind='empirical'`": new_update(kind="empirical"),
    "targets of fewer examples": empirical(lambda g: g.y[:7], "squared_error"),
    "targets of another rank": empirical(lambda g: g.y[:, :1].astype(int)),
    "a list of numbers as targets": empirical(lambda g: [0] * 8),
    "one array of targets for two outputs": empirical(lambda g: g.y, TWO, two),
    "weights that do not fit the outputs": new_update(weights=lambda x: x[:7, 0]),
    "`weights` that return nothing": new_update(weights=lambda x: None),
    "three weights for two outputs": new_update(two, TWO, weights=lambda x: (x,) * 3),
    "a loss whose `value` sums over examples": new_update(
        loss=own_loss(value=lambda z, t: jnp.sum((z - t) ** 2))
    ),
    "a loss whose `hessian_columns` are transposed": new_update(
        loss=own_loss(hessian_columns=lambda z: jnp.ones((*z.shape, 3))), kind="exact"
    ),
    "`axis_name` outside of a map over such an axis": new_update(axis_name="batch"),
}

TOPICS = [
    Topic("`fisher_estimator` and `Loss`: their options", {}, OPTIONS),
    Topic("`estimator.init`", INIT, {}),
    Topic("`estimator.update`: curvature and parameters", UPDATE, UPDATE_TRACED),
    Topic("`estimator.update`: keys", KEYS, {}),
    Topic("`estimator.update`: inputs, targets, weights", BATCHES, BATCHES_TRACED),
]
