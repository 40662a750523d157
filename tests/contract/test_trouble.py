"""Numbers that are not finite, and layers that see nothing: no harm is done."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cgfac import cgfac, diagnostics, scale_by_cgfac, scale_by_kfac
from steps import TRANSFORMS, ingredients, problem, update

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def is_zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def without_residual(state):
    """The residual of a bad gradient is no number, and is read by nobody."""
    return state._replace(info=state.info._replace(residual=()))


def num_counted(state):
    """How often the optimizer says that something was not finite."""
    result = diagnostics(state)
    layers = sum(int(layer["num_replaced"]) for layer in result["layers"].values())
    return layers + int(result.get("num_rejected", 0))


@every_transform
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_gives_a_zero_update_is_counted_and_forgotten(name, bad):
    tx = TRANSFORMS[name]()
    state = tx.init(ingredients().params)
    grads = jax.tree.map(lambda g: g * bad, ingredients().grads)
    updates, state = update(tx, state, grads=grads)
    assert is_zero(updates)
    assert is_finite(without_residual(state))
    assert num_counted(state) >= 1

    good, state = update(tx, state)
    expected, _ = update(tx, tx.init(ingredients().params))
    assert is_finite(good)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
        good,
        expected,
    )


@every_transform
def test_a_bad_gradient_after_good_ones_repeats_none_of_them(name):
    """Neither the warm start nor the velocity is a step for this gradient."""
    tx = TRANSFORMS[name]()
    _, state = update(tx, tx.init(ingredients().params))
    grads = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    updates, state = update(tx, state, grads=grads)
    assert is_zero(updates)
    good, state = update(tx, state)
    assert is_finite((good, state))
    assert not is_zero(good)


@pytest.mark.parametrize("name", ["cgfac", "cgfac with a learning rate"])
def test_cgfac_counts_the_step_that_it_rejected(name):
    tx = TRANSFORMS[name]()
    grads = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    _, state = update(tx, tx.init(ingredients().params), grads=grads)
    assert int(state.num_rejected) == 1


@pytest.mark.parametrize("name", ["cgfac", "cgfac with a learning rate"])
def test_one_bad_layer_stops_the_whole_step(name):
    """Half a step is no descent direction, and momentum would carry it on."""
    tx = TRANSFORMS[name]()
    grads = ingredients().grads
    bad = jax.tree.map(lambda g: g * jnp.nan, grads["out"])
    updates, state = update(
        tx, tx.init(ingredients().params), grads=grads | {"out": bad}
    )
    assert is_zero(updates)
    assert is_zero(state.velocity)


@pytest.mark.parametrize("loss_too", [False, True])
def test_a_bad_gradient_does_not_lower_the_damping(loss_too):
    tx = TRANSFORMS["cgfac"]()  # adapts at every second update
    _, state = update(tx, tx.init(ingredients().params))
    grads = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    value = ingredients().value * (jnp.nan if loss_too else 1)
    _, after = update(tx, state, grads=grads, value=value)
    assert float(after.damping) >= float(state.damping)


def test_bad_examples_never_enter_the_window():
    p = problem()
    step = jax.jit(p.step(TRANSFORMS["cgfac"]()))
    state = p.start(TRANSFORMS["cgfac"]())
    bad = p.batch | {"x": p.batch["x"].at[1].set(jnp.nan)}
    after, loss = step(state, bad, jax.random.key(0))
    assert np.isnan(loss)
    assert is_finite(after[2].layers)
    jax.tree.map(np.testing.assert_array_equal, after[0], state[0])

    losses = []
    for i in range(1, 6):
        after, loss = step(after, p.batch, jax.random.key(i))
        losses.append(float(loss))
    assert is_finite(after)
    assert losses[-1] < losses[0]


@every_transform
def test_an_empty_window_still_gives_a_finite_update(name):
    """The damping alone is the curvature then."""
    tx = TRANSFORMS[name]()
    updates, _ = update(
        tx, tx.init(ingredients().params), curvature=problem().curvature()
    )
    assert is_finite(updates)
    assert not is_zero(updates)


@every_transform
def test_zero_gradients_give_a_zero_update(name):
    tx = TRANSFORMS[name]()
    zeros = jax.tree.map(jnp.zeros_like, ingredients().grads)
    updates, state = update(tx, tx.init(ingredients().params), grads=zeros)
    if name != "cgfac with a learning rate":  # whose l2 pulls at the parameters
        assert is_zero(updates)
    assert is_finite((updates, state))
    assert num_counted(state) == 0


@every_transform
def test_all_zero_activations_are_harmless(name):
    """A dead layer: its rows of ``a`` vanish and so does its gradient."""
    p = problem()
    params = jax.tree.map(jnp.zeros_like, p.params)  # so out sees zeros only
    tx = TRANSFORMS[name]()
    state = (params, tx.init(params), p.curvature())
    step = jax.jit(p.step(tx))
    for i in range(2):
        state, _ = step(state, p.batch, jax.random.key(i))
    assert is_finite(state)
    assert num_counted(state[1]) == 0


def test_a_rate_that_is_no_number_is_counted_and_takes_no_step():
    tx = cgfac(lambda count: jnp.where(count == 1, jnp.nan, 0.1), momentum=0.9)
    _, state = update(tx, tx.init(ingredients().params))
    assert num_counted(state) == 0
    updates, state = update(tx, state)
    assert is_zero(updates)
    assert int(state.num_rejected) == 1
    assert is_finite(update(tx, state))


BY_SCHEDULE = {
    "cgfac": lambda damping: cgfac(0.1, damping=damping),
    "cgfac full": lambda damping: cgfac(0.1, damping=damping, structure="full"),
    "scale_by_cgfac": scale_by_cgfac,
    "scale_by_kfac": scale_by_kfac,
}


@pytest.mark.parametrize("name", BY_SCHEDULE)
def test_a_damping_that_a_schedule_lets_fall_below_zero_takes_no_step(name):
    """The sum with a positive curvature may be negative: such a step ascends."""
    tx = BY_SCHEDULE[name](lambda count: 0.1 - 10.0 * count)
    updates, state = update(tx, tx.init(ingredients().params))
    assert not is_zero(updates)
    assert num_counted(state) == 0
    updates, state = update(tx, state)
    assert is_zero(updates)
    assert num_counted(state) > 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parameters_do_not_leave_the_range_of_their_precision(dtype):
    """Two finite numbers may have a sum that is none."""
    most = float(jnp.finfo(dtype).max)
    tx = cgfac(1.0, momentum=0.9)
    params, grads = (
        jax.tree.map(lambda x: x.astype(dtype), tree)
        for tree in (ingredients().params, ingredients().grads)
    )
    grads = jax.tree.map(lambda g: jnp.full_like(g, most / 2), grads)
    curvature = ingredients().curvature

    @jax.jit
    def run(params, state):
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = run(params, state)
        assert is_finite(params)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(params)) > most / 4
