"""A run that is stopped, saved by Orbax and resumed goes on as if nothing had been."""

import functools
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

from optax_cgfac import TrainState, cgfac, fisher_estimator, scale_by_cgfac
from steps import model_fn, problem

FACTORIES = {
    "cgfac": cgfac,
    "cgfac by cg": lambda: cgfac(solver="cg"),
    "scale_by_cgfac": lambda: scale_by_cgfac(0.1),
}


def run(step, state, batch, first, last):
    losses = []
    for i in range(first, last):
        state, loss = step(state, batch, jax.random.fold_in(jax.random.key(5), i))
        losses.append(np.asarray(loss))
    return state, losses


def plain_loop(tx):
    p = problem()
    return functools.partial(p.start, tx), p.step(tx)


def flax_train_state(tx):
    p = problem()

    def start():
        return TrainState.create(
            apply_fn=model_fn, params=p.params, tx=tx, curvature=p.curvature()
        )

    def step(state, batch, rng):
        value, grads = jax.value_and_grad(p.loss)(state.params, batch)
        curvature = p.estimator.update(
            state.curvature, state.params, batch["x"], rng=rng
        )
        state = state.apply_gradients(
            grads=grads,
            curvature=curvature,
            value=value,
            value_fn=lambda params: p.loss(params, batch),
        )
        return state, value

    return start, step


class Module(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def nnx_optimizer(tx):
    """Module and optimizer as pure states, which is what is saved."""
    estimator = fisher_estimator(
        lambda module, x: module(x),
        "squared_error",
        examples=4,
        window=2,
        model_examples=8,
    )

    def make():
        module = Module(nnx.Rngs(0))
        return module, nnx.Optimizer(module, tx, wrt=nnx.Param)

    def start():
        module, optimizer = make()
        curvature = estimator.init(module, problem().batch["x"])
        return nnx.state(module), nnx.state(optimizer), curvature

    def step(state, batch, rng):
        module, optimizer = make()
        nnx.update(module, state[0])
        nnx.update(optimizer, state[1])

        def loss_fn(module):
            return jnp.mean(jnp.sum((module(batch["x"]) - batch["y"]) ** 2, -1))

        value, grads = nnx.value_and_grad(loss_fn)(module)
        curvature = estimator.update(state[2], module, batch["x"], rng=rng)
        graphdef, _, rest = nnx.split(module, nnx.Param, ...)
        optimizer.update(
            module,
            grads,
            curvature=curvature,
            value=value,
            value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)),
        )
        return (nnx.state(module), nnx.state(optimizer), curvature), value

    return start, step


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        *((name, plain_loop) for name in FACTORIES),
        ("cgfac", flax_train_state),
        ("cgfac", nnx_optimizer),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, loop, tmp_path):
    batch, (start, step) = problem().batch, loop(FACTORIES[name]())
    step = jax.jit(step)
    whole, losses = run(step, start(), batch, 0, 12)

    state, before = run(step, start(), batch, 0, 7)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(start)
        restored = checkpointer.restore(tmp_path / "saved", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    resumed, after = run(step, restored, batch, 7, 12)
    np.testing.assert_array_equal(before + after, losses)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


SCRIPT = """
    import os, pathlib, signal, sys
    import jax, numpy as np, orbax.checkpoint
    from optax_cgfac import cgfac
    from steps import problem

    folder, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    p, tx = problem(), cgfac()
    step, state, first = jax.jit(p.step(tx)), p.start(tx), 0
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        saved = sorted(folder.glob("step_[0-9]"))
        if saved:
            first = int(saved[-1].name[-1])
            state = checkpointer.restore(saved[-1], jax.eval_shape(lambda: state))
        for i in range(first, 8):
            if i == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rng = jax.random.fold_in(jax.random.key(5), i)
            state, loss = step(state, p.batch, rng)
            checkpointer.save(folder / f"step_{i + 1}", state)
            checkpointer.wait_until_finished()
    leaves = jax.tree.leaves(state)
    np.savez(folder / "final.npz", *[np.asarray(x) for x in leaves])
"""


def test_a_killed_process_continues_exactly(tmp_path):
    """Once without a stop; once killed at its sixth step and started again."""

    def start(name, kill_at):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)]
        result = subprocess.run(
            [*command, str(kill_at)],
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return result, folder / "final.npz"

    result, expected = start("whole", -1)
    assert result.returncode == 0, result.stderr[-4000:]
    killed, final = start("killed", 5)
    assert killed.returncode == -9
    assert not final.exists()
    result, final = start("killed", -1)
    assert result.returncode == 0, result.stderr[-4000:]
    with np.load(expected) as whole, np.load(final) as resumed:
        assert whole.files == resumed.files
        for name in whole.files:
            np.testing.assert_array_equal(resumed[name], whole[name])
