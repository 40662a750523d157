"""The ready-made optimizer: its two modes, and each of its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cgfac import Loss, cgfac, diagnostics, fisher_estimator, scale_by_cgfac
from steps import ingredients, model_fn, problem, update, value_fn


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def first(tx, **changes):
    return update(tx, tx.init(ingredients().params), **changes)


def solution(damping=0.1, **changes):
    """What both modes build on: the preconditioned gradient."""
    return first(scale_by_cgfac(damping, damping_form="factored"), **changes)[0]


def scaled(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


def dot(x, y):
    return sum(
        np.vdot(np.asarray(u, np.float64), np.asarray(v, np.float64))
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def gauss_newton(direction):
    """``dᵀFd`` of the squared error on the kept examples, by a plain jvp."""
    given = ingredients()
    _, tangent = jax.jvp(
        lambda p: model_fn(p, given.curvature.model_inputs),
        (given.params,),
        (direction,),
    )
    return 2 * np.mean(np.sum(np.asarray(tangent, np.float64) ** 2, -1))


# ---------------------------------------------------------------- with a rate


def test_a_learning_rate_scales_the_preconditioned_gradient():
    updates, state = first(cgfac(0.3))
    assert_trees_close(updates, scaled(-0.3, solution()))
    assert float(state.step_size) == pytest.approx(0.3)


def test_schedules_are_read_at_the_count():
    tx = cgfac(
        optax.linear_schedule(0.4, 0.0, 4), damping=lambda count: 0.1 * (count + 1)
    )
    updates, state = first(tx)
    assert_trees_close(updates, scaled(-0.4, solution(0.1)))
    updates, state = update(tx, state)
    assert_trees_close(updates, scaled(-0.3, solution(0.2)))
    assert float(state.damping) == pytest.approx(0.2)


def test_momentum_adds_the_previous_update():
    tx = cgfac(0.3, momentum=0.5)
    before, state = first(tx)
    updates, _ = update(tx, state)
    expected = jax.tree.map(lambda x, d: -0.3 * x + 0.5 * d, solution(), before)
    assert_trees_close(updates, expected)


def test_the_kl_clip_bounds_the_step():
    clip = 1e-3
    updates, state = first(cgfac(0.3, kl_clip=clip))
    x = solution()
    nu = np.sqrt(clip / (0.3**2 * dot(x, ingredients().grads)))
    assert nu < 1
    assert_trees_close(updates, scaled(-0.3 * nu, x))
    assert float(state.step_size) == pytest.approx(0.3 * nu, rel=1e-4)
    loose, _ = first(cgfac(0.3, kl_clip=1e6))
    assert_trees_close(loose, scaled(-0.3, x))


def with_l2(l2):
    given = ingredients()
    return jax.tree.map(lambda g, p: g + l2 * p, given.grads, given.params)


def test_l2_adds_to_the_gradient_and_to_the_damping():
    updates, _ = first(cgfac(0.3, damping=0.1, l2=0.5))
    expected, _ = first(cgfac(0.3, damping=0.6), grads=with_l2(0.5))
    assert_trees_close(updates, expected)
    without, _ = first(cgfac(0.3))
    assert not np.allclose(updates["out"]["kernel"], without["out"]["kernel"])


# ---------------------------------------------------------------- without one


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_the_step_minimizes_the_damped_gauss_newton_model(l2):
    damping = 0.05
    grads = with_l2(l2)
    direction = scaled(-1, solution(damping + l2, grads=grads))
    slope = dot(grads, direction)
    norm = dot(direction, direction)
    size = -slope / (gauss_newton(direction) + (damping + l2) * norm)
    assert 0 < size < 1, "the box would hide what is tested"

    updates, state = first(cgfac(damping=damping, l2=l2))
    assert float(state.step_size) == pytest.approx(size, rel=1e-3)
    assert float(state.momentum) == 0
    assert_trees_close(updates, scaled(size, direction), rtol=1e-3)


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_the_reduction_ratio_is_actual_over_predicted(l2):
    damping, given = 0.2, ingredients()
    tx = cgfac(damping=damping, l2=l2, damping_interval=1, damping_decay=0.5)
    updates, state = first(tx)

    moved = optax.apply_updates(given.params, updates)
    actual = float(value_fn(moved) - given.value)
    actual += l2 / 2 * (dot(moved, moved) - dot(given.params, given.params))
    predicted = dot(with_l2(l2), updates)
    predicted += (gauss_newton(updates) + l2 * dot(updates, updates)) / 2
    ratio = actual / predicted
    assert float(state.reduction_ratio) == pytest.approx(ratio, rel=1e-2)
    factor = 0.5 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0
    assert float(state.damping) == pytest.approx(damping * factor)


def test_the_damping_changes_at_the_interval_only_and_stays_in_its_bounds():
    tx = cgfac(damping=0.1, damping_interval=2, damping_decay=0.1, min_damping=0.05)
    state, seen = tx.init(ingredients().params), []
    for _ in range(4):
        _, state = update(tx, state)
        seen.append(float(state.damping))
    assert seen[0] == pytest.approx(0.1)
    assert seen[1] == seen[2]
    assert min(seen) >= 0.05 - 1e-7


def test_a_loss_that_explodes_raises_the_damping():
    tx = cgfac(damping=0.1, damping_interval=1, damping_decay=0.5)
    given = ingredients()
    _, state = tx.update(
        given.grads,
        tx.init(given.params),
        given.params,
        curvature=given.curvature,
        value=given.value,
        value_fn=lambda params: jnp.asarray(jnp.inf),
    )
    assert float(state.damping) == pytest.approx(0.2)
    assert float(state.reduction_ratio) == -np.inf


@pytest.mark.parametrize("rise", [1e-3, 1.0, np.inf, np.nan])
def test_a_step_that_raises_the_loss_of_its_batch_is_not_taken(rise):
    tx = cgfac(damping_interval=1)
    given = ingredients()
    updates, state = tx.update(
        given.grads,
        tx.init(given.params),
        given.params,
        curvature=given.curvature,
        value=given.value,
        value_fn=lambda params: given.value + rise,
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.velocity))
    assert int(state.num_rejected) == 1
    assert float(state.damping) > 0.1


def on_a_bad_batch(tx, state, bad, before):
    """An update with a bad loss and gradients; the loss was ``before`` a step ago."""
    given = ingredients()
    return tx.update(
        jax.tree.map(lambda g: g * bad, given.grads),
        state,
        given.params,
        curvature=given.curvature,
        value=jnp.asarray(bad),
        value_fn=lambda params: jnp.asarray(before),
    )


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_takes_the_last_step_back(bad):
    tx = cgfac()
    updates, state = first(tx)
    undone, after = on_a_bad_batch(tx, state, bad, before=1.0)
    assert_trees_close(undone, jax.tree.map(jnp.negative, updates), rtol=0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.velocity))
    assert float(after.damping) > float(state.damping)
    # A second one has nothing left to take back.
    undone, _ = on_a_bad_batch(tx, after, bad, before=bad)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(undone))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_batch_whose_loss_is_never_finite_undoes_nothing(bad):
    """It says nothing of the step before, nor of the damping."""
    tx = cgfac()
    _, state = first(tx)
    updates, after = on_a_bad_batch(tx, state, bad, before=bad)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_trees_close(after.velocity, state.velocity, rtol=0)
    assert float(after.damping) == float(state.damping)
    assert int(after.num_rejected) == int(state.num_rejected) + 1


def test_after_a_bad_batch_the_next_step_is_fitted_anew():
    """The step size of the bad one, zero, is not kept until the model is due again."""
    tx = cgfac(model_interval=10)
    _, state = first(tx)
    state = state._replace(cgfac_count=jnp.asarray(19))  # the 20th is fitted
    bad = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    _, state = update(tx, state, grads=bad, value=jnp.asarray(jnp.nan))
    updates, _ = update(tx, state)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_a_curvature_out_of_all_proportion_to_the_first_begins_the_damping_anew():
    """A saturated softmax has next to none; a batch of outliers is no reason."""
    tx = cgfac()
    _, fresh = first(tx)
    for factor, anew in ((1e-20, True), (1e-6, False)):
        old = fresh._replace(
            damping=factor * fresh.damping,
            initial_damping=factor * fresh.initial_damping,
        )
        _, state = update(tx, old)
        same = float(state.initial_damping) == float(fresh.initial_damping)
        assert same == anew


def test_half_precision_gradients_keep_the_state_as_it_is():
    given = ingredients()
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), given.grads)
    for tx in (cgfac(0.1, solver="cg"), scale_by_cgfac(0.1)):
        state = tx.init(given.params)
        _, after = tx.update(grads, state, given.params, curvature=given.curvature)
        types = [jax.tree.map(lambda x: x.dtype, s) for s in (state, after)]
        assert types[0] == types[1]
    _, state = update(cgfac(), cgfac().init(given.params), grads=grads)
    assert float(state.step_size) > 0


def test_a_rejected_step_rejects_the_fallbacks_part_too():
    given = ingredients()
    first_layer = sorted(given.params)[0]
    tx = cgfac(fallback=optax.adam(1e-2), where=lambda path: first_layer in path)
    state = tx.init(given.params)
    _, state = update(tx, state)
    grads = jax.tree.map(lambda g: g * jnp.nan, given.grads)
    updates, after = update(tx, state, grads=grads)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.fallback, state.fallback)
    assert int(after.num_rejected) == int(state.num_rejected) + 1


def test_numbers_that_the_fallback_makes_and_are_none_are_left_out():
    given = ingredients()
    first_layer = sorted(given.params)[0]
    dividing = optax.stateless(lambda u, _: jax.tree.map(lambda g: g / (g > 0), u))
    tx = cgfac(fallback=dividing, where=lambda path: first_layer not in path)
    updates, _ = update(tx, tx.init(given.params))
    for name, leaf in updates[first_layer].items():
        gradient = given.grads[first_layer][name]
        np.testing.assert_array_equal(leaf, np.where(gradient > 0, gradient, 0))
        assert np.any(gradient < 0)


def test_the_default_damping_accounts_for_the_structure():
    params = ingredients().params
    assert float(cgfac(0.1).init(params).damping) == pytest.approx(0.1)
    for structure in ("block", "full"):
        assert float(cgfac(structure=structure).init(params).damping) == 1
    # An initial damping below the default floor lowers the floor.
    assert float(cgfac(damping=1e-5).init(params).damping) == pytest.approx(1e-5)
    with pytest.raises(ValueError, match="must lie in"):
        cgfac(damping=1e-5, min_damping=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_first_damping_has_the_scale_of_the_curvature(scale):
    given = ingredients()
    root = scale**0.5
    layers = {k: x._replace(g=root * x.g) for k, x in given.curvature.layers.items()}
    curvature = dataclasses.replace(given.curvature, layers=layers)
    sizes, traces = 0, 0.0
    for tag in curvature.tags:
        a, g = (np.asarray(x) for x in curvature.operator(tag.name).factors())
        traces += np.trace(a) * np.trace(g)
        sizes += len(a) * len(g)
    _, state = first(cgfac(damping_interval=5), curvature=curvature)
    assert sizes < 1000
    typical = 10 * traces / sizes
    assert float(state.damping) == pytest.approx(sizes / 1000 * typical, rel=1e-5)
    assert float(state.initial_damping) == pytest.approx(typical, rel=1e-5)


@pytest.mark.parametrize("start", [None, 1e4])
def test_the_damping_stays_above_a_hundredth_of_its_unit(start):
    """That of data is ten times the mean curvature, which small models start below."""
    _, state = first(cgfac(damping=start, damping_interval=1, damping_decay=1e-6))
    assert start in (None, float(state.initial_damping))
    assert float(state.reduction_ratio) > 0.75
    floor = float(state.initial_damping) / 100
    assert float(state.damping) == pytest.approx(floor, rel=1e-5)


@pytest.mark.parametrize("weight", [1e-16, 1e16])
def test_a_loss_in_other_units_trains_the_same(weight):
    """Ten steps with the loss, and ten with the loss times a number."""
    given = problem()
    trained = []
    for factor in (1.0, weight):
        estimator = fisher_estimator(
            model_fn,
            Loss.named("squared_error", weight=factor),
            examples=4,
            window=2,
        )
        tx, params = cgfac(), given.params

        def loss_fn(params, factor=factor):
            return factor * given.loss(params, given.batch)

        curvature, state = estimator.init(params, given.batch["x"]), tx.init(params)
        for i in range(10):
            value, grads = jax.value_and_grad(loss_fn)(params)
            curvature = estimator.update(
                curvature, params, given.batch["x"], rng=jax.random.key(i)
            )
            updates, state = tx.update(
                grads,
                state,
                params,
                curvature=curvature,
                value=value,
                value_fn=loss_fn,
            )
            params = optax.apply_updates(params, updates)
        trained.append((params, loss_fn(params) / factor))
    (expected, first_loss), (params, loss) = trained
    assert_trees_close(params, expected, rtol=1e-2, atol=1e-3)
    assert float(loss) == pytest.approx(float(first_loss), rel=1e-2)
    assert float(loss) < float(given.loss(given.params, given.batch))


def test_the_first_damping_waits_for_data():
    tx = cgfac(damping_interval=5)
    assert float(tx.init(ingredients().params).damping) == 0
    _, state = first(tx, curvature=problem().curvature())  # no rows yet
    assert float(state.damping) == pytest.approx(0.1)
    assert float(state.initial_damping) == 0
    _, after = update(tx, state)
    _, expected = first(tx)
    assert float(after.initial_damping) == float(expected.initial_damping) > 0
    assert float(after.damping) == float(expected.damping)


@pytest.mark.parametrize(("examples", "interval"), [(500, 5), (512, 10)])
def test_the_damping_is_looked_at_more_often_with_small_batches(examples, interval):
    given = ingredients()
    spec = dataclasses.replace(given.curvature.spec, batch_size=examples)
    curvature = dataclasses.replace(given.curvature, spec=spec)
    tx, seen = cgfac(damping=0.1), []
    state = tx.init(given.params)
    for _ in range(20):
        _, state = tx.update(
            given.grads,
            state,
            given.params,
            curvature=curvature,
            value=given.value,
            value_fn=lambda params: jnp.asarray(jnp.nan),
        )
        seen.append(float(state.damping))
    # The first ten updates all look, each for an update's worth of decay.
    np.testing.assert_allclose(seen[:10], 0.1 * 0.9 ** -np.arange(1.0, 11), rtol=1e-5)
    later = {round(x / seen[9], 3) for x in seen[10:]} - {1.0}
    expected = 0.9 ** -(interval * np.arange(1.0, 10 // interval + 1))
    np.testing.assert_allclose(sorted(later), expected, rtol=1e-3)
    assert seen[10 + interval - 2] == pytest.approx(seen[9])


def test_a_fixed_momentum_is_used_as_it_is():
    tx = cgfac(momentum=0.5, damping=0.1, damping_interval=5)
    before, state = first(tx)
    updates, state = update(tx, state)
    assert float(state.momentum) == 0.5
    size = float(state.step_size)
    expected = jax.tree.map(lambda x, d: -size * x + 0.5 * d, solution(), before)
    assert_trees_close(updates, expected, rtol=1e-3)


def test_a_chosen_momentum_stays_in_its_box():
    tx = cgfac()
    state = tx.init(ingredients().params)
    for _ in range(3):
        _, state = update(tx, state)
        assert 0 <= float(state.momentum) <= 0.95
        assert 0 <= float(state.step_size) <= 1


# ---------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "in a chain"])
def test_diagnostics_are_arrays_under_jit(wrap):
    tx = cgfac(solver="cg", max_steps=3, damping=0.1, damping_interval=5)
    tx = optax.chain(optax.clip(1e6), tx) if wrap else tx
    _, state = first(tx)
    result = jax.jit(diagnostics)(state)
    assert set(result["layers"]) == {"hidden", "out"}
    for layer in result["layers"].values():
        assert 1 <= int(layer["cg_steps"]) <= 2 * 3
        assert float(layer["residual"]) > 0
        assert int(layer["num_replaced"]) == 0
    assert float(result["damping"]) == pytest.approx(0.1)
    assert 0 < float(result["step_size"]) <= 1
    assert {"momentum", "reduction_ratio", "num_rejected"} < set(result)


def test_diagnostics_of_the_building_block_have_layers_only():
    _, state = first(scale_by_cgfac(0.1))
    assert set(diagnostics(state)) == {"layers"}
