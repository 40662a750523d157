"""Eight devices take the steps of one: under jit, on either kind of mesh, in a map."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cgfac
from training import run, squared_error, train_step
from trees import assert_trees_close

STEPS, BATCH = 20, 32
MEAN = functools.partial(jax.lax.pmean, axis_name="data")


class MLP(nn.Module):
    """Wide enough for eigenpairs in its first layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(24, name="hidden")(x))
        return nn.Dense(3, name="out")(x)


def model_fn(params, x):
    return MLP().apply({"params": params}, x)


def loss_fn(params, batch):
    return squared_error(model_fn(params, batch["x"]), batch["y"])


def mean_loss(params, batch):
    """The mean over the devices is a part of the loss.

    The gradient of a device's own loss with respect to parameters that all share is a
    sum over the devices.
    """
    return MEAN(loss_fn(params, batch))


@functools.cache
def data():
    x = jax.random.normal(jax.random.key(0), (BATCH, 20))
    return {"x": np.asarray(x), "y": np.asarray(jnp.sin(3 * x[:, :3]))}


@functools.cache
def params_at_start():
    params = MLP().init(jax.random.key(2), data()["x"])["params"]
    return jax.tree.map(np.asarray, params)


def estimator(**options):
    # All examples of the batch, and all columns: whoever captures them, they are the
    # same, in another order.
    options = {"kind": "exact", "examples": BATCH, "rank": None} | options
    return optax_cgfac.fisher_estimator(model_fn, "squared_error", **options)


def start(tx, est):
    params = params_at_start()
    return params, tx.init(params), est.init(params, data()["x"])


