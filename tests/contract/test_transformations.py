"""A training step under JAX's transformations, the same every time, in its dtypes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cgfac import cgfac, scale_by_cgfac
from steps import TRANSFORMS, first, ingredients, make_problem, problem, run
from trees import assert_trees_close, describe, is_finite
from troubled import transformation

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@every_transform
def test_a_second_call_traces_and_compiles_nothing(name):
    plain_step, traces = problem().step(transformation(name)), []

    def counted(*args):
        traces.append(args)
        return plain_step(*args)

    step = jax.jit(counted)
    state = problem().start(transformation(name))
    state, _ = step(state, problem().batch, jax.random.key(0))
    with jax.log_compiles(), warnings.catch_warnings():
        state, _ = step(state, problem().batch, jax.random.key(1))
        jax.block_until_ready(state)
    assert len(traces) == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["cgfac", "scale_by_cgfac"])
def test_scan_equals_a_loop(name):
    tx = transformation(name)
    (params, *_), losses = run(problem(), tx, 4)
    step, state = jax.jit(problem().step(tx)), problem().start(tx)
    for i in range(4):
        state, loss = step(state, problem().batch, jax.random.key(i))
        assert losses[i] == pytest.approx(float(loss), rel=1e-4)
    assert_trees_close(params, state[0], rtol=2e-4, atol=1e-5)


def test_the_step_runs_under_cond():
    tx = cgfac(damping_interval=2)
    step, state = problem().step(tx), problem().start(tx)

    def taken(state):
        return step(state, problem().batch, jax.random.key(0))[0]

    maybe = jax.jit(lambda flag, state: jax.lax.cond(flag, taken, lambda s: s, state))
    assert_trees_close(maybe(False, state)[0], state[0], rtol=0, atol=0)
    after = maybe(True, state)
    assert_trees_close(after[0], jax.jit(taken)(state)[0], rtol=2e-4, atol=1e-5)
    assert int(after[2].num_updates) == 1


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
    after, _ = step(after, problem().batch, jax.random.key(1))
    assert is_finite((loss, after[0]))


@every_transform
def test_the_same_seed_gives_the_same_run_bit_for_bit(name):
    """`test_checkpoints` has runs of two processes, and restored ones."""
    tx = transformation(name)
    runs = [run(problem(), tx, 8) for _ in range(2)]  # traced and compiled again
    jax.tree.map(np.testing.assert_array_equal, *runs)


# ---------------------------------------------------------------- dtypes


def dtypes(tree, kind=jnp.floating):
    leaves = jax.tree.leaves(tree)
    return {str(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, kind)}


@every_transform
def test_the_state_keeps_its_structure_shapes_and_dtypes(name):
    """Also where float64 is JAX's default, and the user's choice is float32."""
    tx = TRANSFORMS[name]()
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            p = make_problem()
            state = p.start(tx)
            after, _ = jax.eval_shape(p.step(tx), state, p.batch, jax.random.key(0))
            assert jax.tree.structure(after) == jax.tree.structure(state)
            assert describe(after) == describe(jax.eval_shape(lambda x: x, state))
            assert dtypes(after) == {"float32"}
            assert dtypes(after, jnp.integer) == {"int32"}


@pytest.mark.parametrize("name", ["cgfac by cg", "scale_by_cgfac"])
@pytest.mark.parametrize(
    ("dtype", "solved"), [("float64", "float64"), ("bfloat16", "float32")]
)
def test_parameters_of_other_precisions_stay_and_have_rows_of_theirs(
    name, dtype, solved
):
    with jax.enable_x64(dtype == "float64"):
        p = make_problem(jnp.dtype(dtype))
        (params, opt_state, curvature), losses = run(p, transformation(name), 2)
        assert is_finite((losses, params))
        assert dtypes(params) == {dtype}
        assert dtypes(curvature.layers) == {solved}
        if name == "cgfac by cg":
            assert dtypes(opt_state.warm_start) == {dtype}


def test_gradients_narrower_than_state_and_rows():
    """The update follows them, the state stays."""
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), ingredients().grads)
    for tx in (cgfac(), cgfac(0.1, solver="cg"), scale_by_cgfac(0.1)):
        updates, after = first(tx, grads=grads)
        types = [dtypes(tree) for tree in (tx.init(ingredients().params), after)]
        assert types[0] == types[1]
        assert is_finite(updates)
    assert dtypes(updates) == {"bfloat16"}
