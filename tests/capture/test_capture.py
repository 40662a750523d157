"""Capture in Linen and NNX: every supported way to write a layer, left untouched."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import (
    BATCH,
    LAYER_CASES,
    NUM_EXAMPLES,
    assert_close,
    by_name,
    rebuild_gradients,
)
from models.table import COVERED, TABLE
from optax_cgfac import fisher_estimator, value_and_grad
from trees import snapshot

EPS = np.finfo(np.float32).eps
TOLERANCES = {"cast on the way": 1e-2, "half precision": 2e-2}
# Softmax does not see the bias of the keys.
ZEROS = ("attend/key/bias",)
# What compiles a function and what differentiates it.
WAYS = {
    "linen": (jax.jit, jax.value_and_grad),
    "nnx": (nnx.jit, nnx.value_and_grad),
}


def case_of(framework, name):
    return getattr(TABLE[name], framework)()


@pytest.mark.parametrize(("framework", "name"), COVERED)
def test_rows_rebuild_the_gradient_and_change_nothing(framework, name):
    case, (jit, plain_value_and_grad) = case_of(framework, name), WAYS[framework]
    plain = captured = case.params
    if framework == "nnx":
        # A module for each: what a call does to its state, the other must do too.
        plain, captured = nnx.clone(plain), nnx.clone(plain)
    # Traced without capture first: no cache of a lifted transform may hide a layer.
    value, grads = jit(plain_value_and_grad(case.loss))(plain, case.inputs)

    got_value, got_grads, curvature = jit(value_and_grad(case.loss))(
        captured, case.inputs
    )

    found = {tag.name: (tag.kind, tag.positions) for tag in curvature.tags}
    assert found == case.layers
    assert curvature.spec.uncovered == ()
    expected, tolerance = by_name(grads), TOLERANCES.get(name, 1e-5)
    assert_close(rebuild_gradients(curvature, grads), expected, tolerance, ZEROS)
    np.testing.assert_allclose(got_value, value, rtol=4 * EPS)
    assert jax.tree.structure(got_grads) == jax.tree.structure(grads)
    assert_close(by_name(got_grads), expected, 8 * EPS, ZEROS)
    before, after = snapshot(plain), snapshot(captured)
    assert before[1] == after[1]
    for x, y in zip(before[2], after[2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
@pytest.mark.parametrize(
    ("framework", "name"), [x for x in COVERED if x[0] == "nnx" or x[1] in LAYER_CASES]
)
def test_the_estimator_takes_rows_of_a_few_examples(framework, name):
    case, (jit, _) = case_of(framework, name), WAYS[framework]
    before = snapshot(case.params)
    estimator = fisher_estimator(
        case.model_fn, "squared_error", examples=NUM_EXAMPLES - 2, window=2
    )
    curvature = estimator.init(case.params, case.inputs)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), curvature)
    update = jit(estimator.update)
    for i in range(2):
        curvature = update(curvature, case.params, case.inputs, rng=jax.random.key(i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), curvature) == shapes
    assert {tag.name: tag.kind for tag in curvature.tags} == {
        name: kind for name, (kind, _) in case.layers.items()
    }
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        assert rows.g.shape == (*tag.stack, 2 * tag.rows_per_step, tag.n_out)
        leaves = jax.tree.leaves(rows)
        assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in leaves)
        # Every update's rows count: each half of the window has some.
        halves = np.split(np.asarray(rows.g, np.float32), 2, axis=-2)
        if "+" not in tag.kind:
            assert all(np.any(half) for half in halves), tag.name
    snapshot(case.params).assert_equal(before)


@pytest.mark.parametrize("framework", WAYS)
def test_an_error_in_the_users_model_leaves_capture_usable(framework):
    case = case_of(framework, "mlp")
    before = snapshot(case.params)

    def broken(params, x):
        case.loss(params, x)
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        value_and_grad(broken)(case.params, BATCH)
    snapshot(case.params).assert_equal(before)
    _, grads, curvature = value_and_grad(case.loss)(case.params, BATCH)
    assert_close(rebuild_gradients(curvature, grads), by_name(grads), 1e-6)
