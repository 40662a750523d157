"""The documented compositions: code and table of docs/pipelines.md are what is run."""

import functools
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cgfac
from optax_cgfac import TrainState, cgfac, scale_by_cgfac
from steps import first, ingredients, make_problem, model_fn, problem, run, update
from trees import assert_trees_close, describe, is_finite, scaled

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()


def rows(table):
    text = PAGE.split(f"<!-- {table}: start -->")[1].split(f"<!-- {table}: end -->")[0]
    found = re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|", text, re.MULTILINE)
    return {name.replace("`", ""): code for name, code in found}


ROWS, AROUND = rows("table"), rows("around")


def build(name):
    names = {"optax": optax, "cgfac": cgfac, "scale_by_cgfac": scale_by_cgfac}
    names |= {"mask": {"hidden": True, "out": False}}
    names |= {"labels": {"hidden": "cgfac", "out": "adam"}}
    return eval(ROWS[name], names)  # our own page


def train(tx, steps, emit=None, **more):
    """Trains the small network; `more` are functions of the gradient."""
    p = problem()

    @jax.jit
    def step(params, state, curvature, rng):
        value, grads = jax.value_and_grad(p.loss)(params, p.batch)
        curvature = p.estimator.update(curvature, params, p.batch["x"], rng=rng)
        extra = {name: fn(grads) for name, fn in more.items()}
        extra |= {} if emit is None else {"emit": emit(state)}
        extra |= {"curvature": curvature, "value": value}
        extra |= {"value_fn": lambda p_, curvature=None: p.loss(p_, p.batch)}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, curvature, value

    *state, losses = *p.start(tx), []
    for i in range(steps):
        *state, value = step(*state, jax.random.key(i))
        losses.append(float(value))
    return state[0], state[1], losses


def test_no_row_is_lost():
    assert len(ROWS) >= 15
    assert len(AROUND) >= 9


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_trains(name):
    searches = "line search" in name
    more = {"grad": lambda g: g} if searches else {}
    emit = (lambda state: state.mini_step == 1) if name == "MultiSteps" else None
    params, state, losses = train(build(name), 40, emit, **more)
    assert is_finite(losses)
    assert losses[-1] < 0.75 * losses[0]
    if searches:
        assert np.all(np.diff(losses[:12]) <= 1e-6)
        assert float(optax.tree.get(state, "learning_rate")) > 0
    if name == "named_chain":
        assert int(state["curved"].cgfac_count) == 40
    if name == "schedule_free":
        averaged = optax.contrib.schedule_free_eval_params(state, params)
        assert float(problem().loss(averaged, problem().batch)) < 0.75 * losses[0]


@pytest.fixture(scope="module")
def around():
    """What the rows of the second table take, after three steps of training."""
    p, tx, average = problem(), cgfac(), optax.ema(0.95)
    state, losses = run(p, tx, 3)
    # Other parameters for every seed.
    params = [scaled(factor, p.params) for factor in (1.0, 1.5, 2.0)]
    starts = [(each, tx.init(each), p.curvature()) for each in params]
    return {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "optax_cgfac": optax_cgfac,
        "tx": tx,
        "step": p.step(tx),
        "state": state,
        "states": jax.tree.map(lambda *xs: jnp.stack(xs), *starts),
        "params": state[0],
        "opt_state": state[1],
        "curvature": state[2],
        "batch": p.batch,
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(0), 3),
        "loss": losses[-1],
        "average": average,
        "average_state": average.init(state[0]),
    }


@pytest.mark.parametrize("name", AROUND)
def test_every_row_around_the_optimizer_runs(name, around):
    before = dict(around)
    before["state"] = jax.tree.map(jnp.copy, around["state"])  # one row donates it
    space = dict(before)
    exec(AROUND[name], space)  # our own page
    for new in AROUND[name].split(" = ")[0].split(", "):
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(space[new]))
        if new in before:
            assert describe(space[new]) == describe(before[new])
    if name == "donation":
        assert before["state"][0]["out"]["kernel"].is_deleted()
        assert float(space["loss"]) < float(around["loss"])
    if name == "lax.scan over steps":
        assert float(space["losses"][-1]) < float(around["loss"])
    if name == "averages of the parameters":
        assert_trees_close(space["averaged"], around["params"])
    if name == "vmap over seeds":  # as each of them alone
        for i, key in enumerate(around["keys"]):
            member = operator.itemgetter(i)
            start, found = jax.tree.map(member, (around["states"], space["states"]))
            expected, _ = jax.jit(around["step"])(start, around["batch"], key)
            assert_trees_close(found[0], expected[0], rtol=1e-2, atol=1e-3)


def test_what_comes_around_the_solve_is_applied_to_its_result_or_gradient():
    given = ingredients()
    solved, _ = first(scale_by_cgfac(0.1))
    updates, state = first(build("trace"))
    assert_trees_close(updates, scaled(-0.02, solved))
    assert_trees_close(state[1].trace, solved)
    updates, _ = first(build("add_decayed_weights"))
    decayed = jax.tree.map(lambda x, p: x + 1e-4 * p, solved, given.params)
    assert_trees_close(updates, scaled(-0.3, decayed))


