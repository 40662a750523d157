"""Wrong calls of ``tx.update``: the curvature."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from models import Compact
from optax_cgfac import (
    fisher_estimator,
    scale_by_cgfac,
    value_and_grad,
)
from steps import model_fn, problem, value_fn
from wrong.calls import BLOCK, step
from wrong.case import topic
from wrong.estimator_options import own_loss

CURVATURES = topic("`tx.update`: the curvature", "step")
wrong = CURVATURES.add
for _name in BLOCK:
    wrong(
        f"no curvature for `{_name}`",
        ValueError,
        step(_name, curvature=lambda g: None),
        r"update\(\) needs the curvature of this step",
        "got None",
        r"curvature = estimator\.update\(curvature, params, inputs, rng=rng\).*"
        r"tx\.update\(.*nnx\.Optimizer.*optimizer\.update\(",
    )
for _name, _curvature in (("a dict", {}), ("the estimator", problem)):
    _given = _curvature().estimator if callable(_curvature) else _curvature
    wrong(
        f"{_name} as the curvature",
        TypeError,
        step("scale_by_cgfac", curvature=lambda g, given=_given: given),
        "curvature must be an optax_cgfac.Curvature",
        f"got {type(_given).__name__}",
        r"Pass curvature=estimator\.update",
    )
_PASS_RETURNED = r"Pass what estimator\.init or estimator\.update returned"
wrong(
    "a stack of curvatures",
    ValueError,
    step(curvature=lambda g: jax.tree.map(lambda leaf: leaf[None], g.curvature)),
    r"expected: \w+ \(8, 6\)",
    r"got: +\w+ \(1, 8, 6\)",
    _PASS_RETURNED,
)
wrong(
    "a curvature with the rows of another window",
    ValueError,
    step(
        "scale_by_kfac",
        curvature=lambda g: dataclasses.replace(
            g.curvature, layers=g.curvature.with_window(3).layers
        ),
    ),
    r"expected: float32 \(8, 6\)",
    r"got: +float32 \(12, 6\)",
    _PASS_RETURNED,
)


def compact(params, x):
    return Compact().apply({"params": params}, x)


def of_another_model(g):
    params = Compact().init(g.key, g.x)["params"]
    return fisher_estimator(compact, "squared_error", examples=4).init(params, g.x)


for _name in BLOCK:
    _whole = _name == "cgfac"
    wrong(
        f"another model's curvature for `{_name}`",
        ValueError,
        step(_name, curvature=of_another_model),
        "No curvature and no fallback" if _whole else r"curvature: Dense_0, Dense_1",
        "for: hidden/bias" if _whole else "gradients: hidden/bias",
        "Pass cgfac" if _whole else r"Call estimator\.init\(params, inputs\)",
        mode="trace",
    )


def changed(name, change):
    """All trees are of a model that has changed; the curvature is not."""

    def call(g):
        params, tx = change(g), BLOCK[name]()
        return tx.update(
            params,
            tx.init(params),
            params,
            curvature=g.curvature,
            value=g.value,
            value_fn=value_fn,
        )

    return call


for _name in BLOCK:
    wrong(
        f"a layer made wider since `estimator.init`, in `{_name}`",
        ValueError,
        changed(_name, lambda g: g.params | {"out": {"kernel": jnp.ones((4, 7))}}),
        r"was initialised for \(4, 3\)",
        r"'out/kernel' has shape \(4, 7\)",
        r"Call estimator\.init\(params, inputs\) again",
        mode="trace",
    )
wrong(
    "a layer added since `estimator.init`, in `scale_by_cgfac`",
    ValueError,
    changed("scale_by_cgfac", lambda g: g.params | {"new": {"w": jnp.ones((2, 2))}}),
    "that the curvature was not initialised with",
    "with: new/w",
    r"Call estimator\.init\(params, inputs\) with the parameters",
    mode="trace",
)
wrong(
    "a layer added since `estimator.init`, in `cgfac`",
    ValueError,
    changed("cgfac", lambda g: g.params | {"new": {"w": jnp.ones((2, 2))}}),
    "No curvature and no fallback",
    "for: new/w",
    "Pass cgfac",
    mode="trace",
)
wrong(
    "the curvature of `value_and_grad`, without a learning rate",
    ValueError,
    step(
        curvature=lambda g: value_and_grad(problem().loss)(
            g.params, {"x": g.x, "y": g.y}
        )[2]
    ),
    "need the curvature of fisher_estimator, which keeps the model",
    "With value_and_grad",
    r"pass cgfac\(learning_rate=",
    mode="trace",
)


class OverTime(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.tanh(nn.Dense(4, name="hidden")(x)))


def sampled_positions(g):
    x = jnp.stack([g.x] * 3, 1)
    params = OverTime().init(g.key, x)["params"]
    estimator = fisher_estimator(
        lambda p, x: OverTime().apply({"params": p}, x), "squared_error", examples=4
    )
    tx = scale_by_cgfac(0.1, structure="block")
    curvature = estimator.init(params, x)
    return tx.update(params, tx.init(params), params, curvature=curvature)


wrong(
    "`structure='block'` with a few positions of each example",
    ValueError,
    sampled_positions,
    "its exact Fisher block needs all",
    "Layer 'hidden' keeps some of an example's positions",
    r"Pass fisher_estimator\(\.\.\., positions=None",
    mode="trace",
)
wrong(
    "`solve_axis` without a mesh",
    ValueError,
    step(lambda: scale_by_cgfac(0.1, solve_axis="layers")),
    "solve_axis='layers' is no axis of a mesh here",
    "there are none",
    r"Call update\(\) under jax\.set_mesh",
    mode="trace",
)
wrong(
    "a loss of one's own whose `hessian_product` sums",
    ValueError,
    lambda g: step(
        curvature=lambda g: fisher_estimator(
            model_fn,
            own_loss(hessian_product=lambda z, v: 2 * v.sum()),
            examples=4,
        ).init(g.params, g.x)
    )(g),
    r"expected \(8, 3\)",
    r"hessian_product\(outputs, tangents\) has shape \(\)",
    "Return an array of that shape",
    mode="trace",
)

TOPICS = [CURVATURES]
