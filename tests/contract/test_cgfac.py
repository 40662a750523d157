"""The ready-made optimizer: its two modes, and each of its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import steps
from optax_cgfac import Loss, cgfac, diagnostics, fisher_estimator, scale_by_cgfac
from steps import first, ingredients, model_fn, problem, run, update, updating
from trees import assert_trees_close, is_zero, scaled

bad_numbers = pytest.mark.parametrize("bad", [np.inf, np.nan])


def solution(damping=0.1, **changes):
    """What both modes build on: the preconditioned gradient."""
    return first(scale_by_cgfac(damping, damping_form="factored"), **changes)[0]


def dot(x, y):
    return float(optax.tree.vdot(x, y))


def gauss_newton(direction):
    """``dᵀFd`` of the squared error on the kept examples, by a plain jvp."""
    given = ingredients()
    inputs = given.curvature.model_inputs
    _, tangent = jax.jvp(lambda p: model_fn(p, inputs), (given.params,), (direction,))
    return 2 * np.mean(np.sum(np.asarray(tangent, np.float64) ** 2, -1))


def with_l2(l2):
    given = ingredients()
    return jax.tree.map(lambda g, p: g + l2 * p, given.grads, given.params)


def dampings(tx, given, count, **extra):
    """The dampings after so many updates."""
    state, seen, step = tx.init(given.params), [], jax.jit(updating(tx, **extra))
    for _ in range(count):
        _, state = step(state, given)
        seen.append(float(state.damping))
    return seen


def by_spec(**changes):
    """The curvature with a changed static part."""
    given = ingredients().curvature
    return dataclasses.replace(given, spec=dataclasses.replace(given.spec, **changes))


# ---------------------------------------------------------------- with a rate


def test_schedules_are_read_at_the_count_and_scale_the_solution():
    tx = cgfac(optax.linear_schedule(0.4, 0, 4), damping=lambda count: 0.1 * count)
    state = tx.init(ingredients().params)._replace(cgfac_count=jnp.int32(1))
    for rate, damping in ((0.3, 0.1), (0.2, 0.2)):
        updates, state = update(tx, state)
        assert_trees_close(updates, scaled(-rate, solution(damping)))
        assert float(state.step_size) == pytest.approx(rate)
        assert float(state.damping) == pytest.approx(damping)


def test_the_kl_clip_bounds_the_step():
    x = solution()
    nu = np.sqrt(1e-3 / (0.3**2 * dot(x, ingredients().grads)))
    assert nu < 1
    for clip, factor in ((1e-3, nu), (1e6, 1.0)):
        updates, state = first(cgfac(0.3, kl_clip=clip))
        assert_trees_close(updates, scaled(-0.3 * factor, x))
        assert float(state.step_size) == pytest.approx(0.3 * factor, rel=1e-4)


def test_l2_adds_to_the_gradient_and_to_the_damping():
    updates, _ = first(cgfac(0.3, damping=0.1, l2=0.5))
    expected, _ = first(cgfac(0.3, damping=0.6), grads=with_l2(0.5))
    assert_trees_close(updates, expected)


# ---------------------------------------------------------------- without one


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_the_step_minimizes_the_damped_gauss_newton_model(l2):
    damping, grads = 0.05, with_l2(l2)
    direction = scaled(-1, solution(damping + l2, grads=grads))
    slope, norm = dot(grads, direction), dot(direction, direction)
    size = -slope / (gauss_newton(direction) + (damping + l2) * norm)
    assert 0 < size < 1, "the box would hide what is tested"

    updates, state = first(cgfac(damping=damping, l2=l2))
    assert float(state.step_size) == pytest.approx(size, rel=1e-3)
    assert float(state.momentum) == 0
    assert_trees_close(updates, scaled(size, direction), rtol=1e-3)


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_the_reduction_ratio_is_actual_over_predicted(l2):
    given = ingredients()
    updates, state = first(
        cgfac(damping=0.2, l2=l2, damping_interval=1, damping_decay=0.5)
    )
    moved = optax.apply_updates(given.params, updates)
    actual = float(problem().loss(moved, problem().batch) - given.value)
    actual += l2 / 2 * (dot(moved, moved) - dot(given.params, given.params))
    predicted = dot(with_l2(l2), updates)
    predicted += (gauss_newton(updates) + l2 * dot(updates, updates)) / 2
    ratio = actual / predicted
    assert float(state.reduction_ratio) == pytest.approx(ratio, rel=1e-2)
    factor = 0.5 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0
    assert float(state.damping) == pytest.approx(0.2 * factor)


@pytest.mark.parametrize("rise", [1e-3, 1.0, np.inf, np.nan])
def test_a_step_that_raises_the_loss_of_its_batch_is_not_taken(rise):
    value = ingredients().value
    tx = cgfac(damping=0.1, damping_interval=1, damping_decay=0.5)
    updates, state = first(tx, {"value_fn": lambda params: value + rise})
    assert is_zero((updates, state.velocity))
    assert int(state.num_rejected) == 1
    assert float(state.damping) == pytest.approx(0.2)
    assert np.isfinite(rise) or float(state.reduction_ratio) == -np.inf


def on_a_bad_batch(tx, state, bad, before):
    """An update with a bad loss and gradients; the loss was ``before`` a step ago."""
    extra = {"value_fn": lambda params: jnp.asarray(before)}
    grads = scaled(bad, ingredients().grads)
    return update(tx, state, None, extra, grads=grads, value=jnp.asarray(bad))


@bad_numbers
def test_a_loss_that_is_not_finite_takes_the_last_step_back(bad):
    tx = cgfac()
    updates, state = first(tx)
    undone, after = on_a_bad_batch(tx, state, bad, before=1.0)
    assert_trees_close(undone, scaled(-1, updates), rtol=0)
    assert is_zero(after.velocity)
    assert float(after.damping) > float(state.damping)
    # A second one has nothing left to take back.
    assert is_zero(on_a_bad_batch(tx, after, bad, before=bad)[0])


@bad_numbers
def test_a_batch_whose_loss_is_never_finite_undoes_nothing(bad):
    """It says nothing of the step before, nor of the damping."""
    tx = cgfac()
    _, state = first(tx)
    updates, after = on_a_bad_batch(tx, state, bad, before=bad)
    assert is_zero(updates)
    assert_trees_close(after.velocity, state.velocity, rtol=0)
    assert float(after.damping) == float(state.damping)
    assert float(after.promise) == float(state.promise) > 0
    assert int(after.num_rejected) == int(state.num_rejected) + 1


def test_after_a_bad_batch_the_next_step_is_fitted_anew():
    """The step size of the bad one, zero, is not kept until the model is due again."""
    tx = cgfac(model_interval=10)
    _, state = first(tx)
    state = state._replace(cgfac_count=jnp.asarray(19))  # the 20th is fitted
    _, state = on_a_bad_batch(tx, state, jnp.nan, before=jnp.nan)
    assert not is_zero(update(tx, state)[0])


def test_a_curvature_out_of_all_proportion_to_the_first_begins_the_damping_anew():
    """A saturated softmax has next to none; a batch of outliers is no reason."""
    tx = cgfac()
    _, fresh = first(tx)
    for factor, anew in ((1e-20, True), (1e-6, False)):
        old = {name: factor * getattr(fresh, name) for name in fresh._fields[1:3]}
        assert set(old) == {"damping", "initial_damping"}
        _, state = update(tx, fresh._replace(**old))
        same = float(state.initial_damping) == float(fresh.initial_damping)
        assert same == anew


def test_the_fallback_shares_the_fate_of_the_step():
    """Rejected with it; numbers that it makes and that are none are left out."""
    given, split = ingredients(), lambda path: "hidden" in path
    tx = cgfac(fallback=optax.adam(1e-2), where=split)
    _, state = first(tx)
    updates, after = update(tx, state, grads=scaled(jnp.nan, given.grads))
    assert is_zero(updates)
    assert_trees_close(after.fallback, state.fallback, rtol=0)
    assert int(after.num_rejected) == int(state.num_rejected) + 1

    dividing = optax.stateless(lambda u, _: jax.tree.map(lambda g: g / (g > 0), u))
    updates, _ = first(cgfac(fallback=dividing, where=split))
    gradient = given.grads["out"]["kernel"]
    expected = np.where(gradient > 0, gradient, 0)
    np.testing.assert_array_equal(updates["out"]["kernel"], expected)
    assert np.any(gradient < 0)


def test_the_default_damping_accounts_for_the_structure():
    params = ingredients().params
    assert float(cgfac(0.1).init(params).damping) == pytest.approx(0.1)
    for structure in ("block", "full"):
        assert float(cgfac(structure=structure).init(params).damping) == 1
    # An initial damping below the default floor lowers the floor.
    assert float(cgfac(damping=1e-5).init(params).damping) == pytest.approx(1e-5)
    with pytest.raises(ValueError, match="must satisfy"):
        cgfac(damping=1e-5, min_damping=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_first_damping_has_the_scale_of_the_curvature(scale):
    curvature = steps.with_rows(g=scale**0.5)
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

    def trained(weight):
        loss = Loss.named("squared_error", weight=weight)
        estimator = fisher_estimator(model_fn, loss, examples=4, window=2)
        p = problem()._replace(estimator=estimator, weight=weight)
        (params, *_), losses = run(p, cgfac(), 10)
        return params, losses / weight

    (expected, losses), (params, found) = trained(1.0), trained(weight)
    assert_trees_close(params, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found[-1], losses[-1], rtol=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1e15, 1e30])
def test_the_first_damping_is_finite_and_waits_for_data(scale):
    tx = cgfac(damping_interval=5)
    assert float(tx.init(ingredients().params).damping) == 0
    empty = problem().curvature()
    _, state = first(tx, curvature=steps.with_rows(g=scale) if scale else empty)
    assert np.isfinite(state.damping)
    assert state.damping > 0
    _, after = update(tx, state)
    _, expected = first(tx)
    # The square of 1e-30 or 1e30 is no number in float32: the first good one counts.
    # That of 1e-15 is one, and far outgrown by the next.
    waits = float(after.initial_damping) == float(expected.initial_damping) > 0
    assert waits == (scale != 1e15)
    if not scale:  # no rows yet
        assert float(state.damping) == pytest.approx(0.1)
        assert float(state.initial_damping) == 0
        assert float(after.damping) == float(expected.damping)


@pytest.mark.parametrize(("examples", "interval"), [(500, 5), (512, 10)])
def test_the_damping_is_looked_at_more_often_with_small_batches(examples, interval):
    given = ingredients()._replace(curvature=by_spec(batch_size=examples))
    bad = {"value_fn": lambda params: jnp.asarray(jnp.nan)}
    seen = dampings(cgfac(damping=0.1), given, 20, **bad)
    # The first ten updates all look, each for an update's worth of decay.
    np.testing.assert_allclose(seen[:10], 0.1 * 0.9 ** -np.arange(1.0, 11), rtol=1e-5)
    later = {round(x / seen[9], 3) for x in seen[10:]} - {1.0}
    expected = 0.9 ** -(interval * np.arange(1.0, 10 // interval + 1))
    np.testing.assert_allclose(sorted(later), expected, rtol=1e-3)
    assert seen[10 + interval - 2] == pytest.approx(seen[9])


@pytest.mark.parametrize(
    ("rate", "options"), [(0.3, {}), (None, {"damping_interval": 5})]
)
def test_a_fixed_momentum_adds_the_previous_update(rate, options):
    tx = cgfac(rate, momentum=0.5, damping=0.1, **options)
    before, state = first(tx)
    updates, state = update(tx, state)
    assert rate is not None or float(state.momentum) == 0.5
    size = float(state.step_size)
    expected = jax.tree.map(lambda x, d: -size * x + 0.5 * d, solution(), before)
    assert_trees_close(updates, expected, rtol=1e-3)


# ------------------------------------- step sizes between two fits of the model

# A loss so large that a step never promises the whole of it, which shortens it too.
LOSS = 100.0
TIMES = {True: 4.0, False: 2.0}  # what a kept step may promise, by few_outputs


def kept(larger=1.0, value=1.0, few_outputs=False, lower_bound=0.0):
    """Step sizes, fitted and then of larger gradients and loss; the state after."""
    objective = ingredients().curvature.spec.objective
    losses = (dataclasses.replace(objective.losses[0], lower_bound=lower_bound),)
    objective = dataclasses.replace(objective, losses=losses)
    curvature = by_spec(few_outputs=few_outputs, objective=objective)
    tx = cgfac(damping=0.1, damping_interval=1000, model_interval=1000)
    _, state = first(tx, curvature=curvature, value=jnp.float32(LOSS))
    state = state._replace(cgfac_count=jnp.int32(11))
    grads, loss = scaled(larger, ingredients().grads), jnp.float32(value * LOSS)
    _, after = update(tx, state, curvature=curvature, grads=grads, value=loss)
    return float(state.step_size), float(after.step_size), after


@pytest.mark.parametrize(
    ("larger", "options", "times"),
    [
        (0.5, {}, 100),
        (1.2, {}, 100),
        (10.0, {}, TIMES[False]),
        (10.0, {"few_outputs": True}, TIMES[True]),
        (10.0, {"value": 5.0}, 5 * TIMES[False]),  # it grows with the loss
        # A loss that may be negative is no measure.
        (10.0, {"value": 5.0, "lower_bound": None}, TIMES[False]),
        (10.0, {"value": -1.0, "lower_bound": None}, TIMES[False]),
    ],
)
def test_a_step_that_promises_much_more_than_the_fitted_one_is_shortened(
    larger, options, times
):
    """A gradient k times as large has a direction k times as large, and promises k²."""
    fitted, size, after = kept(larger, **options)
    assert size == pytest.approx(fitted * times / 100, rel=1e-4)
    # What the next one is measured by is the fitted step still.
    assert float(after.promise) == float(kept(1.0, **options)[2].promise) > 0


# ---------------------------------------------------------------- diagnostics


def test_diagnostics_are_arrays_under_jit_nested_and_flat():
    tx = cgfac(solver="cg", max_steps=3, damping=0.1, damping_interval=5)
    both = jax.jit(lambda state: (diagnostics(state), diagnostics(state, flat=True)))
    for wrapped in (tx, optax.chain(optax.clip(1e6), tx)):
        result, flat = both(first(wrapped)[1])
        assert set(result["layers"]) == {"hidden", "out"}
        for layer in result["layers"].values():
            assert 1 <= int(layer["cg_steps"]) <= 2 * 3
            assert float(layer["residual"]) > 0
            assert int(layer["num_replaced"]) == 0
        assert float(result["damping"]) == pytest.approx(0.1)
        assert 0 < float(result["step_size"]) <= 1
        assert {"momentum", "reduction_ratio", "num_rejected"} < set(result)
        leaves, _ = jax.tree.flatten_with_path(result)
        paths = {"/".join(["cgfac", *(k.key for k in path)]): x for path, x in leaves}
        assert flat == paths
        assert "cgfac/layers/out/residual" in flat
    assert set(diagnostics(first(scale_by_cgfac(0.1))[1])) == {"layers"}
