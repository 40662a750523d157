"""The estimator: which rows it takes, what they mean, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oracles
from models import Compact, init, normal
from optax_cgfac import fisher_estimator, value_and_grad

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


def dense_factors(pool, x):
    """``A`` and ``G`` of a squared error on ``pool(outputs)``, all positions."""
    first, last = PARAMS["Dense_0"], PARAMS["Dense_1"]

    def outputs(shifts):  # of the outputs of both layers
        s = x @ first["kernel"] + first["bias"] + shifts["Dense_0"]
        outputs = jnp.tanh(s) @ last["kernel"] + last["bias"] + shifts["Dense_1"]
        return pool(outputs)

    hidden = jnp.tanh(x @ first["kernel"] + first["bias"])
    widths = {"Dense_0": 4, "Dense_1": 3}
    shifts = {name: jnp.zeros((*x.shape[:-1], n)) for name, n in widths.items()}
    jacobians = jax.jacobian(outputs)(shifts)
    factors = {}
    for name, a in {"Dense_0": x, "Dense_1": hidden}.items():
        a = a.reshape(-1, a.shape[-1])
        a = np.concatenate([a, np.ones((len(a), 1))], -1)
        # (N, ..., C, N, T, features): the loss is the mean over N and positions.
        j = oracles.float64(jacobians[name]).reshape(-1, widths[name])
        predictions = np.prod(outputs(shifts).shape[:-1])
        factors[name] = a.T @ a / len(a), 2 * j.T @ j / predictions
    return factors


def test_exact_rows_give_the_dense_factors():
    curvature = estimate(kind="exact", examples=6, window=1)
    for name, (a, g) in dense_factors(lambda y: y, X).items():
        dense = curvature.operator(name).to_dense()
        np.testing.assert_allclose(dense, np.kron(a, g), rtol=1e-4, atol=1e-5)


def pooled(params, x):
    return model_fn(params, x).mean(1)


OVER_TIME = normal(3, 6, 3, 5)


@pytest.mark.parametrize("name", ["Dense_0", "Dense_1"])
@pytest.mark.parametrize("case", ["vectors", "output per position", "pooled outputs"])
def test_sampled_targets_and_positions_average_to_the_dense_factors(case, name):
    """Over two thousand keys; inputs of vectors are all seen, so A is exact."""
    fn = pooled if case == "pooled outputs" else model_fn
    inputs = X if case == "vectors" else OVER_TIME
    estimator = fisher_estimator(fn, "squared_error", examples=6, window=1)
    curvature = estimator.init(PARAMS, inputs)

    def one(key):
        updated = estimator.update(curvature, PARAMS, inputs, rng=key)
        return updated.operator(name).factors()

    keys = jax.random.split(jax.random.key(5), 2000)
    means = jax.jit(lambda: jax.tree.map(lambda x: x.mean(0), jax.vmap(one)(keys)))()
    pool = (lambda y: y.mean(1)) if case == "pooled outputs" else (lambda y: y)
    expected = dense_factors(pool, inputs)[name]
    for factor, mean in zip(expected, means, strict=True):
        assert oracles.relative_error(mean, factor) < 0.05
    if case == "vectors":
        np.testing.assert_allclose(means[0], expected[0], rtol=1e-4, atol=1e-5)


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


def test_examples_of_one_update_are_distinct():
    curvature = estimate(rng=0, window=1)
    rows = np.asarray(curvature.layers["Dense_0"].a)[:, :-1]
    taken = [np.flatnonzero(np.isclose(X, row).all(1)).item() for row in rows]
    assert len(set(taken)) == 4


# ---------------------------------------------------------------- inputs


def test_the_models_examples_are_of_this_batch_also_where_no_rows_are_captured():
    """Those of an older batch are fitted already: the quadratic model would be flat."""
    options = {"examples": 2, "model_examples": 4, "window": 1, "capture_every": 3}
    estimator = fisher_estimator(model_fn, "squared_error", **options)
    curvature = estimator.init(PARAMS, X)
    update = jax.jit(estimator.update)
    for i in range(3):
        batch = X + 100 * i
        curvature = update(curvature, PARAMS, batch, rng=jax.random.key(i))
        kept = [
            np.flatnonzero(np.isclose(batch, x).all(1)).item()
            for x in curvature.model_inputs
        ]
        assert len(set(kept)) == 4
    assert int(curvature.num_updates) == 1


def with_scale(params, inputs):
    return model_fn(params, inputs["x"] * inputs["scale"])


def test_a_leaf_as_long_as_the_batch_needs_input_axes():
    inputs = {"x": X[:5], "scale": jnp.full(5, 2.0)}  # five examples, five features
    with pytest.raises(Exception, match=r"input_axes|shape|broadcast"):
        estimate(with_scale, inputs=inputs, kind="exact")
    options = {"kind": "exact", "model_examples": 3}
    curvature = estimate(
        lambda params, inputs: with_scale(params, inputs[0]),
        inputs=(inputs,),
        input_axes=({"x": 0, "scale": None},),
        **options,
    )
    assert curvature.spec.batched == (False, True)
    assert curvature.model_inputs[0]["scale"].shape == (5,)
    assert curvature.model_inputs[0]["x"].shape == (3, 5)
    doubled = estimate(inputs=2 * X[:5], **options)
    for name, rows in doubled.layers.items():
        np.testing.assert_allclose(curvature.layers[name].a, rows.a, rtol=1e-5)


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
    columns = 3 if kind == "exact" else 1
    assert looped.layers["Dense_0"].a.shape == (3 * 4 * columns, 6)


# ---------------------------------------------------------------- batches


def test_a_longer_batch_and_another_window_are_welcome():
    estimator = fisher_estimator(model_fn, "squared_error", examples=4, window=2)
    curvature, rng = estimator.init(PARAMS, X).with_window(3), jax.random.key(0)
    updated = jax.jit(estimator.update)(curvature, PARAMS, normal(0, 9, 5), rng=rng)
    assert jax.tree.structure(updated) == jax.tree.structure(curvature)
    assert int(updated.num_updates) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["bfloat16", "float32"]),
        ({"rows_dtype": "float32"}, ["float32"] * 2),
        ({"rows_dtype": "float16"}, ["float16"] * 2),
        ({"rank": None}, ["float32"] * 2),
        ({"positions": None}, ["float32"] * 2),
    ],
)
def test_rows_with_eigenpairs_are_kept_in_half_precision(options, expected):
    model = nn.Sequential([nn.Dense(8), nn.Dense(2)])
    x = jax.random.normal(jax.random.key(0), (8, 20))
    params = model.init(jax.random.key(1), x)

    def updated(**options):
        fisher = fisher_estimator(model.apply, "squared_error", examples=8, **options)
        return fisher.update(fisher.init(params, x), params, x, rng=jax.random.key(2))

    curvature, exact = (
        updated(**options),
        updated(**options | {"rows_dtype": "float32"}),
    )
    found = [str(rows.a.dtype) for rows in curvature.layers.values()]
    assert found == expected
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(curvature.eigenpairs))
    for name, rows in curvature.layers.items():
        digits = float(jnp.finfo(rows.a.dtype).eps)
        for one, other in zip(rows, exact.layers[name], strict=True):
            one = np.asarray(one, np.float32)
            np.testing.assert_allclose(one, other, rtol=digits, atol=1e-6)


def test_windows_of_other_lengths_keep_their_own_precision():
    """Rows of one update, float32, go into a window that has eigenpairs, and out."""
    model, x = nn.Dense(10), jax.random.normal(jax.random.key(0), (32, 100))
    params = model.init(jax.random.key(1), x)
    one, whole = (
        fisher_estimator(model.apply, "squared_error", rank=32, window=window)
        for window in (1, 8)
    )
    single = one.update(one.init(params, x), params, x, rng=jax.random.key(2))
    window = whole.init(params, x)
    ((name, rows),) = single.layers.items()
    pushed = window.push(single).layers[name].g
    assert rows.g.dtype == jnp.float32
    assert window.layers[name].g.dtype == pushed.dtype == jnp.bfloat16
    pushed = np.asarray(pushed[:32], np.float32)
    np.testing.assert_allclose(pushed, rows.g, rtol=2**-7)
    shorter = window.with_window(1)
    assert not shorter.eigenpairs
    assert shorter.layers[name].g.dtype == jnp.float32


# ---------------------------------------------------------------- options
