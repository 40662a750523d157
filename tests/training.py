"""Training steps as in the README, and other Python programs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
from flax import nnx

ROOT = pathlib.Path(__file__).parents[1]


def train_step(tx, estimator, loss_fn, inputs=lambda batch: batch["x"]):
    """``(state, batch, rng) -> (state, loss)`` for ``loss_fn(params, batch)``.

    The state is ``(params, opt_state, curvature)``; ``inputs`` are the estimator's.
    """

    def step(state, batch, rng):
        params, opt_state, curvature = state
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        curvature = estimator.update(curvature, params, inputs(batch), rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=value,
            value_fn=lambda p: loss_fn(p, batch),
        )
        return (optax.apply_updates(params, updates), opt_state, curvature), value

    return step


def nnx_step(estimator, loss_fn):
    """The same for ``loss_fn(module, batch)`` and an `nnx.Optimizer`."""

    def step(module, optimizer, curvature, batch, rng):
        value, grads = nnx.value_and_grad(loss_fn)(module, batch)
        curvature = estimator.update(curvature, module, batch["x"], rng=rng)
        graphdef, _, rest = nnx.split(module, nnx.Param, ...)
        optimizer.update(
            module,
            grads,
            curvature=curvature,
            value=value,
            value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True), batch),
        )
        return curvature, value

    return step


def run(step, state, batch, first, last):
    """The state and the losses after steps with the keys ``first`` to ``last - 1``."""
    losses = []
    for i in range(first, last):
        state, loss = step(state, batch, jax.random.key(i))
        losses.append(np.asarray(loss))
    return state, losses


def squared_error(outputs, targets):
    return jax.numpy.mean(jax.numpy.sum((outputs - targets) ** 2, -1))


def python(*arguments, timeout=900, **env):
    """Runs Python in the project's root; returns what it printed."""
    result = run_python(*arguments, timeout=timeout, **env)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


def run_python(*arguments, timeout=900, **env):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def load(path):
    """Imports a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
