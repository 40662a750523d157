"""Capture in NNX: modules are reported, changed, merged and shared as without it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import BATCH, NUM_EXAMPLES, assert_close, by_name, rebuild_gradients
from models.nnx_modules import Mlp, Stateful, rngs, shifted
from models.reported import REPORTED
from optax_cgfac import cgfac, fisher_estimator, value_and_grad
from optax_cgfac.utils.paths import text
from trees import snapshot


def mlp_loss(model, x):
    return jnp.mean(jnp.sum(model(x) ** 2, -1))


def outputs_of(model, x):
    return model(x)


@pytest.mark.parametrize("name", REPORTED)
def test_what_is_not_covered_is_reported(name):
    model, inputs, covered, uncovered, reason = REPORTED[name]()
    shifted(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no curvature") as caught:
        value_and_grad(mlp_loss)(model, inputs)
    assert reason in str(caught.value)
    _, grads, curvature = value_and_grad(mlp_loss, fallback=True)(model, inputs)
    snapshot(model).assert_equal(before)
    assert {tag.name for tag in curvature.tags} == set(covered)
    paths = {text(path[:-1]) or "." for path, _ in curvature.spec.uncovered}
    assert paths == set(uncovered)
    expected = by_name(nnx.grad(mlp_loss)(model, inputs))
    tagged = rebuild_gradients(curvature, grads)
    assert_close(tagged, {name: expected[name] for name in tagged}, 1e-5)
    for path, leaf in by_name(grads).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6)


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
    snapshot(model).assert_equal(before)