def test_numbers_are_injected_and_found_and_set_by_name():
    tx = build("inject_hyperparams")
    state, seen = tx.init(ingredients().params), []
    for _ in range(3):
        _, state = update(tx, state)
        seen.append(float(optax_cgfac.diagnostics(state)["damping"]))
    np.testing.assert_allclose(seen, [0.3 - 0.2 * i / 50 for i in range(3)], rtol=1e-5)
    for option in ("damping_interval", "model_interval"):
        tx = optax.inject_hyperparams(cgfac)(**{option: 3})
        _, state, losses = train(tx, 6)
        assert losses[-1] < losses[0]
        assert int(state.hyperparams[option]) == 3
    for tx in (cgfac(damping=0.2), optax.chain(cgfac(damping=0.2))):
        state = tx.init(problem().params)
        assert float(optax.tree.get(state, "damping")) == pytest.approx(0.2)
        state = optax.tree.set(state, damping=jnp.float32(0.5))
        assert float(optax_cgfac.diagnostics(state)["damping"]) == 0.5
        _, state = update(tx, state)
        assert int(optax.tree.get(state, "cgfac_count")) == 1


def emitting(inner):
    """An optimizer that runs only where a micro-batch is the last one."""
    return optax.conditionally_transform(
        inner, lambda step, emit, **_: emit, forward_extra_args=True
    )


def test_an_optimizer_between_two_micro_batches_solves_once():
    """Counted where it runs: `MultiSteps` alone runs all, and `where`s the result."""
    solves, every = [], 3  # iterations of each
    optimizer = functools.partial(cgfac, solver="cg")

    def counted(tx):
        def update(*args, **kwargs):
            updates, state = tx.update(*args, **kwargs)
            steps = jnp.sum(state.info.num_steps)
            jax.debug.callback(lambda n: solves.append(int(n)), steps)
            return updates, state

        return optax.GradientTransformationExtraArgs(tx.init, update)

    train(optax.MultiSteps(counted(optimizer()), every), 2 * every)
    jax.effects_barrier()
    assert len(solves) == 2 * every
    iterations = sum(solves)
    solves.clear()
    skipping = optax.MultiSteps(emitting(counted(optimizer())), every)
    params, state, _ = train(skipping, 2 * every, lambda s: s.mini_step == every - 1)
    jax.effects_barrier()
    assert len(solves) == 2
    assert 0 < sum(solves) <= iterations / 2
    assert int(optax.tree.get(state, "cgfac_count")) == 2
    expected, _, _ = train(optax.MultiSteps(optimizer(), every), 2 * every)
    assert_trees_close(params, expected)


def test_micro_batches_add_up_to_the_step_of_the_batch():
    """Rows of both halves in the window, the mean gradient: the step of the whole."""
    whole = make_problem(kind="exact", examples=8, window=1)
    half = make_problem(kind="exact", examples=4, window=2)
    inner = scale_by_cgfac(0.1, max_steps=30, rtol=0.0)
    tx = optax.MultiSteps(emitting(inner), 2)
    params, state = whole.params, tx.init(whole.params)
    curvature = half.estimator.init(params, whole.batch["x"][:4])
    for i in (0, 1):
        batch = jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], whole.batch)
        grads = jax.grad(half.loss)(params, batch)
        curvature = half.estimator.update(curvature, params, batch["x"])
        emit = jnp.array(i == 1)
        updates, state = tx.update(grads, state, params, curvature=curvature, emit=emit)
    curvature = whole.estimator.update(whole.curvature(), params, whole.batch["x"])
    grads = jax.grad(whole.loss)(params, whole.batch)
    expected, _ = first(inner, grads=grads, params=params, curvature=curvature)
    assert_trees_close(updates, expected, rtol=2e-3, atol=1e-4)


def test_wrappers_that_lose_what_is_needed_are_refused_with_words():
    with pytest.raises(ValueError, match="must be of the parameters"):
        first(optax.flatten(scale_by_cgfac(0.1)))
    fast = optax.chain(optax.lookahead(scale_by_cgfac(0.1), 5, 0.5))
    given = ingredients()
    params = optax.LookaheadParams(given.params, given.params)
    with pytest.raises(ValueError, match="needs the curvature"):
        fast.update(given.grads, fast.init(params), params, curvature=given.curvature)


# ---------------------------------------------------------------- TrainState


def test_the_train_state_takes_the_steps_of_a_plain_loop():
    p, tx = problem(), cgfac()
    state = TrainState.create(
        apply_fn=model_fn, params=p.params, tx=tx, curvature=p.curvature()
    )

    def step(state, seed):
        loss, grads = jax.value_and_grad(p.loss)(state.params, p.batch)
        curvature = p.estimator.update(
            state.curvature, state.params, p.batch["x"], rng=jax.random.key(seed)
        )
        more = {"value": loss, "value_fn": lambda q: p.loss(q, p.batch)}
        return state.apply_gradients(grads=grads, curvature=curvature, **more), loss

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(3)))(state)
    (params, *_), _ = run(p, tx, 3)
    assert int(state.step) == int(state.curvature.num_updates) == 3
    assert state.tx is tx
    assert_trees_close(state.params, params, rtol=0, atol=0)


def test_the_train_state_replaces_fields_and_hands_on_other_arguments():
    seen, params, grads = [], problem().params, ingredients().grads

    def tell(updates, state, params=None, **extra):
        seen.append(set(extra))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), tell)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(
        grads=grads, extra_args={"emit": True}, apply_fn=model_fn
    )
    assert seen == [{"emit"}]
    assert state.step == 1
    assert state.apply_fn is model_fn
    # Transformations that take no arguments are welcome, too.
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0))
    moved = state.apply_gradients(grads=grads, value=jnp.zeros(()))
    expected = jax.tree.map(lambda p, g: p - g, params, grads)
    assert_trees_close(moved.params, expected)
