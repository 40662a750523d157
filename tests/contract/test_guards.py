"""Inputs that once passed in silence, or failed far from their cause."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import optax_cgfac
import oracles
from models import NUM_EXAMPLES, init, normal
from steps import ingredients

X = normal(0, NUM_EXAMPLES, 5)


class TimeMajor(nn.Module):
    """Scans over time first, and puts examples first only for the last layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="first")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="last")(x.swapaxes(0, 1))


def loss_of(model):
    def loss_fn(params, x):
        outputs = model.apply({"params": params}, x)
        return jnp.mean(jnp.sum(outputs.reshape(len(outputs), -1) ** 2, -1))

    return loss_fn


@pytest.mark.parametrize("time", [3, 7, 12])
def test_time_major_layers_get_the_rows_of_every_example(time):
    model, x = TimeMajor(), normal(0, time, NUM_EXAMPLES, 5)
    params = init(model, x)
    labels = jnp.zeros((NUM_EXAMPLES, 2))

    def loss_fn(params, x, labels):
        return loss_of(model)(params, x) + 0 * jnp.sum(labels)

    run = optax_cgfac.value_and_grad(loss_fn, num_examples=NUM_EXAMPLES)
    _, grads, curvature = run(params, x, labels)
    assert curvature.layers["norm"].g.shape == (NUM_EXAMPLES, 8)
    # An example's row of the norm is its own gradient.
    own = [jax.grad(loss_of(model))(params, x[:, n : n + 1]) for n in range(6)]
    for n, gradient in enumerate(own):
        expected = [gradient["norm"]["scale"], gradient["norm"]["bias"]]
        row = curvature.layers["norm"].g[n]
        assert oracles.relative_error(row, jnp.concatenate(expected)) < 1e-5
    a, g = curvature.layers["first"]
    kernel = (a.T @ g / NUM_EXAMPLES)[:-1]
    assert oracles.relative_error(kernel, grads["first"]["kernel"]) < 1e-5


def test_the_batch_is_found_where_time_comes_first():
    model, x = TimeMajor(), normal(0, 3, NUM_EXAMPLES, 5)
    params = init(model, x)
    batch = {"x": x, "y": jnp.zeros(NUM_EXAMPLES), "w": jnp.ones(NUM_EXAMPLES)}
    run = optax_cgfac.value_and_grad(lambda p, batch: loss_of(model)(p, batch["x"]))
    assert run(params, batch)[2].spec.examples == NUM_EXAMPLES


