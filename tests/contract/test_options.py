"""Every option is used or refused, in every mode: none is accepted and ignored."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from optax_cgfac import cgfac, fisher_estimator, scale_by_cgfac, scale_by_kfac
from steps import ingredients, updating


def model_fn(params, x):
    """Layers with and without positions, and a parameter of none."""
    layer = nn.Dense(5, use_bias=False)
    hidden = nn.tanh(layer.apply({"params": params["hidden"]}, x)).mean(1)
    return layer.apply({"params": params["out"]}, hidden) + params["shift"]


# Two values of every option.
SOLVE = {
    "structure": ("kronecker", "block"),
    "damping_form": ("tikhonov", "factored"),
    "space": ("parameter", "sample"),
    "solver": ("cg", "cholesky"),
    "max_steps": (3, 4),
    "rtol": (0.1, 0.2),
    "warm_start": (True, False),
    "damping": (0.1, 0.2),
}
ADAPT = {
    "learning_rate": (0.1, 0.2),
    "momentum": (0.5, 0.6),
    "l2": (0.1, 0.2),
    "kl_clip": (0.1, 0.2),
    "fallback": (optax.sgd(0.1), optax.sgd(0.2)),
    "where": (lambda path: "out" in path, lambda path: "hidden" in path),
    "damping_decay": (0.5, 0.6),
    "damping_interval": (2, 3),
    "model_interval": (2, 3),
    "min_damping": (0.01, 0.02),
    "max_damping": (100.0, 200.0),
}
ESTIMATOR = {
    "model_fn": (model_fn, lambda params, x: 2 * model_fn(params, x)),
    "loss": ("squared_error", "sigmoid_binary_cross_entropy"),
    "kind": ("mc", "exact"),
    "window": (2, 3),
    "examples": (4, 5),
    "model_examples": (6, 7),
    "where": (None, lambda path: "out" in path),
    "fallback": (False, True),
    "input_axes": ("auto", None),
    "whole_batch": (False, True),
    "weight_sharing": ("expand", "reduce"),
    "positions": (1, 2),
    "rows_dtype": ("float32", "float16"),
    "rank": (1, 2),
    "refresh_every": (2, 3),
    "capture_every": (2, 3),
    "reduction": ("mean", "sum"),
    "weights": (None, lambda x: x[:, 0, 0]),
    "axis_name": (None, "batch"),
}
SOLVERS = {
    "": {},
    "cg": {"solver": "cg"},
    "tikhonov": {"damping_form": "tikhonov"},
    "parameter": {"space": "parameter"},
    "sample": {"damping_form": "tikhonov", "space": "sample"},
    "block": {"structure": "block"},
    "block by cholesky": {"structure": "block", "solver": "cholesky"},
    "full": {"structure": "full"},
}
MODES = {
    scale_by_kfac: {"": {"damping": 0.1}},
    scale_by_cgfac: {k: {"damping": 0.1} | mode for k, mode in SOLVERS.items()},
    cgfac: {f"rate {k}": {"learning_rate": 0.1} | m for k, m in SOLVERS.items()}
    | {name: SOLVERS[name] for name in ("", "cg", "block by cholesky")}
    | {"fallback": {name: ADAPT[name][0] for name in ("fallback", "where")}},
    fisher_estimator: {
        "mc": {},
        "exact": {"kind": "exact"},
        "whole batch": {"whole_batch": True},
        "reduce": {"weight_sharing": "reduce"},
        "all rows": {"rank": None},
        "all positions": {"positions": None},
    },
}
VALUES = {cgfac: SOLVE | ADAPT, fisher_estimator: ESTIMATOR}


def printed(function, *args):
    """A traced program as text, with its constants, without addresses."""
    closed = jax.make_jaxpr(function)(*args)
    return re.sub("0x[0-9a-f]+", "", f"{closed.jaxpr} {closed.consts}")


def of_optimizer(factory, options):
    tx, given = factory(**options), ingredients()
    return printed(lambda given: updating(tx)(tx.init(given.params), given), given)


def of_estimator(factory, options):
    """A step, as what is captured may matter in the solve only."""
    x = jnp.ones((8, 3, 5))
    params = {name: {"kernel": jnp.ones((5, 5))} for name in ("hidden", "out")}
    params |= {"shift": jnp.ones(5)}
    usual = {"model_fn": model_fn, "loss": "squared_error", "fallback": True}
    usual |= {"examples": 4, "window": 2, "rank": 2}
    estimator = factory(**(usual | options))
    curvature = estimator.init(params, x)
    tx = cgfac(fallback=optax.sgd(0.1), where=curvature.covers)

    def step(params, curvature, rng):
        curvature = estimator.update(curvature, params, x, rng=rng)
        more = {"curvature": curvature, "value": 1.0, "value_fn": lambda p: 1.0}
        return tx.update(params, tx.init(params), params, **more)

    return printed(step, params, curvature, jax.random.key(0))


@functools.cache
def program(factory, given):
    """The program of a step with these options."""
    of = of_estimator if factory is fisher_estimator else of_optimizer
    return of(factory, dict(given))


def cases():
    for factory, modes in MODES.items():
        for name, mode in modes.items():
            for option in inspect.signature(factory).parameters:
                # How a step is adapted does not depend on how it is solved.
                if option in SOLVE or not mode.keys() & {*SOLVE} - {"damping"}:
                    test_id = f"{factory.__name__} {name} {option}"
                    yield pytest.param(factory, mode, option, id=test_id)


@pytest.mark.parametrize(("factory", "mode", "option"), [*cases()])
def test_an_option_is_used_or_refused(factory, mode, option):
    program(factory, frozenset(mode.items()))  # the mode itself is legal
    found = []
    for value in VALUES.get(factory, SOLVE)[option]:
        try:
            found.append(program(factory, frozenset((mode | {option: value}).items())))
        except (ValueError, TypeError):
            found.append("refused")
    both_refused = found == ["refused", "refused"]
    assert both_refused or found[0] != found[1], "it is accepted and ignored"
