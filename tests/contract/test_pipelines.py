"""The documented compositions: code and table of docs/pipelines.md are what is run."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cgfac
from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac
from steps import ingredients, make_problem, model_fn, problem, update

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
TABLE = PAGE.split("<!-- table: start -->")[1].split("<!-- table: end -->")[0]
ROWS = dict(re.findall(r"^\| `?([^`|]+?)`? \| `([^`]+)` \|", TABLE, re.MULTILINE))

# What the issue of this page asks for; a row that is lost fails here.
PROMISED = {
    "chain",
    "named_chain",
    "masked",
    "partition",
    "inject_hyperparams",
    "MultiSteps",
    "apply_if_finite",
    "conditionally_transform",
    "schedule_free",
    "clip_by_global_norm",
    "add_decayed_weights",
    "trace",
    "backtracking line search",
    "zoom line search",
    "a schedule as it is",
}


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def scale_by_cgfac_with_rate(rate=0.3):
    return optax.chain(scale_by_cgfac(0.1), optax.scale_by_learning_rate(rate))


def build(name):
    return eval(  # our own page
        ROWS[name],
        {
            "optax": optax,
            "cgfac": cgfac,
            "scale_by_cgfac": scale_by_cgfac,
            "scale_by_cgfac_with_rate": scale_by_cgfac_with_rate(1.0),
            "mask": {"hidden": True, "out": False},
            "labels": {"hidden": "cgfac", "out": "adam"},
        },
    )


def train(tx, steps, emit=None, problem=problem, **more):
    """Trains the small network; `more` are functions of the gradient."""
    p = problem()

    @jax.jit
    def step(params, state, curvature, rng):
        value, grads = jax.value_and_grad(p.loss)(params, p.batch)
        curvature = p.estimator.update(curvature, params, p.batch["x"], rng=rng)
        extra = {name: fn(grads) for name, fn in more.items()}
        if emit is not None:
            extra["emit"] = emit(state)
        updates, state = tx.update(
            grads,
            state,
            params,
            curvature=curvature,
            value=value,
            value_fn=lambda p_, curvature=None: p.loss(p_, p.batch),
            **extra,
        )
        return optax.apply_updates(params, updates), state, curvature, value

    params, state, curvature = p.start(tx)
    losses = []
    for i in range(steps):
        params, state, curvature, value = step(
            params, state, curvature, jax.random.key(i)
        )
        losses.append(float(value))
    return params, state, losses


def test_the_table_has_what_it_promises():
    assert set(ROWS) >= PROMISED


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_trains(name):
    more = {"grad": lambda g: g} if "line search" in name else {}
    emit = (lambda state: state.mini_step == 1) if name == "MultiSteps" else None
    _, _, losses = train(build(name), 40, emit, **more)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.75 * losses[0]


def test_the_names_of_a_named_chain_reach_its_states():
    _, state, _ = train(build("named_chain"), 2)
    assert int(state["curved"].cgfac_count) == 2


@pytest.mark.parametrize("name", ["add_decayed_weights", "trace"])
def test_what_comes_after_the_solve_is_applied_to_the_solution(name):
    given = ingredients()
    tx = build(name)
    solved, _ = update(scale_by_cgfac(0.1), scale_by_cgfac(0.1).init(given.params))
    updates, state = update(tx, tx.init(given.params))
    if name == "trace":
        expected = jax.tree.map(lambda x: -0.02 * x, solved)
        assert_trees_close(state[1].trace, solved)
    else:
        expected = jax.tree.map(
            lambda x, p: -0.3 * (x + 1e-4 * p), solved, given.params
        )
    assert_trees_close(updates, expected)


def test_clipping_scales_the_gradient_before_the_solve():
    given = ingredients()
    norm = float(optax.tree.norm(given.grads))
    tx = optax.chain(optax.clip_by_global_norm(norm / 4), scale_by_kfac(0.1))
    clipped, _ = update(tx, tx.init(given.params))
    quarter = jax.tree.map(lambda g: g / 4, given.grads)
    tx = scale_by_kfac(0.1)
    expected, _ = update(tx, tx.init(given.params), grads=quarter)
    assert_trees_close(clipped, expected, rtol=1e-4)


def test_a_schedule_of_dampings_is_the_damping_of_each_step():
    given, tx = ingredients(), build("inject_hyperparams")
    state, seen = tx.init(given.params), []
    for _ in range(3):
        _, state = update(tx, state)
        seen.append(float(optax_cgfac.diagnostics(state)["damping"]))
    np.testing.assert_allclose(seen, [0.3 - 0.2 * i / 50 for i in range(3)], rtol=1e-5)


@pytest.mark.parametrize("name", ["backtracking line search", "zoom line search"])
def test_a_line_search_finds_a_step_that_descends(name):
    _, state, losses = train(build(name), 12, grad=lambda g: g)
    assert np.all(np.diff(losses) <= 1e-6)
    assert float(optax.tree.get(state, "learning_rate")) > 0


def test_an_optimizer_between_two_micro_batches_solves_once():
    """Counted where it runs: `MultiSteps` alone runs all, and `where`s the result."""
    solves = []

    def counted(tx):
        def update(*args, **kwargs):
            jax.debug.callback(lambda: solves.append(1))
            return tx.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    every = 3

    def emits(state):
        return state.mini_step == every - 1

    plain = optax.MultiSteps(counted(cgfac()), every)
    train(plain, 2 * every)
    jax.effects_barrier()
    assert len(solves) == 2 * every
    solves.clear()
    skipping = optax.MultiSteps(
        optax.conditionally_transform(
            counted(cgfac()), lambda step, emit, **_: emit, forward_extra_args=True
        ),
        every,
    )
    params, state, _ = train(skipping, 2 * every, emits)
    jax.effects_barrier()
    assert len(solves) == 2
    assert int(optax.tree.get(state, "cgfac_count")) == 2
    expected, _, _ = train(optax.MultiSteps(cgfac(), every), 2 * every)
    assert_trees_close(params, expected)


def test_micro_batches_add_up_to_the_step_of_the_batch():
    """Rows of both halves in the window, the mean gradient: the step of the whole."""
    whole = make_problem(kind="exact", rows=8, window=1)
    half = make_problem(kind="exact", rows=4, window=2)
    halves = [
        jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], whole.batch) for i in (0, 1)
    ]
    inner = scale_by_cgfac(0.1, max_steps=30, rtol=0.0)
    tx = optax.MultiSteps(
        optax.conditionally_transform(
            inner, lambda step, emit, **_: emit, forward_extra_args=True
        ),
        2,
    )
    params, state = whole.params, tx.init(whole.params)
    curvature = half.estimator.init(params, halves[0]["x"])
    for i, batch in enumerate(halves):
        grads = jax.grad(half.loss)(params, batch)
        curvature = half.estimator.update(curvature, params, batch["x"])
        updates, state = tx.update(
            grads, state, params, curvature=curvature, emit=jnp.array(i == 1)
        )
    curvature = whole.estimator.update(whole.curvature(), params, whole.batch["x"])
    grads = jax.grad(whole.loss)(params, whole.batch)
    expected, _ = inner.update(grads, inner.init(params), params, curvature=curvature)
    assert_trees_close(updates, expected, rtol=2e-3, atol=1e-4)


def test_an_average_of_the_parameters_is_kept_beside_them():
    average = optax.ema(0.5, debias=False)
    params = problem().params
    state = average.init(params)
    _, state = average.update(params, state)
    moved = jax.tree.map(lambda p: p + 1, params)
    averaged, _ = average.update(moved, state)
    expected = jax.tree.map(lambda p: 0.25 * p + 0.5 * (p + 1), params)
    assert_trees_close(averaged, expected)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_fields_are_found_and_set_by_name(wrap):
    tx = wrap(cgfac(damping=0.2))
    state = tx.init(problem().params)
    assert float(optax.tree.get(state, "damping")) == pytest.approx(0.2)
    state = optax.tree.set(state, damping=jnp.float32(0.5))
    assert float(optax_cgfac.diagnostics(state)["damping"]) == 0.5
    _, state = update(tx, state)
    assert int(optax.tree.get(state, "cgfac_count")) == 1


@pytest.mark.parametrize("name", ["lookahead", "flatten"])
def test_wrappers_that_lose_what_is_needed_are_refused_with_words(name):
    if name == "flatten":
        tx = optax.flatten(scale_by_cgfac(0.1))
        with pytest.raises(ValueError, match=r"never seen|not initialised|belongs"):
            update(tx, tx.init(problem().params))
        return
    fast = optax.chain(optax.lookahead(scale_by_cgfac(0.1), 5, 0.5))
    params = optax.LookaheadParams(problem().params, problem().params)
    with pytest.raises(ValueError, match="needs the curvature"):
        fast.update(
            ingredients().grads,
            fast.init(params),
            params,
            curvature=ingredients().curvature,
        )


def test_scalars_are_flat_and_waited_for_by_nobody():
    p, tx = problem(), optax.chain(optax.clip(1.0), cgfac())
    step = p.step(tx)

    @jax.jit
    def logged(state, batch, rng):
        state, loss = step(state, batch, rng)
        return state, optax_cgfac.scalars(state[1], state[0]) | {"loss": loss}

    state = p.start(tx)
    state, _ = logged(state, p.batch, jax.random.key(0))
    rng = jax.random.key(1)
    with jax.transfer_guard("disallow"):
        state, found = logged(state, p.batch, rng)
    assert {"cgfac/damping", "cgfac/layers/hidden/residual", "loss"} <= set(found)
    assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())
    nested = optax_cgfac.diagnostics(state[1])
    assert float(found["cgfac/step_size"]) == float(nested["step_size"])


def test_the_train_state_takes_the_steps_of_a_plain_loop():
    p, tx = problem(), cgfac()
    state = optax_cgfac.TrainState.create(
        apply_fn=model_fn, params=p.params, tx=tx, curvature=p.curvature()
    )

    @jax.jit
    def step(state, batch, rng):
        loss, grads = jax.value_and_grad(p.loss)(state.params, batch)
        curvature = p.estimator.update(
            state.curvature, state.params, batch["x"], rng=rng
        )
        return state.apply_gradients(
            grads=grads,
            curvature=curvature,
            value=loss,
            value_fn=lambda q: p.loss(q, batch),
        )

    plain, plain_step = p.start(tx), jax.jit(p.step(tx))
    for i in range(3):
        rng = jax.random.key(i)
        state = step(state, p.batch, rng)
        plain, _ = plain_step(plain, p.batch, rng)
    assert int(state.step) == 3
    assert state.tx is tx
    assert_trees_close(state.params, plain[0], rtol=0, atol=0)
    assert int(state.curvature.num_updates) == 3


def test_the_train_state_replaces_fields_and_hands_on_other_arguments():
    seen = []

    def tell(updates, state, params=None, **extra):
        seen.append(set(extra))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), tell)
    state = optax_cgfac.TrainState.create(apply_fn=None, params=problem().params, tx=tx)
    grads = ingredients().grads
    state = state.apply_gradients(
        grads=grads, extra_args={"emit": True}, apply_fn=model_fn
    )
    assert seen == [{"emit"}]
    assert state.step == 1
    assert state.apply_fn is model_fn
    # Transformations that take no arguments are welcome, too.
    state = optax_cgfac.TrainState.create(
        apply_fn=None, params=problem().params, tx=optax.sgd(1.0)
    )
    moved = state.apply_gradients(grads=grads, value=jnp.zeros(()))
    expected = jax.tree.map(lambda p, g: p - g, problem().params, grads)
    assert_trees_close(moved.params, expected)


@pytest.mark.parametrize("option", ["damping_interval", "model_interval"])
def test_intervals_may_be_injected(option):
    tx = optax.inject_hyperparams(cgfac)(**{option: 3})
    _, state, losses = train(tx, 6)
    assert losses[-1] < losses[0]
    assert int(state.hyperparams[option]) == 3


def test_figures_of_a_masked_layer_have_no_names_of_others():
    mask = {"hidden": False, "out": True}
    tx = optax.masked(scale_by_kfac(0.1), mask)
    given = ingredients()
    _, state = update(tx, tx.init(given.params))
    assert set(optax_cgfac.diagnostics(state, given.params)["layers"]) == {"leaf_0"}
