"""Layers' systems spread over devices: equal solutions, less work for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_cgfac

if jax.device_count() < 8:
    pytest.skip("needs eight devices", allow_module_level=True)


class Deep(nn.Module):
    """Eight layers of about the same size, and four that `nn.scan` has stacked."""

    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            x = nn.tanh(nn.Dense(24)(x))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(24)(x)), None

        scan = nn.scan(
            Block,
            variable_axes={"params": 0} | optax_cgfac.capture_axes(),
            split_rngs={"params": True},
            length=4,
        )
        x, _ = scan()(x, None)
        return nn.Dense(3)(x)


class Uneven(nn.Module):
    """A layer dearer than all others together, and three that `nn.vmap` stacks."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(24)(x))
        x = nn.tanh(nn.Dense(72)(x))
        x = nn.tanh(nn.Dense(8)(x))
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0} | optax_cgfac.capture_axes(),
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-2,
            axis_size=3,
        )
        return jnp.sum(heads(4)(x), axis=-2)


@functools.cache
def given(model):
    x = jax.random.normal(jax.random.key(0), (32, 24))
    params = model.init(jax.random.key(1), x)
    estimator = optax_cgfac.fisher_estimator(
        model.apply, "squared_error", kind="exact", examples=32, window=2
    )
    curvature = estimator.update(estimator.init(params, x), params, x)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x))))(params)
    return params, grads, curvature


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("layers",), axis_types=(kind,))


FACTORIES = {
    "eigenpairs": functools.partial(
        optax_cgfac.scale_by_cgfac, 0.1, damping_form="factored"
    ),
    "cg": functools.partial(optax_cgfac.scale_by_cgfac, 0.1),
    "kfac": functools.partial(optax_cgfac.scale_by_kfac, 0.1),
}


def solve(tx, grads, params, curvature):
    return tx.update(grads, tx.init(params), params, curvature=curvature)


def assert_close(actual, expected):
    """To a thousand roundings of the largest entry: solutions are differences."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=0, atol=1e-4 * np.max(np.abs(y))
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eigenpairs", AxisType.Auto),
        ("cg", AxisType.Explicit),
        ("kfac", AxisType.Auto),
    ],
    ids=str,
)
def test_solutions_under_jit_are_those_of_one_device(name, kind):
    params, grads, curvature = given(Deep())
    expected, info = solve(FACTORIES[name](), grads, params, curvature)
    tx = FACTORIES[name](solve_axis="layers")
    with jax.set_mesh(mesh(kind)):
        found, state = jax.jit(functools.partial(solve, tx))(grads, params, curvature)
    assert_close(found, expected)
    np.testing.assert_array_equal(state.info.num_steps, info.info.num_steps)
    np.testing.assert_array_equal(state.info.num_replaced, 0)


@pytest.mark.parametrize("name", FACTORIES)
def test_solutions_inside_a_map_are_those_of_one_device(name):
    params, grads, curvature = given(Deep())
    expected, _ = solve(FACTORIES[name](), grads, params, curvature)
    tx = FACTORIES[name](solve_axis="layers")
    mapped = jax.shard_map(
        functools.partial(solve, tx), mesh=mesh(), in_specs=P(), out_specs=P()
    )
    found, _ = jax.jit(mapped)(grads, params, curvature)
    assert_close(found, expected)


@pytest.mark.parametrize("name", FACTORIES)
def test_layers_that_are_not_alike_are_solved_as_on_one_device(name):
    params, grads, curvature = given(Uneven())
    expected, info = solve(FACTORIES[name](), grads, params, curvature)
    tx = FACTORIES[name](solve_axis="layers")
    with jax.set_mesh(mesh()):
        found, state = jax.jit(functools.partial(solve, tx))(grads, params, curvature)
    assert_close(found, expected)
    np.testing.assert_array_equal(state.info.num_steps, info.info.num_steps)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_device_does_a_part_of_the_work(name):
    """Of a conditional XLA counts the dearest branch: what the busiest device does."""
    params, grads, curvature = given(Deep())

    def flops(tx, size):
        devices = jax.make_mesh(
            (size,),
            ("layers",),
            axis_types=(AxisType.Auto,),
            devices=jax.devices()[:size],
        )
        with jax.set_mesh(devices):
            lowered = jax.jit(functools.partial(solve, tx)).lower(
                grads, params, curvature
            )
            return lowered.compile().cost_analysis()["flops"]

    alone = flops(FACTORIES[name](), 1)
    tx = FACTORIES[name](solve_axis="layers")
    # Thirteen systems of about the same size.
    assert flops(tx, 2) < 0.6 * alone
    assert flops(tx, 8) < 0.25 * alone


def test_a_bad_layer_is_replaced_and_counted_as_on_one_device():
    params, grads, curvature = given(Deep())
    bad = jax.tree.map(lambda g: g, grads)
    bad["params"]["Dense_1"]["kernel"] = bad["params"]["Dense_1"]["kernel"] * jnp.inf
    tx = FACTORIES["eigenpairs"]()
    expected, one = solve(tx, bad, params, curvature)
    tx = FACTORIES["eigenpairs"](solve_axis="layers")
    with jax.set_mesh(mesh()):
        found, state = jax.jit(functools.partial(solve, tx))(bad, params, curvature)
    assert_close(found, expected)
    np.testing.assert_array_equal(state.info.num_replaced, one.info.num_replaced)
    assert int(jnp.sum(state.info.num_replaced)) == 2


def test_an_axis_that_is_not_there_is_named():
    params, grads, curvature = given(Deep())
    tx = FACTORIES["cg"](solve_axis="layers")
    with pytest.raises(ValueError, match="solve_axis='layers' is no axis"):
        solve(tx, grads, params, curvature)
