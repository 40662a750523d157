"""Capture in NNX: every supported way to write a layer, without touching it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from models import BATCH, NUM_EXAMPLES
from models.nnx_modules import Mlp, Stateful, rngs, shifted
from models.reported import REPORTED
from models.table import NNX_CASES as CASES
from optax_cgfac import cgfac, diagnostics, fisher_estimator, value_and_grad
from optax_cgfac.layers.layer import leaves_from_matrix
from optax_cgfac.operators.rows import to_dense
from optax_cgfac.utils.paths import leaves_by_path, text

EPS = np.finfo(np.float32).eps


def assert_close(actual, expected, tolerance):
    # Softmax does not see the bias of the keys.
    models.assert_close(actual, expected, tolerance, zeros=("attend/key/bias",))


def by_name(state):
    return {text(path): leaf for path, leaf in leaves_by_path(state).items()}


def rebuilt_gradients(curvature, grads):
    """The gradient of every covered leaf as ``aᵀg / N``."""
    leaves, rebuilt = leaves_by_path(grads), {}
    for tag in curvature.tags:
        a, g = curvature.layers[tag.name]
        matrix = to_dense(a).swapaxes(-1, -2) @ g / NUM_EXAMPLES
        own = {path: leaves[path] for path in tag.leaves}
        rebuilt |= leaves_from_matrix(tag, matrix, own)
    return {text(path): np.asarray(leaf) for path, leaf in rebuilt.items()}


def snapshot(model):
    graphdef, state = nnx.split(model)
    keys = jax.dtypes.prng_key
    arrays = [
        np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x)
        for x in jax.tree.leaves(state)
    ]
    modules = [(type(m), sorted(vars(m))) for _, m in nnx.iter_modules(model)]
    return graphdef, modules, arrays


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    for x, y in zip(after[2], before[2], strict=True):
        np.testing.assert_array_equal(x, y)


def mlp_loss(model, x):
    return jnp.mean(jnp.sum(model(x) ** 2, -1))


def outputs_of(model, x):
    return model(x)


@pytest.mark.parametrize("name", CASES)
def test_rows_rebuild_the_gradient_and_change_nothing(name):
    case = CASES[name]()
    # A module for each: what a call does to its state, the other must do too.
    plain, captured = nnx.clone(case.model), nnx.clone(case.model)
    value, grads = nnx.jit(nnx.value_and_grad(case.loss))(plain, case.inputs)

    got_value, got_grads, curvature = nnx.jit(value_and_grad(case.loss))(
        captured, case.inputs
    )

    found = {tag.name: (tag.kind, tag.positions) for tag in curvature.tags}
    wanted = {
        k: (kind, 1 if kind in ("norm", "prelu") else n)
        for k, (kind, n) in case.layers.items()
    }
    assert found == wanted
    assert curvature.spec.uncovered == ()
    tolerance = 2e-2 if name == "half precision" else 1e-5
    assert_close(rebuilt_gradients(curvature, grads), by_name(grads), tolerance)
    np.testing.assert_allclose(got_value, value, rtol=4 * EPS)
    assert jax.tree.structure(got_grads) == jax.tree.structure(grads)
    assert_close(by_name(got_grads), by_name(grads), 8 * EPS)
    before, after = snapshot(plain), snapshot(captured)
    for x, y in zip(before[2], after[2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert before[1] == after[1]


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
@pytest.mark.parametrize("name", CASES)
def test_an_estimator_leaves_the_module_as_it_was(name):
    case = CASES[name]()
    before = snapshot(case.model)
    estimator = fisher_estimator(case.model_fn, "squared_error", examples=3)
    curvature = estimator.init(case.model, case.inputs)
    assert {tag.name for tag in curvature.tags} == case.layers.keys()
    update = nnx.jit(estimator.update)
    update(curvature, case.model, case.inputs, rng=jax.random.key(0))
    assert_untouched(case.model, before)


@pytest.mark.parametrize("name", REPORTED)
def test_what_is_not_covered_is_reported(name):
    model, inputs, covered, uncovered, reason = REPORTED[name]()
    shifted(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no curvature") as caught:
        value_and_grad(mlp_loss)(model, inputs)
    assert reason in str(caught.value)
    _, grads, curvature = value_and_grad(mlp_loss, fallback=True)(model, inputs)
    assert_untouched(model, before)
    assert {tag.name for tag in curvature.tags} == set(covered)
    paths = {text(path[:-1]) or "." for path, _ in curvature.spec.uncovered}
    assert paths == set(uncovered)
    expected = by_name(nnx.grad(mlp_loss)(model, inputs))
    tagged = rebuilt_gradients(curvature, grads)
    assert_close(tagged, {name: expected[name] for name in tagged}, 1e-5)
    for path, leaf in by_name(grads).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6)


def test_an_error_of_the_users_comes_through_and_leaves_nothing_behind():
    model = Mlp(rngs())
    before = snapshot(model)

    def broken(model, x):
        model(x)
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        value_and_grad(broken)(model, BATCH)
    assert_untouched(model, before)
    value_and_grad(mlp_loss)(model, BATCH)


def test_what_the_loss_changes_and_adds_reaches_the_module():
    class Sowing(Stateful):
        def __call__(self, x):
            self.inputs = nnx.Intermediate(x)
            return super().__call__(x)

    plain, captured = Sowing(), Sowing()
    for _ in range(2):
        nnx.value_and_grad(mlp_loss)(plain, BATCH)
        value_and_grad(mlp_loss)(captured, BATCH)
    np.testing.assert_allclose(captured.norm.mean[...], plain.norm.mean[...])
    assert captured.dropout.rngs.count[...] == 2
    np.testing.assert_array_equal(captured.inputs[...], BATCH)
    assert sorted(vars(captured)) == sorted(vars(plain))


# ------------------------------------------------------------------ the estimator


def assert_same_rows(one, other):
    assert one.tags == other.tags
    for name, rows in one.layers.items():
        for x, y in zip(rows, other.layers[name], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_state_is_refused():
    graphdef, params = nnx.split(Mlp(rngs()))
    estimator = fisher_estimator(
        lambda state, x: nnx.merge(graphdef, state)(x), "squared_error", examples=4
    )
    message = "must be the nnx.Module itself, got its nnx.State. Pass the module"
    with pytest.raises(TypeError, match=message):
        estimator.init(params, BATCH)
    with pytest.raises(TypeError, match=message):
        value_and_grad(lambda s, x: mlp_loss(nnx.merge(graphdef, s), x))(params, BATCH)


def test_a_module_that_is_merged_inside_jit_and_scan():
    model = Mlp(rngs())
    graphdef, state = nnx.split(model)
    estimator = fisher_estimator(outputs_of, "squared_error", examples=4, window=2)
    start = estimator.init(model, BATCH)

    def body(curvature, key):
        merged = nnx.merge(graphdef, state)
        return estimator.update(curvature, merged, BATCH, rng=key), None

    keys = jax.random.split(jax.random.key(0), 3)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, keys))(start)
    expected = start
    for key in keys:
        expected = estimator.update(expected, model, BATCH, rng=key)
    assert_same_rows(scanned, expected)


def test_a_second_step_compiles_nothing():
    model = Stateful()
    tx = nnx.Optimizer(model, cgfac(), wrt=nnx.Param)

    def model_fn(model, x):
        return nnx.view(model, deterministic=True, use_running_average=True)(x)

    estimator = fisher_estimator(
        model_fn, "squared_error", examples=4, model_examples=6
    )
    curvature = estimator.init(model, BATCH)
    traces = []

    @nnx.jit
    def step(model, tx, curvature, x, rng):
        traces.append(1)
        value, grads = nnx.value_and_grad(mlp_loss)(model, x)
        curvature = estimator.update(curvature, model, x, rng=rng)
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)

        def value_fn(params):
            return mlp_loss(nnx.merge(graphdef, params, rest, copy=True), x)

        tx.update(model, grads, curvature=curvature, value=value, value_fn=value_fn)
        return value, curvature

    values = []
    for seed in range(6):
        value, curvature = step(model, tx, curvature, BATCH, jax.random.key(seed))
        values.append(float(value))
    assert len(traces) == 1
    assert values[-1] < 0.2 * values[0]


def test_statistics_as_long_as_the_batch_are_not_sliced():
    model = nnx.Sequential(
        nnx.Linear(5, NUM_EXAMPLES, rngs=rngs()),
        nnx.BatchNorm(NUM_EXAMPLES, use_running_average=True, rngs=rngs()),
        nnx.Linear(NUM_EXAMPLES, 3, rngs=rngs()),
    )
    estimator = fisher_estimator(outputs_of, "squared_error", examples=4)
    curvature = estimator.init(model, BATCH)
    curvature = estimator.update(curvature, model, BATCH, rng=jax.random.key(0))
    assert curvature.model_inputs.args[0].shape == (NUM_EXAMPLES, 5)
    assert int(curvature.num_updates) == 1


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
def test_the_module_may_be_donated_with_the_curvature():
    model = Stateful()
    estimator = fisher_estimator(outputs_of, "squared_error", examples=4)
    curvature = estimator.init(model, BATCH)
    ids = {id(x) for x in jax.tree.leaves(nnx.state(model))}
    assert not ids & {id(x) for x in jax.tree.leaves(curvature)}


def test_threads_do_not_see_each_other():
    model, problems = Mlp(rngs()), []
    expected, expected_grads, expected_curvature = value_and_grad(mlp_loss)(
        model, BATCH
    )
    before = snapshot(model)

    def work(index):
        run = (nnx.value_and_grad, value_and_grad)[index % 2](mlp_loss)
        try:
            for _ in range(3):
                value, grads, *curvature = run(nnx.clone(model), BATCH)
                np.testing.assert_allclose(value, expected, rtol=1e-6)
                assert_close(by_name(grads), by_name(expected_grads), 1e-6)
                for found in curvature:
                    assert_same_rows(found, expected_curvature)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert_untouched(model, before)


# ------------------------------------------------------------------ the optimizer


@pytest.mark.parametrize(
    "tx",
    [
        cgfac(),
        cgfac(0.1, damping=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), cgfac(0.1, damping=0.1)),
    ],
    ids=["adaptive", "fixed", "chain"],
)
def test_an_optimizer_of_nnx_steps_as_optax_does(tx):
    model = Mlp(rngs())
    graphdef, params = nnx.split(nnx.clone(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    opt_state = tx.init(params)
    estimator = fisher_estimator(outputs_of, "squared_error", examples=4)
    curvature = estimator.init(model, BATCH)

    def value_fn(params):
        return mlp_loss(nnx.merge(graphdef, params), BATCH)

    for seed in range(2):
        value, grads = nnx.value_and_grad(mlp_loss)(model, BATCH)
        curvature = estimator.update(curvature, model, BATCH, rng=jax.random.key(seed))
        extra = {"curvature": curvature, "value": value, "value_fn": value_fn}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads, **extra)
    assert_close(by_name(nnx.state(model)), by_name(params), 1e-5)
    # What `nnx.Optimizer` wraps is shown as plain arrays.
    seen, expected = diagnostics(optimizer.opt_state), diagnostics(opt_state)
    assert jax.tree.structure(seen) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_the_loop_of_the_docs_draws_the_same_dropout_masks_for_the_moved_loss():
    module = nnx.Sequential(
        nnx.Linear(4, 16, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        nnx.Linear(16, 2, rngs=nnx.Rngs(2)),
    )
    x = jnp.ones((8, 4))

    @nnx.jit
    def step(module):
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        rest = jax.tree.map(jnp.copy, rest)
        value, _ = nnx.value_and_grad(mlp_loss)(module, x)
        return value, mlp_loss(nnx.merge(graphdef, params, rest, copy=True), x)

    seen = []
    for _ in range(2):
        value, again = step(module)
        assert float(value) == pytest.approx(float(again), rel=1e-6)
        seen.append(float(value))
    assert seen[0] != seen[1]
