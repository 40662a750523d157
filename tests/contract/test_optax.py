"""The transformations inside Optax's own wrappers, and Optax's own suite."""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cgfac import cgfac, diagnostics, scale_by_cgfac, scale_by_kfac
from steps import TRANSFORMS, first, ingredients, update
from trees import assert_trees_close, is_zero, scaled


def test_wrappers_hand_the_curvature_on_to_the_parameters_of_each():
    solved, grads = first(scale_by_cgfac(0.1))[0], ingredients().grads
    half, sgd = scaled(-0.5, solved), scaled(-0.3, grads)
    labels = {"hidden": "second", "out": "first"}
    chain = optax.clip_by_global_norm(1e6), scale_by_cgfac(0.1), optax.scale(-0.5)
    parts = {"second": scale_by_cgfac(0.1), "first": optax.sgd(0.3)}
    steps = {"second": cgfac(0.1), "first": optax.set_to_zero()}
    for tx, hidden, out in (
        (optax.chain(*chain), half, half),
        (optax.masked(chain[1], {"hidden": True, "out": False}), solved, grads),
        (optax.partition(parts, labels), solved, sgd),
        (optax.partition(steps, labels), first(cgfac(0.1))[0], scaled(0.0, grads)),
    ):
        updates, _ = first(tx)
        assert_trees_close(updates["hidden"], hidden["hidden"], rtol=1e-5)
        assert_trees_close(updates["out"], out["out"], rtol=1e-5)


def test_a_masked_bias_leaves_the_kernel_its_own_rows():
    """Without the bias the layer's matrix has one row less, and so its rows."""
    mask = {"hidden": {"kernel": True, "bias": False}, "out": True}
    updates, _ = first(optax.masked(scale_by_kfac(0.1), mask))

    rows, grads = ingredients().curvature.layers["hidden"], ingredients().grads
    a, g = (np.asarray(x, np.float64) for x in rows)
    factors = a[:, :-1].T @ a[:, :-1] / len(a), g.T @ g / len(g)
    b = np.asarray(grads["hidden"]["kernel"], np.float64)
    dense = np.kron(*factors) + 0.1 * np.eye(b.size)
    expected = np.linalg.solve(dense, b.ravel()).reshape(b.shape)
    np.testing.assert_allclose(updates["hidden"]["kernel"], expected, rtol=1e-3)
    np.testing.assert_array_equal(updates["hidden"]["bias"], grads["hidden"]["bias"])
    # What is left of another layer has no name among the parameters.
    _, state = first(optax.masked(scale_by_kfac(0.1), {"hidden": False, "out": True}))
    assert set(diagnostics(state, ingredients().params)["layers"]) == {"leaf_0"}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("factory", [scale_by_cgfac, scale_by_kfac, cgfac])
def test_inject_hyperparams_makes_the_damping_traced(factory, static):
    """Every number of the signature becomes an array, unless it is excluded."""
    arguments = {"learning_rate": 0.1} if factory is cgfac else {}
    others = set(inspect.signature(factory).parameters) - {"damping", *arguments}
    inject = optax.inject_hyperparams(factory, static_args=others if static else ())
    tx, traces = inject(damping=0.1, **arguments), []
    state = tx.init(ingredients().params)

    @jax.jit
    def run(grads, state, given):
        traces.append(1)
        return tx.update(grads, state, given.params, curvature=given.curvature)[0]

    for damping in (0.1, 1.0):
        state.hyperparams["damping"] = jnp.asarray(damping)
        updates = run(ingredients().grads, state, ingredients())
        expected, _ = first(factory(damping=damping, **arguments))
        assert_trees_close(updates, expected)
    assert len(traces) == 1


def test_apply_if_finite_skips_a_bad_gradient():
    tx = optax.apply_if_finite(scale_by_cgfac(0.1), 3)
    updates, state = first(tx, grads=scaled(jnp.nan, ingredients().grads))
    assert is_zero(updates)
    assert int(state.total_notfinite) == 1
    assert int(state.inner_state.cgfac_count) == 0
    assert_trees_close(update(tx, state)[0], first(scale_by_cgfac(0.1))[0])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_map_params_reaches_what_is_shaped_like_the_parameters(name):
    tx = TRANSFORMS[name]()
    _, state = first(tx)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert int(mapped.cgfac_count) == int(state.cgfac_count)
    for field in ("warm_start", "velocity"):
        before = getattr(state, field, None)
        if before is not None:
            expected = jax.tree.map(lambda leaf: leaf + 1, before)
            assert_trees_close(getattr(mapped, field), expected)


COMMON = importlib.import_module("optax.contrib._common_test")


def cases():
    """Cases of Optax's first optimizer, and of the one inside its wrappers.

    Names have only numbers; what a case tests is in its description. All others test
    other optimizers, or Optax's own inside a wrapper.
    """
    found, inside = {}, r"opt_name='sgd', opt_kwargs={'learning_rate': 0\.\d+}, "
    for name in dir(COMMON.ContribTest):
        unlike = name.endswith(("__with_device", "__with_pmap", "__without_jit"))
        if not name.startswith("test") or unlike:
            continue
        text = COMMON.ContribTest(name).shortDescription()
        wrapped = re.search(rf"{inside}wrapper_name='(\w+)'", text)
        if wrapped or "opt_name='acprop'" in text:
            found[name] = wrapped[1] if wrapped else None
    return found


CASES = cases()


def test_optax_own_suite_is_found():
    wrappers = {None, "mechanize", "schedule_free", "reduce_on_plateau"}
    assert wrappers <= set(CASES.values())
    assert len(CASES) >= 4 * len(wrappers)


def without_curvature(tx):
    """Lets gradients through: the suite has no curvature, and complex parameters."""

    def init(params):
        return tx.init(jax.tree.map(jnp.real, params))

    def update(updates, state, params=None, **extra):
        del params, extra
        return updates, state._replace(cgfac_count=state.cgfac_count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


# Up to Optax 0.2.6 by its own wrappers.
@pytest.mark.filterwarnings("ignore:Implicit conversion of an array to a dtype")
@pytest.mark.parametrize("factory", [scale_by_cgfac, scale_by_kfac, cgfac])
@pytest.mark.parametrize("case", CASES)
def test_optax_own_suite(monkeypatch, case, factory):
    """Optax's suite with ours in an optimizer's place."""

    def ours(learning_rate: optax.ScalarOrSchedule):
        if case.startswith("test_optimizers") and CASES[case] is None:
            learning_rate = 1e-3  # of gradient descent on Rosenbrock's function
        tx = without_curvature(factory(0.1))
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    monkeypatch.setattr(COMMON, "_get_opt_factory", lambda name: ours)
    COMMON.ContribTest(case).debug()
