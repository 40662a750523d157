"""The transformations inside Optax's own wrappers."""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_cgfac
from steps import TRANSFORMS, ingredients, problem, update

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def alone(tx, **changes):
    return update(tx, tx.init(ingredients().params), **changes)


def test_chain_hands_the_curvature_on():
    tx = optax.chain(
        optax.clip_by_global_norm(1e6),
        optax_cgfac.scale_by_cgfac(0.1),
        optax.scale_by_learning_rate(0.5),
    )
    updates, _ = alone(tx)
    expected, _ = alone(optax_cgfac.scale_by_cgfac(0.1))
    assert_trees_close(updates, jax.tree.map(lambda x: -0.5 * x, expected))


def test_masked_layers_keep_their_gradient_and_the_others_their_solution():
    mask = {"hidden": True, "out": False}
    updates, _ = alone(optax.masked(optax_cgfac.scale_by_cgfac(0.1), mask))
    expected, _ = alone(optax_cgfac.scale_by_cgfac(0.1))
    assert_trees_close(updates["hidden"], expected["hidden"])
    assert_trees_close(updates["out"], ingredients().grads["out"])


def test_a_masked_bias_leaves_the_kernel_its_own_rows():
    """Without the bias the layer's matrix has one row less, and so its rows."""
    mask = {"hidden": {"kernel": True, "bias": False}, "out": True}
    damping = 0.1
    updates, _ = alone(optax.masked(optax_cgfac.scale_by_kfac(damping), mask))

    rows = ingredients().curvature.layers["hidden"]
    a, g = (np.asarray(x, np.float64) for x in rows)
    factors = a[:, :-1].T @ a[:, :-1] / len(a), g.T @ g / len(g)
    b = np.asarray(ingredients().grads["hidden"]["kernel"], np.float64)
    dense = np.kron(*factors) + damping * np.eye(b.size)
    expected = np.linalg.solve(dense, b.ravel()).reshape(b.shape)
    np.testing.assert_allclose(updates["hidden"]["kernel"], expected, rtol=1e-3)
    grads = ingredients().grads
    np.testing.assert_array_equal(updates["hidden"]["bias"], grads["hidden"]["bias"])


def test_partition_gives_each_part_its_own_optimizer():
    tx = optax.partition(
        {"second": optax_cgfac.scale_by_cgfac(0.1), "first": optax.sgd(0.3)},
        {"hidden": "second", "out": "first"},
    )
    updates, _ = alone(tx)
    expected, _ = alone(optax_cgfac.scale_by_cgfac(0.1))
    assert_trees_close(updates["hidden"], expected["hidden"])
    grads = ingredients().grads["out"]
    assert_trees_close(updates["out"], jax.tree.map(lambda g: -0.3 * g, grads))


def test_cgfac_in_partition_steps_on_its_part_only():
    tx = optax.partition(
        {"second": optax_cgfac.cgfac(0.1), "first": optax.set_to_zero()},
        {"hidden": "second", "out": "first"},
    )
    updates, _ = alone(tx)
    expected, _ = alone(optax_cgfac.cgfac(0.1))
    assert_trees_close(updates["hidden"], expected["hidden"])
    assert not np.any(updates["out"]["kernel"])


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (optax_cgfac.scale_by_cgfac, {}),
        (optax_cgfac.scale_by_kfac, {}),
        (optax_cgfac.cgfac, {"learning_rate": 0.1}),
    ],
    ids=["scale_by_cgfac", "scale_by_kfac", "cgfac"],
)
def test_inject_hyperparams_makes_the_damping_traced(factory, arguments):
    others = set(inspect.signature(factory).parameters) - {"damping", *arguments}
    tx = optax.inject_hyperparams(factory, static_args=others)(damping=0.1, **arguments)
    state = tx.init(ingredients().params)
    traces = []

    @jax.jit
    def run(grads, state, given):
        traces.append(1)
        return tx.update(grads, state, given.params, curvature=given.curvature)[0]

    for damping in (0.1, 1.0):
        state.hyperparams["damping"] = jnp.asarray(damping)
        updates = run(ingredients().grads, state, ingredients())
        expected, _ = alone(factory(damping=damping, **arguments))
        assert_trees_close(updates, expected, rtol=1e-4)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "factory",
    [optax_cgfac.scale_by_cgfac, optax_cgfac.cgfac],
    ids=["scale_by", "cgfac"],
)
def test_inject_hyperparams_needs_no_static_args(factory):
    """Every number of the signature becomes an array, unless it is excluded."""
    arguments = {"damping": 0.1}
    if factory is optax_cgfac.cgfac:
        arguments["learning_rate"] = 0.1
    tx = optax.inject_hyperparams(factory)(**arguments)
    updates, _ = alone(tx)
    expected, _ = alone(factory(**arguments))
    assert_trees_close(updates, expected, rtol=1e-4)


def test_multi_steps_emits_the_update_of_the_averaged_gradient():
    tx = optax_cgfac.scale_by_kfac(0.1)
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    given = ingredients()
    other = jax.tree.map(lambda g: 3 * g, given.grads)

    first, state = update(steps, steps.init(given.params))
    second, _ = update(steps, state, given._replace(grads=other))

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first))
    mean = jax.tree.map(lambda g: 2 * g, given.grads)
    expected, _ = alone(tx, grads=mean)
    assert_trees_close(second, expected, rtol=1e-4)


