"""Parameters that no tag covers: found, explained, and three ways out."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_cgfac
from models import NUM_EXAMPLES, Compact, JitMethod, init, normal
from models.reported import HIDDEN, UNCOVERED, WithScale, X
from training import squared_error, train_step
from trees import assert_trees_close


def estimator_of(model, **options):
    return optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x),
        "squared_error",
        examples=4,
        **options,
    )


def estimate(model, inputs=X, params=None, **options):
    params = init(model, inputs) if params is None else params
    return estimator_of(model, **options).init(params, inputs)


@pytest.mark.parametrize("name", UNCOVERED)
def test_init_lists_them_with_reasons_and_three_ways_out_of_which_fallback_works(name):
    model, inputs, paths, reason = UNCOVERED[name]
    with pytest.raises(ValueError, match=reason) as error:
        estimate(model, inputs)
    message = str(error.value)
    have = "1 parameter has" if len(paths) == 1 else f"{len(paths)} parameters have"
    assert message.startswith(f"{have} no curvature:\n")
    for path in paths:
        assert f"\n  {path}: " in message
    assert "last/kernel: " not in message
    for way_out in ("1. where", "2. fallback", "3. another layer", "tag_layer"):
        assert way_out in message
    curvature = estimate(model, inputs, fallback=True)
    assert sorted("/".join(path) for path, _ in curvature.spec.uncovered) == paths
    assert curvature.covers("last/kernel")
    assert not any(curvature.covers(path) for path in paths)


def test_where_leaves_out_and_names_that_as_the_reason():
    curvature = estimate(WithScale(), where=lambda path: "norm" not in path)
    assert [tag.name for tag in curvature.tags] == ["first", "last"]
    assert "norm/scale: left out by where" in curvature.report()


@pytest.mark.parametrize("name", HIDDEN)
def test_an_apply_under_a_jax_transform_of_the_user_raises_a_clear_error(name):
    """Never a leaked tracer, and never a report that says all is covered."""
    estimator = optax_cgfac.fisher_estimator(
        HIDDEN[name](), "squared_error", examples=4
    )
    with pytest.raises(ValueError, match=r"jax\.jit|jitted before|no curvature"):
        estimator.init(init(Compact(), X), X)


@pytest.mark.parametrize(
    "model",
    [nn.jit(Compact)(), nn.remat(Compact)(), JitMethod()],
    ids=["nn.jit", "nn.remat", "nn.jit of the method"],
)
def test_an_outermost_lifted_class_is_captured_or_refused_by_init(model):
    """What init accepts, update must be able to do."""
    estimator, params = estimator_of(model), init(model, X)
    try:
        curvature = estimator.init(params, X)
    except ValueError as error:
        assert "no curvature" in str(error)  # noqa: PT017
        return
    curvature = jax.jit(estimator.update)(curvature, params, X, rng=jax.random.key(0))
    assert all(np.any(rows.g) for rows in curvature.layers.values())


def test_the_fallback_trains_the_rest_exactly_as_it_would_alone():
    model = WithScale()
    params, target = init(model, X), normal(1, NUM_EXAMPLES, 2)
    estimator = estimator_of(model, fallback=True)
    curvature = estimator.init(params, X)
    adam = optax.adam(1e-2)
    tx = optax_cgfac.cgfac(fallback=adam, where=curvature.covers)

    def loss_fn(params, x):
        return squared_error(model.apply({"params": params}, x), target)

    step = jax.jit(train_step(tx, estimator, loss_fn, lambda batch: batch))
    state, adam_state = (params, tx.init(params), curvature), adam.init(params["norm"])
    for i in range(3):
        norm, grads = state[0]["norm"], jax.grad(loss_fn)(state[0], X)["norm"]
        expected, adam_state = adam.update(grads, adam_state)
        state, _ = step(state, X, jax.random.key(i))
        expected = optax.apply_updates(norm, expected)
        assert_trees_close(state[0]["norm"], expected, rtol=1e-5)
    assert loss_fn(state[0], X) < loss_fn(params, X)
    assert np.any(state[0]["last"]["kernel"] != params["last"]["kernel"])


def test_an_uncovered_parameter_without_a_fallback_stops_the_update():
    params, tx = init(WithScale(), X), optax_cgfac.cgfac(0.1)
    curvature = estimate(WithScale(), fallback=True)
    with pytest.raises(ValueError, match=r"norm/bias, norm/scale.*fallback=optax.adam"):
        tx.update(params, tx.init(params), params, curvature=curvature)


def test_left_out_parameters_get_their_plain_gradient():
    params, tx = init(WithScale(), X), optax_cgfac.scale_by_cgfac(0.1)
    curvature = estimate(WithScale(), where=lambda path: "norm" not in path)
    updates, _ = tx.update(params, tx.init(params), params, curvature=curvature)
    np.testing.assert_array_equal(updates["norm"]["scale"], params["norm"]["scale"])
