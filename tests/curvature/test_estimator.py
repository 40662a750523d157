"""The estimator: which rows it takes, what they mean, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import BATCH, Compact, init, normal
from optax_cgfac import fisher_estimator, value_and_grad
from steps import problem

X, Y = normal(0, 6, 5), normal(1, 6, 3)
MODEL = Compact()
PARAMS = init(MODEL, X)


def model_fn(params, x):
    return MODEL.apply({"params": params}, x)


def estimate(
    fn=model_fn,
    params=PARAMS,
    inputs=X,
    *,
    times=1,
    loss="squared_error",
    rng=None,
    targets=None,
    **options,
):
    """A curvature after some updates, compiled; ``rng`` is a seed."""
    estimator = fisher_estimator(fn, loss, **({"examples": 4, "window": 2} | options))
    curvature = estimator.init(params, inputs)

    @jax.jit
    def run(curvature, params, inputs, targets):
        for i in range(times):
            key = None if rng is None else jax.random.key(rng + i)
            curvature = estimator.update(
                curvature, params, inputs, rng=key, targets=targets
            )
        return curvature

    return run(curvature, params, inputs, targets)


# ---------------------------------------------------------------- what rows are


def test_empirical_rows_are_those_of_the_single_pass():
    curvature = estimate(kind="empirical", targets=Y, examples=6, window=1)

    def loss_fn(params):
        return jnp.mean(jnp.sum((model_fn(params, X) - Y) ** 2, -1))

    _, _, expected = jax.jit(value_and_grad(loss_fn))(PARAMS)
    for name, rows in expected.layers.items():
        for got, want in zip(curvature.layers[name], rows, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def preactivations(x):
    """Both layers as plain functions of shifts of their outputs, for the oracle."""

    def outputs(shifts):
        first, last = PARAMS["Dense_0"], PARAMS["Dense_1"]
        s = x @ first["kernel"] + first["bias"] + shifts["Dense_0"]
        return jnp.tanh(s) @ last["kernel"] + last["bias"] + shifts["Dense_1"]

    first = PARAMS["Dense_0"]
    hidden = jnp.tanh(x @ first["kernel"] + first["bias"])
    shifts = {
        "Dense_0": jnp.zeros((*x.shape[:-1], 4)),
        "Dense_1": jnp.zeros((*x.shape[:-1], 3)),
    }
    return outputs, {"Dense_0": x, "Dense_1": hidden}, shifts


def dense_factors(pool, x):
    """``A`` and ``G`` of a squared error on ``pool(outputs)``, all positions."""
    outputs, inputs, shifts = preactivations(x)
    jacobians = jax.jacobian(lambda shifts: pool(outputs(shifts)))(shifts)
    factors = {}
    for name, a in inputs.items():
        a = a.reshape(-1, a.shape[-1])
        a = np.concatenate([a, np.ones((len(a), 1))], -1)
        # (N, ..., C, N, T, features): the loss is the mean over N and positions.
        j = np.asarray(jacobians[name], np.float64)
        j = j.reshape(-1, j.shape[-1])
        predictions = np.prod(pool(outputs(shifts)).shape[:-1])
        factors[name] = a.T @ a / len(a), 2 * j.T @ j / predictions
    return factors


def test_exact_rows_give_the_dense_factors():
    curvature = estimate(kind="exact", examples=6, window=1)
    for name, (a, g) in dense_factors(lambda y: y, X).items():
        dense = curvature.operator(name).to_dense()
        np.testing.assert_allclose(dense, np.kron(a, g), rtol=1e-4, atol=1e-5)


def average_g(fn, inputs, name, **options):
    """``G`` of one layer averaged over two thousand keys."""
    estimator = fisher_estimator(fn, "squared_error", examples=6, window=1, **options)
    curvature = estimator.init(PARAMS, inputs)

    def one(key):
        updated = estimator.update(curvature, PARAMS, inputs, rng=key)
        return updated.operator(name).factors()

    keys = jax.random.split(jax.random.key(5), 2000)
    return jax.jit(lambda: jax.tree.map(lambda x: x.mean(0), jax.vmap(one)(keys)))()


@pytest.mark.parametrize("name", ["Dense_0", "Dense_1"])
def test_mc_rows_average_to_the_dense_factors(name):
    a, g = average_g(model_fn, X, name)
    expected_a, expected_g = dense_factors(lambda y: y, X)[name]
    np.testing.assert_allclose(a, expected_a, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(g - expected_g) < 0.05 * np.linalg.norm(expected_g)


OVER_TIME = normal(3, 6, 3, 5)


@pytest.mark.parametrize("name", ["Dense_0", "Dense_1"])
def test_sampled_positions_are_unbiased_with_an_output_per_position(name):
    a, g = average_g(model_fn, OVER_TIME, name)
    expected_a, expected_g = dense_factors(lambda y: y, OVER_TIME)[name]
    assert np.linalg.norm(a - expected_a) < 0.05 * np.linalg.norm(expected_a)
    assert np.linalg.norm(g - expected_g) < 0.05 * np.linalg.norm(expected_g)


def pooled(params, x):
    return model_fn(params, x).mean(1)


@pytest.mark.parametrize("name", ["Dense_0", "Dense_1"])
def test_sampled_positions_are_unbiased_with_pooled_outputs(name):
    a, g = average_g(pooled, OVER_TIME, name)
    expected_a, expected_g = dense_factors(lambda y: y.mean(1), OVER_TIME)[name]
    assert np.linalg.norm(a - expected_a) < 0.05 * np.linalg.norm(expected_a)
    assert np.linalg.norm(g - expected_g) < 0.05 * np.linalg.norm(expected_g)


@pytest.mark.parametrize("num_examples", [5, 6])
def test_without_rng_every_position_of_every_example_is_met(num_examples):
    """Examples and positions cycle; after enough updates nothing was left out."""
    inputs = OVER_TIME[:num_examples]
    curvature = estimate(
        pooled,
        inputs=inputs,
        kind="exact",
        examples=num_examples,
        window=3 * num_examples,
        times=3 * num_examples,
    )
    rows = np.asarray(curvature.layers["Dense_0"].a)[:, :-1]
    met = {tuple(row) for row in rows.round(4).tolist()}
    every = {tuple(row) for row in np.asarray(inputs).reshape(-1, 5).round(4).tolist()}
    assert met == every


# ---------------------------------------------------------------- randomness


def test_the_same_rng_takes_the_same_rows_and_another_one_others():
    first, again, other = (estimate(rng=seed) for seed in (3, 3, 4))
    for name in first.layers:
        for x, y, z in zip(
            first.layers[name], again.layers[name], other.layers[name], strict=True
        ):
            np.testing.assert_array_equal(x, y)
            assert not np.allclose(x, z)


def test_examples_of_one_update_are_distinct():
    curvature = estimate(rng=0, window=1)
    rows = np.asarray(curvature.layers["Dense_0"].a)[:, :-1]
    taken = [np.flatnonzero(np.isclose(X, row).all(1)).item() for row in rows]
    assert len(set(taken)) == 4


# ---------------------------------------------------------------- inputs


def test_model_inputs_are_kept_and_replaced_by_every_update():
    estimator = fisher_estimator(
        model_fn, "squared_error", examples=2, model_examples=4
    )
    curvature = estimator.init(PARAMS, X)
    assert curvature.model_inputs.shape == (4, 5)
    later = X + 100
    curvature = jax.jit(estimator.update)(
        curvature, PARAMS, later, rng=jax.random.key(0)
    )
    assert curvature.model_inputs.shape == (4, 5)
    kept = [
        np.flatnonzero(np.isclose(later, x).all(1)).item()
        for x in curvature.model_inputs
    ]
    assert len(set(kept)) == 4


def test_the_models_examples_are_of_this_batch_also_where_no_rows_are_captured():
    """Those of an older batch are fitted already: the quadratic model would be flat."""
    estimator = fisher_estimator(
        model_fn,
        "squared_error",
        examples=2,
        model_examples=4,
        window=1,
        capture_every=3,
    )
    curvature = estimator.init(PARAMS, X)
    for i in range(3):
        batch = X + 100 * i
        old = curvature
        curvature = jax.jit(estimator.update)(old, PARAMS, batch, rng=jax.random.key(i))
        for x in curvature.model_inputs:
            assert np.isclose(batch, x).all(1).any()
    assert int(curvature.num_updates) == 1


def with_scale(params, inputs):
    return model_fn(params, inputs["x"] * inputs["scale"])


def test_leaves_without_an_axis_of_examples_stay_whole():
    inputs = {"x": X, "scale": jnp.full(5, 2.0)}
    curvature = estimate(with_scale, inputs=inputs, kind="exact", model_examples=3)
    np.testing.assert_array_equal(curvature.model_inputs["scale"], inputs["scale"])
    assert curvature.model_inputs["x"].shape == (3, 5)


def test_a_leaf_as_long_as_the_batch_needs_input_axes():
    inputs = {"x": X[:5], "scale": jnp.full(5, 2.0)}  # five examples, five features
    with pytest.raises(Exception, match=r"input_axes|shape|broadcast"):
        estimate(with_scale, inputs=inputs, kind="exact")
    axes = {"x": 0, "scale": None}
    curvature = estimate(
        with_scale, inputs=inputs, kind="exact", input_axes=axes, model_examples=3
    )
    assert curvature.model_inputs["scale"].shape == (5,)
    doubled = estimate(inputs=2 * X[:5], kind="exact", model_examples=3)
    for name, rows in doubled.layers.items():
        np.testing.assert_allclose(curvature.layers[name].a, rows.a, rtol=1e-5)


def test_input_axes_may_be_a_prefix():
    inputs = {"x": X, "scale": jnp.full(5, 2.0)}
    curvature = estimate(
        lambda p, inputs: with_scale(p, inputs[0]),
        inputs=(inputs,),
        kind="exact",
        input_axes=({"x": 0, "scale": None},),
    )
    assert curvature.spec.batched == (False, True)


def test_a_key_inside_the_inputs_travels_on():
    def noisy(params, inputs):
        noise = jax.random.normal(inputs["key"], inputs["x"].shape[1:])
        return model_fn(params, inputs["x"] + noise)

    inputs = {"x": X, "key": jax.random.key(4)}
    curvature = estimate(noisy, inputs=inputs, kind="exact", examples=6, window=1)
    expected = X + jax.random.normal(inputs["key"], (5,))
    rows = np.asarray(curvature.layers["Dense_0"].a)[:6, :-1]  # the first column's
    distances = np.abs(rows[:, None] - np.asarray(expected)).max(-1)
    assert len(rows) == 6
    np.testing.assert_array_less(distances.min(0), 1e-5)


# ---------------------------------------------------------------- jit and scan


@pytest.mark.parametrize("kind", ["mc", "exact"])
def test_updates_keep_shapes_and_run_under_jit_and_scan(kind):
    estimator = fisher_estimator(
        model_fn, "squared_error", kind=kind, examples=4, window=3
    )
    start = estimator.init(PARAMS, X)

    def body(curvature, seed):
        rng = jax.random.key(seed)
        return estimator.update(curvature, PARAMS, X, rng=rng), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(4)))(start)
    one = jax.jit(lambda c, seed: body(c, seed)[0])
    looped = start
    for seed in range(4):
        looped = one(looped, seed)
    assert jax.tree.structure(scanned) == jax.tree.structure(start)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        scanned.layers,
        looped.layers,
    )
    assert one._cache_size() == 1
    shapes = jax.tree.map(jnp.shape, start.layers)
    assert jax.tree.map(jnp.shape, looped.layers) == shapes
    columns = 3 if kind == "exact" else 1
    assert start.layers["Dense_0"].a.shape == (3 * 4 * columns, 6)


# ---------------------------------------------------------------- batches


def exact_estimator(**options):
    options = {"examples": 4, "model_examples": 6} | options
    return fisher_estimator(model_fn, "squared_error", kind="exact", **options)


def test_a_longer_batch_is_welcome():
    estimator = exact_estimator()
    curvature = estimator.init(PARAMS, X)
    curvature = jax.jit(estimator.update)(curvature, PARAMS, normal(0, 9, 5))
    assert int(curvature.num_updates) == 1


def test_the_curvature_is_a_pytree_of_arrays_only():
    curvature = problem().curvature()
    leaves = jax.tree.leaves(curvature)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert BATCH.dtype == leaves[0].dtype
    assert dataclasses.is_dataclass(curvature)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"Dense_0": "bfloat16", "Dense_1": "float32"}),
        ({"rows_dtype": "float32"}, {"Dense_0": "float32", "Dense_1": "float32"}),
        ({"rows_dtype": "float16"}, {"Dense_0": "float16", "Dense_1": "float16"}),
        ({"rank": None}, {"Dense_0": "float32", "Dense_1": "float32"}),
        ({"positions": None}, {"Dense_0": "float32", "Dense_1": "float32"}),
    ],
)
def test_rows_with_eigenpairs_are_kept_in_half_precision(options, expected):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            return nn.Dense(2)(x)

    model, x = Two(), jax.random.normal(jax.random.key(0), (8, 20))
    params = model.init(jax.random.key(1), x)
    estimator = fisher_estimator(model.apply, "squared_error", examples=8, **options)
    curvature = estimator.init(params, x)
    curvature = estimator.update(curvature, params, x, rng=jax.random.key(2))
    found = {
        name.rpartition("/")[2]: str(rows.a.dtype)
        for name, rows in curvature.layers.items()
    }
    assert found == expected
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(curvature.eigenpairs))
    exact = fisher_estimator(
        model.apply,
        "squared_error",
        examples=8,
        rows_dtype="float32",
        **options_of(options),
    )
    same = exact.update(exact.init(params, x), params, x, rng=jax.random.key(2))
    for name, rows in curvature.layers.items():
        expect = same.layers[name]
        digits = float(jnp.finfo(rows.a.dtype).eps)
        for one, other in zip(rows, expect, strict=True):
            np.testing.assert_allclose(
                np.asarray(one, np.float32), other, rtol=digits, atol=1e-6
            )


def test_windows_of_other_lengths_keep_their_own_precision():
    """Rows of one update, float32, go into a window that has eigenpairs, and out."""
    model, x = nn.Dense(10), jax.random.normal(jax.random.key(0), (32, 100))
    params = model.init(jax.random.key(1), x)

    def estimate(window):
        return fisher_estimator(
            model.apply, "squared_error", examples=32, rank=32, window=window
        )

    one = estimate(1)
    single = one.update(one.init(params, x), params, x, rng=jax.random.key(2))
    whole = estimate(8).init(params, x)
    ((name, rows),) = whole.layers.items()
    assert rows.g.dtype == jnp.bfloat16
    assert single.layers[name].g.dtype == jnp.float32
    pushed = whole.push(single)
    assert pushed.layers[name].g.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(pushed.layers[name].g[:32], np.float32),
        single.layers[name].g,
        rtol=2**-7,
    )
    shorter = whole.with_window(1)
    assert not shorter.eigenpairs
    assert shorter.layers[name].g.dtype == jnp.float32


def options_of(options):
    """The options aside from the dtype."""
    return {k: v for k, v in options.items() if k != "rows_dtype"}