class WithPositions(nn.Module):
    """A table of positions that all examples share."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(x.shape[1], x.shape[2], name="positions")
        x = x + table(jnp.arange(x.shape[1]))
        return nn.Dense(2, name="last")(nn.tanh(x)).mean(1)


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("length", [3, 8], ids=["other", "multiple of the rows"])
def test_a_table_that_all_examples_share_has_their_mean_fisher(length, kind):
    """Unbiased: cross terms of independent targets, or signs, vanish in the mean."""
    model, x = WithPositions(), normal(0, 8, length, 4)
    params = init(model, x)
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x),
        "squared_error",
        kind=kind,
        examples=4,
        window=400 if kind == "mc" else 200,
        positions=None,
    )
    curvature = estimator.init(params, x[:4])
    assert {tag.name: tag.sharing for tag in curvature.tags} == {
        "positions": 4,
        "last": 1,
    }
    update = jax.jit(estimator.update)
    for seed in range(curvature.spec.window):
        curvature = update(curvature, params, x[:4], rng=jax.random.key(seed))
    operator = curvature.operator("positions", structure="block")

    def outputs(table, example):
        given = params | {"positions": {"embedding": table}}
        return model.apply({"params": given}, example[None])[0]

    table = params["positions"]["embedding"]
    jacobians = [jax.jacrev(outputs)(table, x[n]).reshape(2, -1) for n in range(4)]
    expected = np.mean([2 * j.T @ j for j in oracles.float64(jacobians)], 0)
    assert oracles.relative_error(operator.to_dense(), expected) < 0.2
    trace = np.trace(expected)
    assert operator.trace() == pytest.approx(trace, rel=0.15)


@pytest.mark.parametrize("length", [3, 4, 8])
def test_the_single_pass_reports_a_shared_table(length):
    model, x = WithPositions(), normal(0, 4, length, 4)
    run = optax_cgfac.value_and_grad(loss_of(model), num_examples=4, fallback=True)
    _, _, curvature = run(init(model, x), x)
    [(path, reason)] = curvature.spec.uncovered
    assert path == ("positions", "embedding")
    assert "the single pass cannot" in reason


class ByExample(nn.Module):
    """A transform over examples puts them behind the positions."""

    @nn.compact
    def __call__(self, x):
        layer = nn.vmap(
            nn.Dense,
            variable_axes={"params": None} | optax_cgfac.capture_axes(),
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        hidden = nn.tanh(layer(2, name="own")(x.swapaxes(0, 1)))
        return nn.Dense(2, name="last")(hidden.mean(0))


class TimeFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, name="own")(x.swapaxes(0, 1)))
        return nn.Dense(2, name="last")(x[-1] * x[0])


@pytest.mark.parametrize("length", [3, 4, 5])
@pytest.mark.parametrize("model", [ByExample(), TimeFirst()], ids=["vmap", "time"])
def test_examples_are_found_where_positions_are_as_many(model, length):
    x = normal(0, 4, length, 3)
    params = init(model, x)

    def model_fn(params, x):
        return model.apply({"params": params}, x)

    estimator = optax_cgfac.fisher_estimator(
        model_fn, "squared_error", kind="exact", examples=4, window=1, positions=None
    )
    curvature = jax.jit(estimator.update)(estimator.init(params, x), params, x)
    jacobian = jax.jacrev(lambda own: model_fn(params | {"own": own}, x))(params["own"])
    squares = sum(np.sum(oracles.float64(j) ** 2) for j in jax.tree.leaves(jacobian))
    trace = curvature.operator("own", structure="block").trace()
    assert float(trace) == pytest.approx(2 * squares / 4, rel=1e-5)


def test_a_whole_batch_may_be_part_of_the_model():
    """A graph's adjacency has the size of the batch: no other batch fits."""
    model, x = nn.Dense(3), normal(0, 8, 6)
    inputs = {"x": x, "adjacency": jnp.eye(8)}
    estimator = optax_cgfac.fisher_estimator(
        lambda p, i: i["adjacency"] @ model.apply({"params": p}, i["x"]),
        "squared_error",
        examples=4,
        whole_batch=True,
        input_axes={"x": 0, "adjacency": None},
    )
    params = init(model, x)
    curvature = estimator.init(params, inputs)
    curvature = estimator.update(curvature, params, inputs, rng=jax.random.key(0))
    assert curvature.layers["."].a.shape == (32, 7)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_after_the_step_rejects_it(bad):
    given = ingredients()
    tx = optax_cgfac.cgfac(damping_interval=1)
    state = tx.init(given.params)
    updates, after = tx.update(
        given.grads,
        state,
        given.params,
        curvature=given.curvature,
        value=jnp.asarray(1.0),
        value_fn=lambda p: jnp.asarray(bad),
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert after.num_rejected == 1
    assert after.damping > state.damping


def test_diagnostics_take_names_from_the_parameters():
    given = ingredients()
    tx = optax_cgfac.scale_by_kfac(0.1)
    _, state = tx.update(
        given.grads, tx.init(given.params), given.params, curvature=given.curvature
    )
    assert set(optax_cgfac.diagnostics(state, given.params)["layers"]) == {
        "hidden",
        "out",
    }
    assert "leaf_0" in optax_cgfac.diagnostics(state)["layers"]


def test_a_dict_key_called_value_is_part_of_the_name():
    model = nn.Dense(2, name=None)
    params = {"value": init(model, X)}
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p["value"]}, x), "squared_error", examples=4
    )
    assert [tag.name for tag in estimator.init(params, X).tags] == ["value"]


def test_the_report_counts_the_examples_of_the_quadratic_model():
    assert "of examples for the quadratic model" in ingredients().curvature.report()
