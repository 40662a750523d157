"""Wrong calls of `cgfac`, `scale_by_cgfac` and `scale_by_kfac`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac
from steps import problem, value_fn
from wrong.case import BLOCK, Topic, estimating, of_one_pass, own_loss, restored, step


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
    "`structure='diagonal'`": make(cgfac, structure="diagonal"),
    "Cholesky with Tikhonov damping": make(scale_by_cgfac, 0.1, solver="cholesky"),
    "`structure='block'` with factored damping": make(
        scale_by_cgfac, 0.1, structure="block", damping_form="factored"
    ),
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
    "integers as gradients": step(grads=cast(jnp.int32)),
    "no parameters for `cgfac`": step(params=lambda g: None),
    "parameters of another structure": step(params=lambda g: {"params": g.params}),
    "the state of parameters of other shapes": step(state=state_of(cgfac(), **WIDER)),
    "`optax.masked` around `cgfac` without a learning rate": step(
        lambda: optax.masked(cgfac(), SOME)
    ),
}


LOSSES = {
    "no `value` without a learning rate": step(value=lambda g: None),
    "no `value_fn` without a learning rate": step(value_fn=lambda g: None),
    "the losses of the examples as `value`": step(value=lambda g: g.y[:, 0]),
    "`(loss, aux)` as `value`": step(value=lambda g: (g.value, {})),
}
LOSSES_TRACED = {
    "a `value_fn` that returns `(loss, aux)`": step(
        value_fn=lambda g: lambda p: (0, p)
    ),
    "a schedule that returns nothing": step(lambda: scale_by_kfac(lambda count: None)),
}


def changed(name, change):
    """All trees are of a model that has changed; the curvature is not."""

    def call(g):
        params, tx = g.params | change, BLOCK[name]()
        more = {"curvature": g.curvature, "value": g.value, "value_fn": value_fn}
        return tx.update(params, tx.init(params), params, **more)

    return call


def summing(g):
    loss = own_loss(hessian_product=lambda z, v: 2 * v.sum())
    return estimating(loss, examples=4)(g).init(g.params, g.x)


NEW = {"new": {"w": np.ones((2, 2), np.float32)}}
USES = {
    **{f"no curvature for `{x}`": step(x, curvature=lambda g: None) for x in BLOCK},
    "the estimator as the curvature": step(curvature=lambda g: problem().estimator),
    "a curvature restored with the rows of another window": step(curvature=restored),
}
USES_TRACED = {
    "a layer made wider since `estimator.init`": changed("cgfac", WIDER),
    "a layer added since `estimator.init`": changed("cgfac", NEW),
    "a layer added, in `scale_by_cgfac`": changed("scale_by_cgfac", NEW),
    "the curvature of `value_and_grad`, without a rate": step(curvature=of_one_pass),
    "a loss whose `hessian_product` sums": step(curvature=summing),
}

TOPICS = [
    Topic("`cgfac`, `scale_by_cgfac`, `scale_by_kfac`: options", {}, OPTIONS),
    Topic("`tx.update`: gradients, parameters and state", TREES, {}),
    Topic("`tx.update`: the loss, schedules", LOSSES, LOSSES_TRACED),
    Topic("`tx.update`: the curvature", USES, USES_TRACED),
]
