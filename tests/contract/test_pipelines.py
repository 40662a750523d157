"""The documented compositions: code and table of docs/pipelines.md are what is run."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cgfac
from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac
from steps import describe, ingredients, make_problem, model_fn, problem, update

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()


def rows(table):
    text = PAGE.split(f"<!-- {table}: start -->")[1].split(f"<!-- {table}: end -->")[0]
    found = re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|", text, re.MULTILINE)
    return {name.replace("`", ""): code for name, code in found}


ROWS, AROUND = rows("table"), rows("around")

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
PROMISED_AROUND = {
    "averages of the parameters",
    "donation",
    "lax.scan over steps",
    "vmap over seeds",
    "one number of the state",
    "to change one",
    "what is shaped like the parameters",
    "all figures of the last step",
    "the same for a logger",
}


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def build(name):
    return eval(  # our own page
        ROWS[name],
        {
            "optax": optax,
            "cgfac": cgfac,
            "scale_by_cgfac": scale_by_cgfac,
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
    assert set(AROUND) >= PROMISED_AROUND


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_trains(name):
    more = {"grad": lambda g: g} if "line search" in name else {}
    emit = (lambda state: state.mini_step == 1) if name == "MultiSteps" else None
    _, _, losses = train(build(name), 40, emit, **more)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.75 * losses[0]


def test_parameters_to_evaluate_under_schedule_free():
    params, state, _ = train(build("schedule_free"), 40)
    p = problem()
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    assert float(p.loss(averaged, p.batch)) < 0.75 * float(p.loss(p.params, p.batch))


@pytest.fixture(scope="module")
def around():
    """What the rows of the second table take, after three steps of training."""
    p, tx = problem(), cgfac()
    step, keys = p.step(tx), jax.random.split(jax.random.key(0), 3)
    state, losses = jax.jit(lambda s: jax.lax.scan(scanned(step, p), s, keys))(
        p.start(tx)
    )
    # Other parameters for every seed.
    params = [jax.tree.map(lambda w, c=c: c * w, p.params) for c in (1.0, 1.5, 2.0)]
    starts = [(each, tx.init(each), p.curvature()) for each in params]
    average = optax.ema(0.95)
    return {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "optax_cgfac": optax_cgfac,
        "tx": tx,
        "step": step,
        "state": state,
        "states": jax.tree.map(lambda *xs: jnp.stack(xs), *starts),
        "params": state[0],
        "opt_state": state[1],
        "curvature": state[2],
        "batch": p.batch,
        "key": jax.random.key(7),
        "keys": keys,
        "loss": losses[-1],
        "average": average,
        "average_state": average.init(state[0]),
    }


def scanned(step, p):
    return lambda state, key: step(state, p.batch, key)


@pytest.mark.parametrize("name", AROUND)
def test_every_row_around_the_optimizer_runs(name, around):
    before = dict(around)
    before["state"] = jax.tree.map(jnp.copy, around["state"])  # one row donates it
    space = dict(before)
    exec(AROUND[name], space)  # our own page
    assigned = AROUND[name].split(" = ")[0].split(", ")
    for new in assigned:
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(space[new]))
        if new in before:
            described = [describe(tree[new]) for tree in (space, before)]
            assert described[0] == described[1]
    if name == "donation":
        assert before["state"][0]["out"]["kernel"].is_deleted()
        assert float(space["loss"]) < float(around["loss"])
    if name == "lax.scan over steps":
        assert float(space["losses"][-1]) < float(around["loss"])
    if name == "averages of the parameters":
        assert_trees_close(space["averaged"], around["params"])


def test_an_ensemble_of_seeds_trains_as_each_of_them_alone(around):
    """Ten steps of three seeds in one program, everything batched."""
    step, batch, states = around["step"], around["batch"], around["states"]
    keys = jax.random.split(jax.random.key(3), (10, 3))

    @jax.jit
    def together(states):
        return jax.lax.scan(
            lambda s, keys: jax.vmap(step, in_axes=(0, None, 0))(s, batch, keys),
            states,
            keys,
        )

    @jax.jit
    def alone(state, keys):
        return jax.lax.scan(lambda s, key: step(s, batch, key), state, keys)

    many, losses = together(states)
    for seed in range(3):
        state = jax.tree.map(lambda x, i=seed: x[i], states)
        one, expected = alone(state, keys[:, seed])
        np.testing.assert_allclose(losses[:, seed], expected, rtol=1e-3)
        found = jax.tree.map(lambda x, i=seed: x[i], many[0])
        assert_trees_close(found, one[0], rtol=1e-2, atol=1e-3)
    assert np.all(losses[-1] < 0.8 * losses[0])


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


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_an_optimizer_between_two_micro_batches_solves_once(solver):
    """Counted where it runs: `MultiSteps` alone runs all, and `where`s the result."""
    solves = []  # iterations of each
    optimizer = functools.partial(cgfac, solver=solver)

    def counted(tx):
        def update(*args, **kwargs):
            updates, state = tx.update(*args, **kwargs)
            jax.debug.callback(
                lambda n: solves.append(int(n)), jnp.sum(state.info.num_steps)
            )
            return updates, state

        return optax.GradientTransformationExtraArgs(tx.init, update)

    every = 3

    def emits(state):
        return state.mini_step == every - 1

    plain = optax.MultiSteps(counted(optimizer()), every)
    train(plain, 2 * every)
    jax.effects_barrier()
    assert len(solves) == 2 * every
    iterations = sum(solves)
    assert (iterations > 0) == (solver == "cg")
    solves.clear()
    skipping = optax.MultiSteps(
        optax.conditionally_transform(
            counted(optimizer()), lambda step, emit, **_: emit, forward_extra_args=True
        ),
        every,
    )
    params, state, _ = train(skipping, 2 * every, emits)
    jax.effects_barrier()
    assert len(solves) == 2
    assert sum(solves) <= iterations / 2
    assert int(optax.tree.get(state, "cgfac_count")) == 2
    expected, _, _ = train(optax.MultiSteps(optimizer(), every), 2 * every)
    assert_trees_close(params, expected)


def test_micro_batches_add_up_to_the_step_of_the_batch():
    """Rows of both halves in the window, the mean gradient: the step of the whole."""
    whole = make_problem(kind="exact", examples=8, window=1)
    half = make_problem(kind="exact", examples=4, window=2)
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


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_fields_are_found_and_set_by_name(wrap):
    tx = wrap(cgfac(damping=0.2))
    state = tx.init(problem().params)
    assert float(optax.tree.get(state, "damping")) == pytest.approx(0.2)
    state = optax.tree.set(state, damping=jnp.float32(0.5))
    assert float(optax_cgfac.diagnostics(state)["damping"]) == 0.5
    _, state = update(tx, state)
    assert int(optax.tree.get(state, "cgfac_count")) == 1


@pytest.mark.parametrize("name", ROWS)
def test_every_row_without_a_curvature_says_what_to_do(name):
    tx, given = build(name), ingredients()
    more = {"emit": jnp.array(True)} if name == "MultiSteps" else {}
    with pytest.raises(ValueError, match="needs the curvature of this step"):
        tx.update(
            given.grads,
            tx.init(given.params),
            given.params,
            value=given.value,
            value_fn=lambda p, curvature=None: problem().loss(p, problem().batch),
            grad=given.grads,
            **more,
        )


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


def test_rows_of_every_micro_batch_are_captured_where_it_is_said():
    """With a full window, too, and batches that are large enough to leave some out."""
    x = jax.random.normal(jax.random.key(0), (64, 5))
    for every, expected in ((None, 5), (1, 8)):
        estimator = optax_cgfac.fisher_estimator(
            model_fn, "squared_error", examples=8, window=4, capture_every=every
        )
        step = jax.jit(estimator.update)
        curvature = estimator.init(problem().params, x)
        for i in range(8):
            curvature = step(curvature, problem().params, x, rng=jax.random.key(i))
        assert int(curvature.num_updates) == expected


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
