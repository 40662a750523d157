"""Inputs that once passed in silence, or failed far from their cause."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oracles
from models import init, normal
from optax_cgfac import diagnostics, fisher_estimator, scale_by_kfac, value_and_grad
from steps import first, ingredients


def applying(model):
    return lambda params, x: model.apply({"params": params}, x)


def loss_of(model):
    def loss_fn(params, x):
        outputs = model.apply({"params": params}, x)
        return jnp.mean(jnp.sum(outputs.reshape(len(outputs), -1) ** 2, -1))

    return loss_fn


class TimeMajor(nn.Module):
    """Scans over time first, and puts examples first only for the last layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="first")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="last")(x.swapaxes(0, 1))


@pytest.mark.parametrize("time", [3, 7, 12])
def test_time_major_layers_get_the_rows_of_every_example(time):
    model, x = TimeMajor(), normal(0, time, 6, 5)
    params = init(model, x)
    batch = {"x": x, "labels": jnp.zeros((6, 2)), "weights": jnp.ones(6)}
    # Two leaves of three say that the batch is not the first axis of the other.
    options = {} if time == 3 else {"num_examples": 6}
    run = value_and_grad(lambda p, batch: loss_of(model)(p, batch["x"]), **options)
    _, grads, curvature = run(params, batch)
    assert curvature.spec.examples == 6
    assert curvature.layers["norm"].g.shape == (6, 8)
    # An example's row of the norm is its own gradient.
    for n, row in enumerate(curvature.layers["norm"].g):
        gradient = jax.grad(loss_of(model))(params, x[:, n : n + 1])["norm"]
        expected = jnp.concatenate([gradient["scale"], gradient["bias"]])
        assert oracles.relative_error(row, expected) < 1e-5
    a, g = curvature.layers["first"]
    kernel = (a.T @ g / 6)[:-1]
    assert oracles.relative_error(kernel, grads["first"]["kernel"]) < 1e-5


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
    model, x = WithPositions(), normal(0, 4, length, 4)
    params, options = init(model, x), {"window": 400, "positions": None}
    estimator = fisher_estimator(
        applying(model), "squared_error", kind=kind, examples=4, **options
    )
    curvature = estimator.init(params, x)
    sharing = {tag.name: tag.sharing for tag in curvature.tags}
    assert sharing == {"positions": 4, "last": 1}

    def body(curvature, seed):
        rng = jax.random.key(seed)
        return estimator.update(curvature, params, x, rng=rng), None

    curvature, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(400)))(curvature)
    operator = curvature.operator("positions", structure="block")

    def outputs(table, example):
        given = params | {"positions": {"embedding": table}}
        return model.apply({"params": given}, example[None])[0]

    table = params["positions"]["embedding"]
    jacobians = [jax.jacrev(outputs)(table, x[n]).reshape(2, -1) for n in range(4)]
    expected = np.mean([2 * j.T @ j for j in oracles.float64(jacobians)], 0)
    assert oracles.relative_error(operator.to_dense(), expected) < 0.2
    assert operator.trace() == pytest.approx(np.trace(expected), rel=0.15)


def test_the_single_pass_reports_a_shared_table():
    model = WithPositions()
    run = value_and_grad(loss_of(model), num_examples=4, fallback=True)
    for length in (3, 4, 8):
        x = normal(0, 4, length, 4)
        [(path, reason)] = run(init(model, x), x)[2].spec.uncovered
        assert path == ("positions", "embedding")
        assert "the single pass cannot" in reason


class TimeFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, name="own")(x.swapaxes(0, 1)))
        return nn.Dense(2, name="last")(x[-1] * x[0])


@pytest.mark.parametrize("length", [3, 4, 5])
def test_examples_are_found_where_positions_are_as_many(length):
    model, x = TimeFirst(), normal(0, 4, length, 3)
    params, model_fn = init(model, x), applying(model)
    estimator = fisher_estimator(
        model_fn, "squared_error", kind="exact", examples=4, window=1, positions=None
    )
    curvature = jax.jit(estimator.update)(estimator.init(params, x), params, x)
    jacobian = jax.jacrev(lambda own: model_fn(params | {"own": own}, x))(params["own"])
    squares = sum(np.sum(oracles.float64(j) ** 2) for j in jax.tree.leaves(jacobian))
    trace = curvature.operator("own", structure="block").trace()
    assert float(trace) == pytest.approx(2 * squares / 4, rel=1e-5)


def test_names_come_from_the_parameters():
    """Also a dict's key that is called like Flax's own."""
    _, state = first(scale_by_kfac(0.1))
    layers = diagnostics(state, ingredients().params)["layers"]
    assert set(layers) == {"hidden", "out"}
    assert "leaf_0" in diagnostics(state)["layers"]
    model, x = nn.Dense(2), normal(0, 6, 5)
    params = {"value": init(model, x)}
    estimator = fisher_estimator(
        lambda p, x: model.apply({"params": p["value"]}, x), "squared_error", examples=4
    )
    assert [tag.name for tag in estimator.init(params, x).tags] == ["value"]
    assert "of examples for the quadratic model" in ingredients().curvature.report()
