"""JAX's transformations around a whole training step, and nothing compiled twice."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cgfac import cgfac
from steps import TRANSFORMS, describe, problem

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def assert_trees_close(actual, expected, rtol=2e-4, atol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def run_loop(step, state, num_steps):
    losses = []
    for i in range(num_steps):
        state, loss = step(state, problem().batch, jax.random.key(i))
        losses.append(loss)
    return state, jnp.stack(losses)


@every_transform
def test_a_second_call_traces_and_compiles_nothing(name):
    tx = optax.chain(TRANSFORMS[name](), optax.scale(-0.1))
    plain_step = problem().step(tx)
    traces = []

    def counted(*args):
        traces.append(args)
        return plain_step(*args)

    step = jax.jit(counted)
    state, _ = step(problem().start(tx), problem().batch, jax.random.key(0))
    with jax.log_compiles(), warnings.catch_warnings():
        state, _ = step(state, problem().batch, jax.random.key(1))
        jax.block_until_ready(state)
    assert len(traces) == 1
    assert step._cache_size() == 1


@every_transform
def test_the_state_keeps_its_structure_shapes_and_dtypes(name):
    tx = TRANSFORMS[name]()
    state = problem().start(tx)
    after, _ = jax.eval_shape(
        problem().step(tx), state, problem().batch, jax.random.key(0)
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert describe(after) == describe(jax.eval_shape(lambda x: x, state))


@pytest.mark.parametrize("name", ["cgfac", "scale_by_cgfac"])
def test_scan_equals_a_loop(name):
    tx = optax.chain(TRANSFORMS[name](), optax.scale(1.0 if name == "cgfac" else -0.1))
    step = problem().step(tx)
    state = problem().start(tx)

    def body(state, seed):
        return step(state, problem().batch, jax.random.key(seed))

    scanned, losses = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(4)))(state)
    looped, expected = run_loop(jax.jit(step), state, 4)

    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert_trees_close(scanned[0], looped[0])


def test_the_step_runs_under_cond():
    tx = TRANSFORMS["cgfac"]()
    step = problem().step(tx)
    state = problem().start(tx)

    @jax.jit
    def maybe(flag, state):
        return jax.lax.cond(
            flag,
            lambda s: step(s, problem().batch, jax.random.key(0))[0],
            lambda s: s,
            state,
        )

    assert_trees_close(maybe(False, state)[0], state[0], rtol=0, atol=0)
    expected, _ = jax.jit(step)(state, problem().batch, jax.random.key(0))
    assert_trees_close(maybe(True, state)[0], expected[0])
    assert int(maybe(True, state)[2].num_updates) == 1


INJECTED = {
    "cgfac injected": lambda: optax.inject_hyperparams(cgfac)(damping=0.3),
    "cgfac with an array": lambda: cgfac(damping=jnp.float32(0.3)),
}


@pytest.mark.parametrize("name", [*TRANSFORMS, *INJECTED])
def test_the_whole_state_can_be_donated(name):
    """Donation refuses a buffer that appears twice: init must not alias params."""
    tx = (TRANSFORMS | INJECTED)[name]()
    state = jax.tree.map(jnp.copy, problem().params)
    state = (state, tx.init(state), problem().curvature())
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state[:2])]
    assert len(pointers) == len(set(pointers))
    kernel = state[0]["out"]["kernel"]

    step = jax.jit(problem().step(tx), donate_argnums=0)
    after, loss = step(state, problem().batch, jax.random.key(0))

    assert kernel.is_deleted()
    assert np.isfinite(loss)
    after, _ = step(after, problem().batch, jax.random.key(1))
    assert np.isfinite(after[0]["out"]["kernel"]).all()
