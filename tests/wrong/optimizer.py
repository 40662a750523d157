"""Wrong calls of `cgfac`, `scale_by_cgfac` and `scale_by_kfac`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core, nnx
from flax import linen as nn

from models import Compact
from optax_cgfac import cgfac, fisher_estimator, scale_by_cgfac, scale_by_kfac
from steps import problem, value_fn
from wrong.case import BLOCK, CURVATURES, Topic, estimating, of_one_pass, own_loss, step


def make(factory, *args, **options):
    return lambda g: factory(*args, **options)


OPTIONS = {
    "`cgfac(learning_rate=-0.1)`": make(cgfac, -0.1),
    "`scale_by_cgfac('auto')`": make(scale_by_cgfac, "auto"),
    "`scale_by_kfac(nan)`": make(scale_by_kfac, np.nan),
    "several numbers as the damping": make(scale_by_kfac, np.ones(2)),
    "`cgfac(0.1, momentum=1.0)`": make(cgfac, 0.1, momentum=1.0),
    "`scale_by_cgfac(0.1, max_steps=0)`": make(scale_by_cgfac, 0.1, max_steps=0),
    "a schedule as `momentum`": make(cgfac, 0.1, momentum=lambda count: 0.1),
    "a schedule of two arguments": make(cgfac, lambda count, loss: 0.1),
    "`min_damping` above `max_damping`": make(cgfac, min_damping=2.0, max_damping=1.0),
    "a damping above `max_damping`": make(cgfac, damping=1e9, max_damping=1e4),
    "an initial damping of 0": make(cgfac, damping=0.0),
    "a schedule of dampings without a rate": make(cgfac, damping=lambda count: 0.1),
    "`kl_clip` without a learning rate": make(cgfac, kl_clip=1e-3),
    "`fallback` without `where`": make(cgfac, fallback=optax.sgd(0.1)),
    "`where` without `fallback`": make(cgfac, where=lambda path: True),
    "`fallback=0.1`": make(cgfac, fallback=0.1, where=lambda path: True),
    "`structure='diagonal'`": make(cgfac, structure="diagonal"),
    "Cholesky with Tikhonov damping": make(scale_by_cgfac, 0.1, solver="cholesky"),
    "`structure='block'` with factored damping": make(
        scale_by_cgfac, 0.1, structure="block", damping_form="factored"
    ),
    "no parameters in `tx.init`": lambda g: cgfac().init(None),
    "an integer among the parameters of `tx.init`": lambda g: scale_by_cgfac(0.1).init(
        g.params | {"steps": jnp.zeros((), jnp.int32)}
    ),
}


def cast(dtype):
    return lambda g: jax.tree.map(lambda x: x.astype(dtype), g.grads)


def state_of(tx, **changes):
    return lambda g: tx.init(g.params | changes)


WIDER = {"out": {"kernel": np.ones((4, 7), np.float32)}}
SOME = {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}}
TREES = {
    "gradients of some parameters": step(grads=lambda g: {"out": g.grads["out"]}),
    "gradients as a `FrozenDict`": step(grads=lambda g: core.freeze(g.grads)),
    "a gradient of another shape than its parameter": step(
        grads=lambda g: g.grads | {"out": {"kernel": g.grads["out"]["kernel"].T}}
    ),
    "integers as gradients": step(grads=cast(jnp.int32)),
    "no parameters for `cgfac`": step(params=lambda g: None),
    "parameters of another structure": step(params=lambda g: {"params": g.params}),
    "parameters of another dtype than at `tx.init`": step(
        params=lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g.params)
    ),
    "the state before the gradients": step(state=lambda g: g.grads),
    "a state that was restored as a dict": step(
        "scale_by_kfac", state=lambda g: scale_by_kfac(0.1).init(g.params)._asdict()
    ),
    "the state of parameters of other shapes": step(state=state_of(cgfac(), **WIDER)),
    "the state of fewer parameters": step(
        "scale_by_kfac", state=lambda g: scale_by_kfac(0.1).init({"out": g.x})
    ),
    "`optax.masked` around `cgfac` without a learning rate": step(
        lambda: optax.masked(cgfac(), SOME)
    ),
}


def of_module(value_fn):
    def call(g):
        module = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        curvature = estimating(fn=lambda m, x: m(x), examples=4)(g).init(module, g.x)
        grads = nnx.grad(lambda m: jnp.mean(m(g.x) ** 2))(module)
        optimizer = nnx.Optimizer(module, cgfac(), wrt=nnx.Param)
        optimizer.update(
            module, grads, curvature=curvature, value=g.value, value_fn=value_fn
        )

    return call


LOSSES = {
    "no `value` without a learning rate": step(value=lambda g: None),
    "no `value_fn` without a learning rate": step(value_fn=lambda g: None),
    "the losses of the examples as `value`": step(value=lambda g: g.y[:, 0]),
    "`(loss, aux)` as `value`": step(value=lambda g: (g.value, {})),
    "the loss itself as `value_fn`": step(value_fn=lambda g: g.value),
    "a `value_fn` of two arguments": step(value_fn=lambda g: lambda p, batch: 0.0),
}
LOSSES_TRACED = {
    "a `value_fn` that returns `(loss, aux)`": step(
        value_fn=lambda g: lambda p: (0, p)
    ),
    "a `value_fn` of the `nnx.Module`, instead of its state": of_module(
        lambda module: jnp.mean(module(jnp.ones((8, 5))) ** 2)
    ),
    "a schedule that returns nothing": step(lambda: scale_by_kfac(lambda count: None)),
}


def of_another_model(g):
    def model_fn(params, x):
        return Compact().apply({"params": params}, x)

    params = Compact().init(g.key, g.x)["params"]
    return fisher_estimator(model_fn, "squared_error", examples=4).init(params, g.x)


def changed(name, change):
    """All trees are of a model that has changed; the curvature is not."""

    def call(g):
        params, tx = g.params | change, BLOCK[name]()
        more = {"curvature": g.curvature, "value": g.value, "value_fn": value_fn}
        return tx.update(params, tx.init(params), params, **more)

    return call


def sampled_positions(g):
    x = jnp.stack([g.x] * 3, 1)
    layer = nn.Dense(3)
    params = layer.init(g.key, x)["params"]
    estimator = fisher_estimator(
        lambda p, x: layer.apply({"params": p}, x), "squared_error", examples=4
    )
    tx = scale_by_cgfac(0.1, structure="block")
    return tx.update(params, tx.init(params), curvature=estimator.init(params, x))


def summing(g):
    loss = own_loss(hessian_product=lambda z, v: 2 * v.sum())
    return estimating(loss, examples=4)(g).init(g.params, g.x)


NEW = {"new": {"w": np.ones((2, 2), np.float32)}}
USES = {
    **{f"no curvature for `{x}`": step(x, curvature=lambda g: None) for x in BLOCK},
    "the estimator as the curvature": step(curvature=lambda g: problem().estimator),
    **{name: step(curvature=make) for name, make in CURVATURES.items()},
}
USES_TRACED = {
    "another model's curvature": step(curvature=of_another_model),
    "another model's curvature for `scale_by_cgfac`": step(
        "scale_by_cgfac", curvature=of_another_model
    ),
    "a layer made wider since `estimator.init`": changed("cgfac", WIDER),
    "a layer added since `estimator.init`": changed("cgfac", NEW),
    "a layer added, in `scale_by_cgfac`": changed("scale_by_cgfac", NEW),
    "the curvature of `value_and_grad`, without a rate": step(curvature=of_one_pass),
    "`structure='block'` with a few positions of each example": sampled_positions,
    "a loss whose `hessian_product` sums": step(curvature=summing),
}

TOPICS = [
    Topic("`cgfac`, `scale_by_cgfac`, `scale_by_kfac`: options", {}, OPTIONS),
    Topic("`tx.update`: gradients, parameters and state", TREES, {}),
    Topic("`tx.update`: the loss, schedules", LOSSES, LOSSES_TRACED),
    Topic("`tx.update`: the curvature", USES, USES_TRACED),
]
