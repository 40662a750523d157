"""A run that is stopped, saved by Orbax and resumed goes on as if nothing had been."""

import textwrap

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

from models.nnx_modules import Mlp
from optax_cgfac import TrainState, cgfac, fisher_estimator, scale_by_cgfac
from steps import model_fn, problem
from training import ROOT, nnx_step, python, run, run_python, squared_error

FACTORIES = {
    "cgfac": cgfac,
    "cgfac by cg": lambda: cgfac(solver="cg"),
    "scale_by_cgfac": lambda: scale_by_cgfac(0.1),
}


def plain_loop(tx):
    return lambda: problem().start(tx), problem().step(tx)


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


def nnx_optimizer(tx):
    """Module and optimizer as pure states, which is what is saved."""
    estimator = fisher_estimator(
        lambda module, x: module(x),
        "squared_error",
        examples=4,
        window=2,
        model_examples=8,
    )
    on_modules = nnx_step(estimator, lambda m, b: squared_error(m(b["x"]), b["y"]))

    def make():
        module = Mlp(nnx.Rngs(0))
        return module, nnx.Optimizer(module, tx, wrt=nnx.Param)

    def start():
        module, optimizer = make()
        curvature = estimator.init(module, problem().batch["x"])
        return nnx.state(module), nnx.state(optimizer), curvature

    def step(state, batch, rng):
        module, optimizer = make()
        nnx.update(module, state[0])
        nnx.update(optimizer, state[1])
        curvature, value = on_modules(module, optimizer, state[2], batch, rng)
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
            state, loss = step(state, p.batch, jax.random.key(i))
            checkpointer.save(folder / f"step_{i + 1}", state)
            checkpointer.wait_until_finished()
    np.savez(folder / "final.npz", *map(np.asarray, jax.tree.leaves(state)))
"""


def test_a_killed_process_continues_exactly(tmp_path):
    """Killed at its sixth step and started again."""
    program = ["-c", textwrap.dedent(SCRIPT), tmp_path]
    env = {"PYTHONPATH": str(ROOT / "tests"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    assert run_python(*program, 5, **env).returncode == -9
    assert not (tmp_path / "final.npz").exists()
    python(*program, -1, **env)
    p, tx = problem(), cgfac()
    whole, _ = run(jax.jit(p.step(tx)), p.start(tx), p.batch, 0, 8)
    with np.load(tmp_path / "final.npz") as resumed:
        leaves = [resumed[name] for name in resumed.files]
    for found, expected in zip(leaves, jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