TRANSFORMS = {
    "cgfac": optax_cgfac.cgfac,
    "scale_by_cgfac": lambda: optax.chain(
        optax_cgfac.scale_by_cgfac(0.5), optax.scale_by_learning_rate(0.3)
    ),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@functools.cache
def on_one_device(name, **options):
    tx, est = TRANSFORMS[name](), estimator(**options)
    step = jax.jit(train_step(tx, est, loss_fn))
    (params, *_), losses = run(step, start(tx, est), data(), 0, STEPS)
    assert losses[-1] < 0.8 * losses[0]
    return jax.tree.map(np.asarray, params), losses


def assert_same(state, losses, name, **options):
    expected, expected_losses = on_one_device(name, **options)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
    params = jax.tree.map(np.asarray, state[0])
    assert_trees_close(params, expected, 1e-5, 1e-5)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def placed(mesh, state):
    """A state as docs/devices.md places it, and the batch, split."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    specs = state[2].partition_specs("data")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    curvature = jax.device_put(state[2], shardings)
    return (*jax.device_put(state[:2], whole), curvature), jax.device_put(data(), split)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@every_transform
def test_a_batch_sharded_under_jit(name, kind):
    mesh, tx, est = mesh_of(kind), TRANSFORMS[name](), estimator()
    with jax.set_mesh(mesh):
        state, batch = placed(mesh, start(tx, est))
        plain, traces = train_step(tx, est, loss_fn), []

        @jax.jit
        def step(*args):
            traces.append(kind)
            return plain(*args)

        state, losses = run(step, state, batch, 0, STEPS)
    assert_same(state, losses, name)
    # What comes out lies where it lay when it went in.
    assert len(traces) == 1
    if kind == AxisType.Auto:  # on the other mesh P() and P(None) are two entries
        assert step._cache_size() == 1


def test_a_batch_that_is_no_multiple_of_the_rows():
    """Which examples are captured depends on the key alone, however they lie."""
    est, tx = estimator(examples=24), optax_cgfac.cgfac()
    step = jax.jit(train_step(tx, est, loss_fn))
    with jax.set_mesh(mesh_of()):
        state, batch = placed(mesh_of(), start(tx, est))
    state, losses = run(step, state, batch, 0, STEPS)
    assert_same(state, losses, "cgfac", examples=24)


def test_a_run_on_a_mesh_is_restored_onto_the_mesh_bit_for_bit(tmp_path):
    mesh, tx, est = mesh_of(), optax_cgfac.cgfac(), estimator()
    with jax.set_mesh(mesh):
        state, batch = placed(mesh, start(tx, est))
        step = jax.jit(train_step(tx, est, loss_fn))
        saved, _ = run(step, state, batch, 0, 5)
        whole, losses = run(step, saved, batch, 5, 8)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
        )
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "saved", like)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
            assert x.sharding == y.sharding
        restored, resumed = run(step, restored, batch, 5, 8)
    np.testing.assert_array_equal(resumed, losses)
    jax.tree.map(np.testing.assert_array_equal, restored, whole)


def in_a_map(name, **options):
    """The compiled step of a map, and the state to start from."""
    tx, est = TRANSFORMS[name](), estimator(axis_name="data", **options)
    state = start(tx, est)
    specs = (P(), P(), state[2].partition_specs("data"))
    step = jax.shard_map(
        train_step(tx, est, mean_loss),
        mesh=mesh_of(),
        in_specs=(specs, P("data"), P()),
        out_specs=(specs, P()),
    )
    return jax.jit(step), state


def train_in_a_map(name, **options):
    return run(*in_a_map(name, **options), data(), 0, STEPS)


@every_transform
def test_a_batch_split_by_shard_map(name):
    state, losses = train_in_a_map(name)
    assert_same(state, losses, name)
    assert int(state[2].num_updates) == STEPS


def test_eigenpairs_of_gathered_rows_train_as_well():
    """Subspace iteration sees the rows in another order: close, and not equal."""
    state, losses = train_in_a_map("cgfac", rank=16)
    _, expected = on_one_device("cgfac", rank=16)
    assert set(state[2].eigenpairs) == {"hidden", "out"}
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=0.05)
    assert losses[-1] < 0.01 * losses[0]


def test_every_device_draws_targets_of_its_own():
    """Sampled targets and positions: rows of eight devices, all of them different."""
    state, losses = train_in_a_map("cgfac", kind="mc", examples=16, window=1)
    assert losses[-1] < 0.1 * losses[0]
    g = np.asarray(state[2].layers["out"].g)
    assert g.shape == (16, 3)
    assert len(np.unique(g, axis=0)) == 16


def test_the_only_traffic_of_the_curvature_are_the_new_rows():
    """Besides the gradient, and a few scalars."""
    options = {"kind": "mc", "examples": 16, "window": 1, "capture_every": 1}
    step, state = in_a_map("cgfac", **options)
    text = step.lower(state, data(), jax.random.key(0)).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    shapes = re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", text)
    sizes = re.findall(r"\w+\[([\d,]*)\]", " ".join(shapes))
    sent = sum(math.prod(map(int, filter(None, size.split(",")))) for size in sizes)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params_at_start()))
    rows = 16 * (21 + 24 + 25 + 3)
    assert rows <= sent - parameters <= rows + 64


def test_examples_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="=12 examples cannot be split over the 8"):
        train_in_a_map("cgfac", kind="mc", examples=12)


def test_an_axis_that_is_not_there_is_named():
    est = estimator(axis_name="data")
    curvature = est.init(params_at_start(), data()["x"])
    with pytest.raises(ValueError, match="no such axis here"):
        est.update(curvature, params_at_start(), data()["x"])


def factor_cases():
    """Options, model, parameters and inputs."""
    x, params = data()["x"], params_at_start()
    # Devices with much and with little padding: one mean over all of them.
    mask = (np.arange(BATCH) % 7 < np.arange(BATCH) // 5).astype(np.float32)
    assert len({float(m.sum()) for m in mask.reshape(8, -1)}) > 2
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (BATCH,), 0, 40))
    embed = nn.Sequential([nn.Embed(40, 6), nn.Dense(3)])
    of_embed = embed.init(jax.random.key(1), tokens)
    return {
        "weights": (
            {"weights": lambda x: x[1]},
            lambda params, x: model_fn(params, x[0]),
            params,
            (x, mask),
        ),
        "whole batch": ({"whole_batch": True}, model_fn, params, x),
        "one-hot rows": ({}, embed.apply, of_embed, tokens),
    }


@pytest.mark.parametrize("case", ["weights", "whole batch", "one-hot rows"])
def test_factors_are_those_of_one_device(case):
    """With all examples captured."""
    options, function, params, x = factor_cases()[case]
    options |= {"kind": "exact", "examples": BATCH}

    def update_of(axis_name):
        est = optax_cgfac.fisher_estimator(
            function, "squared_error", axis_name=axis_name, **options
        )
        return est.update, est.init(params, x)

    update, curvature = update_of(None)
    expected = jax.jit(update)(curvature, params, x)
    update, curvature = update_of("data")
    specs = curvature.partition_specs("data")
    in_specs = (specs, P(), P("data"))
    update = jax.shard_map(update, mesh=mesh_of(), in_specs=in_specs, out_specs=specs)
    found = jax.jit(update)(curvature, params, x)
    for tag in expected.tags:
        factors = [c.operator(tag.name).factors() for c in (found, expected)]
        assert_trees_close(*factors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["jit", "map"])
def test_the_devices_share_the_work_of_a_capture(way):
    """Each its own examples: an eighth of what one device computes, and some sums."""
    mesh, x = mesh_of(), jnp.zeros((128, 64))
    model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(64)])
    params = model.init(jax.random.key(0), x)

    def flops(axis_name, in_shardings=None):
        est = optax_cgfac.fisher_estimator(
            model.apply,
            "squared_error",
            rank=None,
            capture_every=1,
            axis_name=axis_name,
        )
        curvature = est.init(params, x)

        def update(curvature, params, x, rng):
            return est.update(curvature, params, x, rng=rng)

        if axis_name is not None:
            specs = curvature.partition_specs(axis_name)
            in_specs = (specs, P(), P("data"), P())
            update = jax.shard_map(
                update, mesh=mesh, in_specs=in_specs, out_specs=specs
            )
        lowered = jax.jit(update, in_shardings=in_shardings).lower(
            curvature, params, x, jax.random.key(1)
        )
        return lowered.compile().cost_analysis()["flops"]

    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    ways = {"jit": (None, (whole, whole, split, whole)), "map": ("data", None)}
    assert flops(*ways[way]) < 0.25 * flops(None)
