"""A run that is stopped, saved by Orbax and resumed goes on as if nothing had been."""

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

from models.nnx_modules import Mlp
from optax_cgfac import TrainState, cgfac, fisher_estimator, scale_by_cgfac
from steps import model_fn, problem
from training import nnx_step, run, squared_error

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
