"""Eight devices take the steps of one: under jit, on either kind of mesh, and in a map.

Run by tests/integration/test_devices.py, in a process with eight CPU devices.
"""

import functools
import importlib
import pathlib

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

if jax.device_count() < 8:
    pytest.skip("needs eight devices", allow_module_level=True)

STEPS, BATCH = 20, 32


class MLP(nn.Module):
    """Wide enough for eigenpairs in its first layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(24, name="hidden")(x))
        return nn.Dense(3, name="out")(x)


def model_fn(params, x):
    return MLP().apply({"params": params}, x)


def loss_fn(params, batch):
    return jnp.mean(jnp.sum((model_fn(params, batch["x"]) - batch["y"]) ** 2, -1))


@functools.cache
def data():
    x = jax.random.normal(jax.random.key(0), (BATCH, 20))
    y = jnp.sin(3 * x[:, :3])
    return {"x": np.asarray(x), "y": np.asarray(y)}


@functools.cache
def start():
    return jax.tree.map(
        np.asarray, MLP().init(jax.random.key(2), data()["x"])["params"]
    )


def estimator(**options):
    # All examples of the batch, and all columns: whoever captures them, they are the
    # same, in another order.
    options = {"kind": "exact", "examples": BATCH, "rank": None} | options
    return optax_cgfac.fisher_estimator(model_fn, "squared_error", **options)


def train_step(tx, est, mean=lambda x: x):
    def step(params, state, curvature, batch, rng):
        # The mean over the devices is part of the loss: the gradient of a device's own
        # loss with respect to parameters that all share is a sum over the devices.
        def mean_loss(params, batch):
            return mean(loss_fn(params, batch))

        value, grads = jax.value_and_grad(mean_loss)(params, batch)
        curvature = est.update(curvature, params, batch["x"], rng=rng)
        updates, state = tx.update(
            grads,
            state,
            params,
            curvature=curvature,
            value=value,
            value_fn=lambda p: mean_loss(p, batch),
        )
        return optax.apply_updates(params, updates), state, curvature, value

    return step


def train(step, params, state, curvature, batch, steps=STEPS):
    losses = []
    for i in range(steps):
        params, state, curvature, value = step(
            params, state, curvature, batch, jax.random.key(i)
        )
        losses.append(float(value))
    return jax.tree.map(np.asarray, params), losses, state, curvature


TRANSFORMS = {
    "cgfac": optax_cgfac.cgfac,
    "scale_by_cgfac": lambda: optax.chain(
        optax_cgfac.scale_by_cgfac(0.5), optax.scale_by_learning_rate(0.3)
    ),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@functools.cache
def on_one_device(name, rank=None):
    tx, est = TRANSFORMS[name](), estimator(rank=rank)
    params = start()
    curvature = est.init(params, data()["x"])
    step = jax.jit(train_step(tx, est))
    params, losses, _, _ = train(step, params, tx.init(params), curvature, data())
    assert losses[-1] < 0.8 * losses[0]
    return params, losses


def assert_same(params, losses, name, rank=None):
    expected, expected_losses = on_one_device(name, rank)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        params,
        expected,
    )


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@every_transform
def test_a_batch_sharded_under_jit(name, kind):
    mesh, tx, est = mesh_of(kind), TRANSFORMS[name](), estimator()
    with jax.set_mesh(mesh):
        batch = jax.device_put(data(), NamedSharding(mesh, P("data")))
        whole = NamedSharding(mesh, P())
        params = jax.device_put(start(), whole)
        curvature = est.init(params, batch["x"])
        specs = curvature.partition_specs("data")
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        curvature = jax.device_put(curvature, shardings)
        state = jax.device_put(tx.init(params), whole)
        plain, traces = train_step(tx, est), []

        @jax.jit
        def step(*args):
            traces.append(kind)
            return plain(*args)

        params, losses, _, _ = train(step, params, state, curvature, batch)
    assert_same(params, losses, name)
    # What comes out lies where it lay when it went in.
    assert len(traces) == 1
    if kind == AxisType.Auto:  # on the other mesh P() and P(None) are two entries
        assert step._cache_size() == 1


def test_a_batch_that_is_no_multiple_of_the_rows():
    """Which examples are captured depends on the key alone, however they lie."""
    est, tx, mesh = estimator(examples=24), optax_cgfac.cgfac(), mesh_of(AxisType.Auto)
    step = jax.jit(train_step(tx, est))
    curvature = est.init(start(), data()["x"])
    expected, expected_losses, _, _ = train(
        step, start(), tx.init(start()), curvature, data()
    )
    batch = jax.device_put(data(), NamedSharding(mesh, P("data")))
    params, curvature = jax.device_put((start(), curvature), NamedSharding(mesh, P()))
    params, losses, _, _ = train(step, params, tx.init(params), curvature, batch)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        params,
        expected,
    )


def test_a_run_on_a_mesh_is_restored_onto_the_mesh_bit_for_bit(tmp_path):
    mesh, tx, est = mesh_of(AxisType.Auto), optax_cgfac.cgfac(), estimator()
    with jax.set_mesh(mesh):
        batch = jax.device_put(data(), NamedSharding(mesh, P("data")))
        whole = NamedSharding(mesh, P())
        curvature = est.init(start(), batch["x"])
        specs = curvature.partition_specs("data")
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        params, state = jax.device_put((start(), tx.init(start())), whole)
        curvature = jax.device_put(curvature, shardings)
        step = jax.jit(train_step(tx, est))
        carry, losses, saved = (params, state, curvature), [], None
        for i in range(8):
            if i == 5:
                saved = carry
            *carry, value = step(*carry, batch, jax.random.key(i))
            losses.append(value)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
        )
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "saved", like)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
            assert x.sharding == y.sharding
        resumed = []
        for i in range(5, 8):
            *restored, value = step(*restored, batch, jax.random.key(i))
            resumed.append(value)
    np.testing.assert_array_equal(resumed, losses[5:])
    jax.tree.map(np.testing.assert_array_equal, restored, carry)


def test_solves_spread_over_the_axis_of_the_batch_under_jit():
    mesh, tx, est = (
        mesh_of(AxisType.Auto),
        optax_cgfac.cgfac(solve_axis="data"),
        estimator(),
    )
    with jax.set_mesh(mesh):
        batch = jax.device_put(data(), NamedSharding(mesh, P("data")))
        params, curvature = jax.device_put(
            (start(), est.init(start(), data()["x"])), NamedSharding(mesh, P())
        )
        step = jax.jit(train_step(tx, est))
        params, losses, _, _ = train(step, params, tx.init(params), curvature, batch)
    assert_same(params, losses, "cgfac")


def test_solves_spread_over_the_axis_of_the_batch_in_a_map():
    params, losses, _, _ = train_in_a_map(
        "cgfac", tx=optax_cgfac.cgfac(solve_axis="data")
    )
    assert_same(params, losses, "cgfac")


def train_in_a_map(name, tx=None, **options):
    mesh, tx = mesh_of(AxisType.Auto), tx or TRANSFORMS[name]()
    est = estimator(axis_name="data", **options)
    params = start()
    curvature = est.init(params, data()["x"])
    specs = curvature.partition_specs("data")
    mean = functools.partial(jax.lax.pmean, axis_name="data")
    step = jax.jit(
        jax.shard_map(
            train_step(tx, est, mean),
            mesh=mesh,
            in_specs=(P(), P(), specs, P("data"), P()),
            out_specs=(P(), P(), specs, P()),
        )
    )
    return train(step, params, tx.init(params), curvature, data())


@every_transform
def test_a_batch_split_by_shard_map(name):
    params, losses, _, curvature = train_in_a_map(name)
    assert_same(params, losses, name)
    assert int(curvature.num_updates) == STEPS


def test_eigenpairs_of_gathered_rows_train_as_well():
    """Subspace iteration sees the rows in another order: close, and not equal."""
    _, losses, _, curvature = train_in_a_map("cgfac", rank=16)
    _, expected = on_one_device("cgfac", 16)
    assert set(curvature.eigenpairs) == {"hidden", "out"}
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=0.05)
    assert losses[-1] < 0.01 * losses[0]


def test_every_device_draws_targets_of_its_own():
    """Sampled targets and positions: rows of eight devices, all of them different."""
    _, losses, _, curvature = train_in_a_map("cgfac", kind="mc", examples=16, window=1)
    assert losses[-1] < 0.1 * losses[0]
    g = np.asarray(curvature.layers["out"].g)
    assert g.shape == (16, 3)
    assert len(np.unique(g, axis=0)) == 16


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"examples=12 examples cannot be split over the 8"
    ):
        train_in_a_map("cgfac", kind="mc", examples=12)


def test_examples_of_the_model_that_do_not_divide_are_refused():
    curvature = estimator(axis_name="data", model_examples=12).init(
        start(), data()["x"]
    )
    with (
        jax.set_mesh(mesh_of(AxisType.Auto)),
        pytest.raises(ValueError, match="model has 12 examples, which cannot be split"),
    ):
        curvature.partition_specs("data")


def test_an_axis_that_is_not_there_is_named():
    est = estimator(axis_name="data")
    curvature = est.init(start(), data()["x"])
    with pytest.raises(ValueError, match="no such axis here"):
        est.update(curvature, start(), data()["x"])


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks are imported by their bare names."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(path))


@pytest.mark.usefixtures("benchmarks")
def test_the_model_of_costs_is_what_is_compiled():
    scale = importlib.import_module("scale")
    for parts in scale.measure(scale.SMALL)["parts"].values():
        for name, part in parts.items():
            # XLA's CPU backend sends bfloat16 as float32.
            times = 2 if name == "new rows, bfloat16" else 1
            assert 0.8 < part["compiled"] / part["counted"] / times < 1.3, name


@pytest.mark.usefixtures("benchmarks")
def test_the_only_traffic_of_the_curvature_are_the_new_rows():
    benchmark = importlib.import_module("collectives")
    result = benchmark.measure(benchmark.Autoencoder((96,)), 64, 128)

    def total(program, kind):
        return sum(n for k, n in result["programs"][program] if k == kind)

    assert tuple(result["programs"]) == benchmark.PROGRAMS
    rows, gradient = result["rows of one update"], result["parameters"]
    assert rows == 32 * (65 + 96 + 97 + 64) * 2
    gathered = total("cgfac, shard_map", "all-gather")
    reduced = total("cgfac, shard_map", "all-reduce") - gradient
    if jax.__version_info__ < (0, 10, 2):  # these add the rows to zeros instead
        assert gathered == 0
        gathered = reduced // 128 * 128
        reduced -= gathered
    # XLA's CPU backend sends bfloat16 as float32.
    assert gathered in (rows, 2 * rows)
    kinds = {kind for kind, _ in result["programs"]["cgfac, shard_map"]}
    assert kinds <= {"all-gather", "all-reduce"}
    # Beside the gradient: three losses and a matrix of 2 x 2.
    assert 0 <= reduced <= 64
    assert 0 <= total("Adam, jit", "all-reduce") - gradient <= 8
    # Under jit the compiler finds the same: no examples are sent, but rows.
    total_jit = sum(n for _, n in result["programs"]["cgfac, jit"])
    assert total_jit - gradient <= 2 * rows + 1024
    # K-FAC's factors, which do not fit beside them.
    factors = result["factors of K-FAC"]
    assert factors > 4 * rows
    assert factors <= total("K-FAC, shard_map", "all-reduce") - gradient <= factors + 8
    assert total("K-FAC, shard_map", "all-gather") == 0


def factors_on_one_device_and_in_a_map(model_fn, loss, x, params=None, **options):
    """With all examples captured, the factors are those of one device."""
    params = start() if params is None else params

    def update_of(axis_name):
        est = optax_cgfac.fisher_estimator(
            model_fn, loss, kind="exact", examples=BATCH, axis_name=axis_name, **options
        )
        return est.update, est.init(params, x)

    update, curvature = update_of(None)
    expected = jax.jit(update)(curvature, params, x)
    update, curvature = update_of("data")
    specs = curvature.partition_specs("data")
    mapped = jax.shard_map(
        update,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs, P(), P("data")),
        out_specs=specs,
    )
    found = jax.jit(mapped)(curvature, params, x)
    return [
        [c.operator(tag.name).factors() for tag in expected.tags]
        for c in (expected, found)
    ]


def test_weights_are_divided_by_their_sum_over_all_devices():
    """Devices with much and with little padding: one mean over all of them."""
    mask = (np.arange(BATCH) % 7 < np.arange(BATCH) // 5).astype(np.float32)
    assert len({float(m.sum()) for m in mask.reshape(8, -1)}) > 2
    expected, found = factors_on_one_device_and_in_a_map(
        lambda params, x: model_fn(params, x[0]),
        "squared_error",
        (data()["x"], mask),
        weights=lambda x: x[1],
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def test_whole_batches():
    expected, found = factors_on_one_device_and_in_a_map(
        model_fn, "squared_error", data()["x"], whole_batch=True
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("way", ["jit", "map"])
def test_the_devices_share_the_work_of_a_capture(way):
    """Each its own examples: an eighth of what one device computes, and some sums."""
    mesh, x = mesh_of(AxisType.Auto), jnp.zeros((128, 64))

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.tanh(nn.Dense(64)(x))
            return x

    params = Square().init(jax.random.key(0), x)

    def flops(axis_name, in_shardings=None):
        est = optax_cgfac.fisher_estimator(
            Square().apply,
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
            update = jax.shard_map(
                update,
                mesh=mesh,
                in_specs=(specs, P(), P("data"), P()),
                out_specs=specs,
            )
        lowered = jax.jit(update, in_shardings=in_shardings).lower(
            curvature, params, x, jax.random.key(1)
        )
        return lowered.compile().cost_analysis()["flops"]

    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    ways = {"jit": (None, (whole, whole, split, whole)), "map": ("data", None)}
    assert flops(*ways[way]) < 0.25 * flops(None)


def test_one_hot_rows_are_gathered_too():
    """An embedding: with all examples captured, the factors of one device."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Embed(40, 6)(x))

    model = Tokens()
    x = np.asarray(jax.random.randint(jax.random.key(0), (BATCH,), 0, 40))
    params = model.init(jax.random.key(1), x)
    expected, found = factors_on_one_device_and_in_a_map(
        model.apply, "squared_error", x, params
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )
