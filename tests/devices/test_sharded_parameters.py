"""Parameters that are sharded over the devices: the steps are those of one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cgfac
from training import nnx_step, run, squared_error, train_step
from trees import assert_trees_close

STEPS = 20


def data():
    x = jax.random.normal(jax.random.key(0), (32, 20))
    return {"x": np.asarray(x), "y": np.asarray(jnp.sin(3 * x[:, :4]))}


def estimator(model_fn):
    return optax_cgfac.fisher_estimator(
        model_fn, "squared_error", kind="exact", examples=32, rank=None
    )


def by(init, *names):
    return nn.with_partitioning(init, names)


class Boxed(nn.Module):
    """Kernels split by columns and by rows, as in a transformer's feed-forward."""

    axis: str = "model"

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        zeros = nn.initializers.zeros
        x = nn.Dense(
            24,
            kernel_init=by(init, None, self.axis),
            bias_init=by(zeros, self.axis),
        )(x)
        return nn.Dense(4, kernel_init=by(init, self.axis, None))(nn.tanh(x))


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def linen_run(boxed, sharded, tx, kind=AxisType.Auto, axis="model"):
    batch, model, m = data(), Boxed(axis), mesh(kind)
    is_explicit = sharded and kind == AxisType.Explicit

    def model_fn(params, x):
        if is_explicit:
            # There the model says when its weights are gathered.
            params = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
        return model.apply(params, x)

    def loss_fn(params, batch):
        return squared_error(model_fn(params, batch["x"]), batch["y"])

    est = estimator(model_fn)
    params = model.init(jax.random.key(1), batch["x"])
    shardings = nn.get_sharding(params, m)
    if not boxed:
        params = nn.unbox(params)
    # Flax initialises boxed parameters only where no mesh of explicit axes is set.
    with jax.set_mesh(m) if is_explicit else contextlib.nullcontext():
        curvature, state = est.init(params, batch["x"]), tx.init(params)
        if sharded:
            params, state = placed(m, shardings, tx, params, state)
            batch = jax.device_put(batch, NamedSharding(m, P("data")))
            curvature = jax.device_put(curvature, NamedSharding(m, P()))
        step = jax.jit(train_step(tx, est, loss_fn))
        (params, state, _), _ = run(step, (params, state, curvature), batch, 0, STEPS)
    return nn.unbox(params), nn.unbox(state)


def placed(m, shardings, tx, params, state):
    """Parameters and the optimizer's state with the shardings that Flax names."""
    params = nn.meta.replace_boxed(params, jax.device_put(nn.unbox(params), shardings))
    state = optax.tree.map_params(
        tx,
        jax.device_put,
        state,
        jax.tree.map(lambda leaf: leaf.sharding, params),
        transform_non_params=lambda leaf: jax.device_put(leaf, NamedSharding(m, P())),
    )
    return params, state


@pytest.mark.parametrize(
    ("name", "boxed"), [("cgfac", True), ("scale_by_cgfac", False)]
)
def test_linen_parameters_with_partitioning(boxed, name):
    tx = {
        "cgfac": optax_cgfac.cgfac,
        "scale_by_cgfac": lambda: optax.chain(
            optax_cgfac.scale_by_cgfac(0.5), optax.scale_by_learning_rate(0.3)
        ),
    }[name]()
    expected, _ = linen_run(boxed, False, tx)
    params, _ = linen_run(boxed, True, tx)
    kernel = params["params"]["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P(None, "model")
    assert_trees_close(params, expected, 1e-5, 1e-5)


def test_parameters_split_over_the_axis_of_the_batch():
    """Fully sharded data parallel; the state keeps lying where its parameters do."""
    expected, _ = linen_run(False, False, optax_cgfac.cgfac())
    params, state = linen_run(False, True, optax_cgfac.cgfac(), axis="data")
    for tree in (params, state.velocity):
        layers = tree["params"]
        assert layers["Dense_0"]["kernel"].sharding.spec == P(None, "data")
        assert layers["Dense_0"]["bias"].sharding.spec == P("data")
        assert layers["Dense_1"]["kernel"].sharding.spec[0] == "data"
    assert_trees_close(params, expected, 1e-5, 1e-5)


def test_parameters_on_a_mesh_with_explicit_axes():
    expected, _ = linen_run(False, False, optax_cgfac.cgfac())
    params, _ = linen_run(False, True, optax_cgfac.cgfac(), AxisType.Explicit)
    assert params["params"]["Dense_0"]["kernel"].sharding.spec == P(None, "model")
    assert_trees_close(params, expected, 1e-5, 1e-5)


class Module(nnx.Module):
    def __init__(self, rngs, sharded, gathers=False):
        init = nnx.initializers.lecun_normal()

        def by(*names):
            return nnx.with_partitioning(init, names) if sharded else init

        self.gathers = gathers
        out = by(None, None) if gathers else by("model", None)
        self.hidden = nnx.Linear(20, 24, rngs=rngs, kernel_init=by(None, "model"))
        self.out = nnx.Linear(24, 4, rngs=rngs, kernel_init=out)

    def __call__(self, x):
        x = nnx.tanh(self.hidden(x))
        if self.gathers:  # explicit axes have to be told where features come together
            x = jax.sharding.reshard(x, P())
        return self.out(x)


def nnx_run(sharded, kind=AxisType.Auto):
    batch = data()
    module = Module(nnx.Rngs(0), sharded, sharded and kind == AxisType.Explicit)
    est = estimator(lambda m, x: m(x))
    optimizer = nnx.Optimizer(module, optax_cgfac.cgfac(), wrt=nnx.Param)
    curvature = est.init(module, batch["x"])
    if sharded:
        batch = jax.device_put(batch, NamedSharding(mesh(kind), P("data")))
    step = nnx.jit(
        nnx_step(
            est, lambda module, batch: squared_error(module(batch["x"]), batch["y"])
        )
    )
    for i in range(STEPS):
        curvature, _ = step(module, optimizer, curvature, batch, jax.random.key(i))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nnx_parameters_with_sharding_metadata(kind):
    expected = nnx_run(False)
    with jax.set_mesh(mesh(kind)):
        params = nnx_run(True, kind)
    assert params["hidden"]["kernel"].sharding.spec == P(None, "model")
    assert_trees_close(params, expected, 1e-5, 1e-5)


def test_named_axes_inside_a_model_on_explicit_axes_are_refused():
    """By JAX, in words of its own: captures run on automatic axes (docs/devices.md)."""

    def model_fn(params, x):
        return nn.Dense(3).apply(params, jax.sharding.reshard(x, P("data")))

    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((8, 4)))
    estimator = optax_cgfac.fisher_estimator(
        model_fn, "squared_error", kind="exact", examples=8
    )
    m = mesh(AxisType.Explicit)
    with jax.set_mesh(m):
        x = jax.device_put(jnp.ones((8, 4)), NamedSharding(m, P("data")))
        curvature = estimator.init(params, x)
        with pytest.raises(ValueError, match="cannot contain axis names"):
            jax.eval_shape(estimator.update, curvature, params, x)