def test_apply_if_finite_skips_a_bad_gradient():
    tx = optax.apply_if_finite(optax_cgfac.scale_by_cgfac(0.1), 3)
    state = tx.init(ingredients().params)
    bad = jax.tree.map(lambda g: g * jnp.nan, ingredients().grads)
    updates, state = update(tx, state, grads=bad)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(state.total_notfinite) == 1
    assert int(state.inner_state.cgfac_count) == 0
    updates, _ = update(tx, state)
    expected, _ = alone(optax_cgfac.scale_by_cgfac(0.1))
    assert_trees_close(updates, expected)


@every_transform
def test_map_params_reaches_what_is_shaped_like_the_parameters(name):
    tx = TRANSFORMS[name]()
    _, state = alone(tx)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert int(mapped.cgfac_count) == int(state.cgfac_count)
    for field in ("warm_start", "velocity"):
        before = getattr(state, field, None)
        if before is not None:
            expected = jax.tree.map(lambda leaf: leaf + 1, before)
            assert_trees_close(getattr(mapped, field), expected)


@pytest.mark.parametrize("name", ["cgfac by cg", "scale_by_cgfac"])
def test_map_params_places_the_state_beside_the_parameters(name):
    """The documented use: shardings of the state from those of the parameters."""
    tx = TRANSFORMS[name]()
    params = problem().params
    state = tx.init(params)
    mesh = jax.make_mesh((1,), ("model",))
    specs = {
        "hidden": {
            "kernel": PartitionSpec(None, "model"),
            "bias": PartitionSpec("model"),
        },
        "out": {"kernel": PartitionSpec("model", None)},
    }
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    of_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    placed = jax.device_put(state, of_state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)


@every_transform
def test_missing_gradient_lets_gradients_through_and_counts(name):
    factory = {
        "cgfac": optax_cgfac.cgfac,
        "cgfac by cg": lambda **kw: optax_cgfac.cgfac(solver="cg", **kw),
        "cgfac with a learning rate": lambda **kw: optax_cgfac.cgfac(0.1, **kw),
        "scale_by_cgfac": lambda **kw: optax_cgfac.scale_by_cgfac(0.1, **kw),
        "scale_by_cgfac on parameters": lambda **kw: optax_cgfac.scale_by_cgfac(
            0.1, space="parameter", **kw
        ),
        "scale_by_kfac": lambda **kw: optax_cgfac.scale_by_kfac(0.1, **kw),
    }[name]
    tx = factory(missing="gradient")
    grads, state = ingredients().grads, tx.init(ingredients().params)
    updates, state = tx.update(grads, state, ingredients().params, unexpected=1)
    assert_trees_close(updates, grads, rtol=0)
    assert int(state.cgfac_count) == 1


COMMON = importlib.import_module("optax.contrib._common_test")


def cases():
    """Cases of Optax's first optimizer, and of the one inside its wrappers.

    Names have only numbers; what a case tests is in its description. All others test
    other optimizers, or Optax's own inside a wrapper.
    """
    described = {
        name: COMMON.ContribTest(name).shortDescription()
        for name in dir(COMMON.ContribTest)
        if name.startswith("test")
    }
    found = {}
    for name, text in described.items():
        if name.endswith(("__with_device", "__with_pmap", "__without_jit")):
            continue
        wrapped = re.search(
            r"opt_name='sgd', opt_kwargs={'learning_rate': 0\.\d+}, "
            r"wrapper_name='(\w+)'",
            text,
        )
        if wrapped or "opt_name='acprop'" in text:
            found[name] = wrapped[1] if wrapped else None
    return found


CASES = cases()


def test_optax_own_suite_is_found():
    stems = {re.sub(r"(\d+|_\(.*)$", "", name) for name in dir(COMMON.ContribTest)}
    stems = {stem for stem in stems if stem.startswith("test")}
    for wrapper in (None, "mechanize", "schedule_free", "reduce_on_plateau"):
        names = [name for name, of in CASES.items() if of == wrapper]
        assert {re.sub(r"(\d+|_\(.*)$", "", name) for name in names} == stems


# Up to Optax 0.2.6 by its own wrappers.
@pytest.mark.filterwarnings("ignore:Implicit conversion of an array to a dtype")
@pytest.mark.parametrize("name", ["scale_by_cgfac", "scale_by_kfac", "cgfac"])
@pytest.mark.parametrize("case", CASES)
def test_optax_own_suite(monkeypatch, case, name):
    """Optax's suite with ours in an optimizer's place; it knows no curvature."""

    def ours(learning_rate: optax.ScalarOrSchedule):
        if case.startswith("test_optimizers") and CASES[case] is None:
            learning_rate = 1e-3  # of gradient descent on Rosenbrock's function
        tx = {
            "scale_by_cgfac": optax_cgfac.scale_by_cgfac,
            "scale_by_kfac": optax_cgfac.scale_by_kfac,
            "cgfac": optax_cgfac.cgfac,
        }[name](0.1, missing="gradient")
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    monkeypatch.setattr(COMMON, "_get_opt_factory", lambda name: ours)
    COMMON.ContribTest(case).debug()
