"""Wrong calls of ``estimator.update``: curvature, parameters, keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cgfac import fisher_estimator, value_and_grad
from steps import model_fn, problem
from wrong.calls import (
    INSIDE_INPUTS,
    PASS_TREE,
    Modes,
    update,
)
from wrong.case import topic

UPDATE = topic("`estimator.update`: curvature and parameters", "step")
wrong = UPDATE.add


_WITH_INIT = r"Call estimator\.update\(curvature, params, inputs, \.\.\.\)"
for _name, _curvature in (("`None`", None), ("a dict", {}), ("a tuple", (1, 2))):
    wrong(
        f"{_name} as the curvature",
        TypeError,
        update(curvature=lambda g, given=_curvature: given),
        r"takes the Curvature that estimator\.init returned",
        f"got {type(_curvature).__name__ if _curvature is not None else None}",
        _WITH_INIT,
    )
_OF_ITS_OWN = r"Call estimator\.init\(params, inputs\) of the one"
wrong(
    "the curvature of an estimator with other `examples`",
    ValueError,
    lambda g: fisher_estimator(model_fn, "squared_error", examples=2).update(
        g.curvature, g.params, g.x, rng=g.key
    ),
    "needs a curvature of its own estimator",
    "got one that comes from another estimator",
    _OF_ITS_OWN,
)
wrong(
    "the curvature of `value_and_grad`",
    ValueError,
    lambda g: problem().estimator.update(
        value_and_grad(problem().loss)(g.params, {"x": g.x, "y": g.y})[2],
        g.params,
        g.x,
        rng=g.key,
    ),
    "needs a curvature of its own estimator",
    r"or from value_and_grad \(window 1, layers hidden, out\)",
    _OF_ITS_OWN,
    mode="trace",
)
_PASS_RETURNED = r"Pass what estimator\.init or estimator\.update returned"
wrong(
    "a stack of curvatures",
    ValueError,
    update(curvature=lambda g: jax.tree.map(lambda leaf: leaf[None], g.curvature)),
    r"expected: \w+ \(8, 6\)",
    r"got: +\w+ \(1, 8, 6\)",
    _PASS_RETURNED,
)
wrong(
    "a curvature whose rows were cast",
    ValueError,
    update(
        curvature=lambda g: jax.tree.map(
            lambda x: x.astype(jnp.float16) if x.ndim else x, g.curvature
        )
    ),
    r"expected: float32 \(8, 6\)",
    r"got: +float16 \(8, 6\)",
    _PASS_RETURNED,
)
wrong(
    "a curvature with the rows of another window",
    ValueError,
    update(
        curvature=lambda g: dataclasses.replace(
            g.curvature, layers=g.curvature.with_window(3).layers
        )
    ),
    r"expected: float32 \(8, 6\)",
    r"got: +float32 \(12, 6\)",
    _PASS_RETURNED,
)
_AGAIN = r"The model has changed: call estimator\.init\(params, inputs\) again"
wrong(
    "parameters of a wider layer than at `init`",
    ValueError,
    update(params=lambda g: g.params | {"out": {"kernel": np.ones((4, 7))}}),
    r"expected: \(4, 3\)",
    r"got: +\(4, 7\)",
    _AGAIN,
)
wrong(
    "parameters with a layer more than at `init`",
    ValueError,
    update(params=lambda g: g.params | {"new": {"kernel": np.ones((4, 7))}}),
    "must have the parameters that estimator.init was given",
    "new: +new/kernel",
    _AGAIN,
)
wrong(
    "parameters with a layer less than at `init`",
    ValueError,
    update(params=lambda g: {"out": g.params["out"]}),
    "must have the parameters that estimator.init was given",
    "absent: hidden/bias, hidden/kernel",
    _AGAIN,
)
wrong(
    "all variables, where `init` was given the parameters",
    ValueError,
    update(params=lambda g: {"params": g.params}),
    "absent: hidden/bias",
    "new: +params/hidden/bias",
    _AGAIN,
)


def in_double_precision(g):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), g.params)
        return update(params=lambda g: params)(g)


wrong(
    "float64 parameters, which were float32 at `init`",
    ValueError,
    in_double_precision,
    "the curvature was initialised for float32",
    "has dtype float64",
    "Cast the parameters",
    mode="build",
)
wrong(
    "integers as parameters",
    TypeError,
    update(params=lambda g: jax.tree.map(lambda x: x.astype(int), g.params)),
    "must be real floating-point arrays",
    "has dtype int32",
    INSIDE_INPUTS,
)
wrong(
    "no parameters",
    ValueError,
    update(params=lambda g: None),
    "params has no leaves",
    "got None",
    PASS_TREE,
)


def changed_mode(g):
    module = Modes()
    estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
    curvature = estimator.init(module, g.x)
    module.eval()
    return estimator.update(curvature, module, g.x, rng=g.key)


wrong(
    "an `nnx.Module` whose mode was changed after `init`",
    ValueError,
    changed_mode,
    "another structure than the one given to estimator.init",
    "got: +.*deterministic",
    "Set modes inside model_fn",
    mode="trace",
)


def of_module(at_init, at_update):
    def call(g):
        module = Modes()
        estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
        curvature = estimator.init(at_init(module), g.x)
        return estimator.update(curvature, at_update(module), g.x, rng=g.key)

    return call


wrong(
    "the state of the `nnx.Module` that `init` was given",
    TypeError,
    of_module(lambda module: module, lambda module: nnx.state(module, nnx.Param)),
    r"params must be the nnx\.Module itself",
    r"got its nnx\.State",
    "Pass the module",
    mode="trace",
)

KEYS = topic("`estimator.update`: keys", "step")
wrong = KEYS.add
_NEW_KEY = r"pass rng=jax\.random\.fold_in\(key, step\)"
wrong(
    "no key for `kind='mc'`",
    ValueError,
    update(rng=lambda g: None),
    "draws targets from the model and needs a key",
    "got None",
    _NEW_KEY,
)
for _name, _key, _got in (
    ("a seed", 0, "0"),
    ("a text", "key", "'key'"),
    ("a dict of keys", {"params": 0}, "dict"),
    ("an array of numbers", np.zeros(2, np.float32), "a float32 array of shape"),
    ("half a key of the old kind", np.zeros(1, np.uint32), "a uint32 array of shape"),
    (
        "a key of the old kind as int32",
        np.zeros(2, np.int32),
        "an int32 array of shape",
    ),
):
    wrong(
        f"{_name} in the place of the key",
        TypeError,
        update(rng=lambda g, key=_key: key),
        "rng must be a key",
        f"got {_got}",
        _NEW_KEY,
    )
wrong(
    "an `nnx.Rngs` in the place of the key",
    TypeError,
    update(rng=lambda g: nnx.Rngs(0)),
    "rng must be a key",
    "got Rngs",
    r"pass rng=.* or rng=rngs\(\)",
)
_ONE_OF_THEM = r"pass one of them, rng=keys\[step\]"
wrong(
    "several keys",
    ValueError,
    update(rng=lambda g: jax.random.split(g.key, 3)),
    "rng must be one key",
    r"got an array of \(3,\) of them",
    _ONE_OF_THEM,
)
wrong(
    "several keys of the old kind",
    ValueError,
    update(rng=lambda g: np.zeros((3, 2), np.uint32)),
    "rng must be one key",
    r"got an array of \(3,\) of them",
    _ONE_OF_THEM,
)
wrong(
    "the key that the inputs hold for dropout",
    ValueError,
    update(inputs=lambda g: {"x": g.x, "dropout": g.key}),
    "rng must be a key of its own",
    "got one that inputs hold too",
    "Split it before",
)

TOPICS = [UPDATE, KEYS]
