"""`whole_batch`: models that compare the examples of a batch with each other."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import oracles
from models import LAYER_CASES, NUM_EXAMPLES, init, normal
from optax_cgfac import fisher_estimator
from optax_cgfac.optimize.adaptive.quadratic_model import gauss_newton_products

X = normal(0, NUM_EXAMPLES, 5)
ROWS = 3


def rows_of(model_fn, params, inputs, **options):
    estimator = fisher_estimator(
        model_fn, "squared_error", examples=ROWS, window=1, **options
    )
    curvature = estimator.init(params, inputs)
    return jax.jit(estimator.update)(curvature, params, inputs, rng=jax.random.key(3))


@pytest.mark.parametrize(
    "name",
    [
        "conv strides",
        "conv grouped",
        "conv shared on two sizes",
        "embed (N, T)",
        "attend tied",
        "LayerNorm (N, T, C)",
        "GRUCell",
    ],
)
def test_models_without_such_layers_have_the_rows_of_a_slice(name):
    case = LAYER_CASES[name]()
    few, whole = (
        rows_of(
            case.model_fn,
            case.params,
            case.inputs,
            whole_batch=whole,
            input_axes=case.input_axes,
        )
        for whole in (False, True)
    )
    assert few.tags == whole.tags
    assert any(np.any(rows.g) for rows in few.layers.values())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        few.layers,
        whole.layers,
    )


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(4)(x))
        return nn.Dense(2, name="out")(nn.tanh(x))


def normalized():
    model = Normalized()
    params = init(model, X)

    def model_fn(params, x):
        return model.apply({"params": params}, x, mutable=["batch_stats"])[0]

    return model_fn, params


class NormalizedNNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=False, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("make", [normalized, None], ids=["linen", "nnx"])
def test_statistics_are_those_of_the_whole_batch(make):
    if make is None:
        params = NormalizedNNX()
        model_fn, hidden = (lambda m, x: m(x)), nnx.clone(params)
        hidden = jnp.tanh(hidden.norm(hidden.first(X)))
    else:
        model_fn, params = make()
        first = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        centred = (first - first.mean(0)) / jnp.sqrt(first.var(0) + 1e-5)
        hidden = jnp.tanh(centred * params["norm"]["scale"] + params["norm"]["bias"])
    curvature = rows_of(model_fn, params, X, whole_batch=True)
    taken = np.asarray(curvature.layers["out"].a)[:, :-1]
    assert len(taken) == ROWS
    for row in taken:
        assert np.min(np.abs(np.asarray(hidden) - row).max(-1)) < 1e-5
    # A slice alone has other statistics.
    with pytest.warns(UserWarning, match=r"\(norm\) compares .* whole_batch=True"):
        sliced = rows_of(model_fn, params, X).layers["out"].a
    for row in np.asarray(sliced)[:, :-1]:
        assert np.min(np.abs(np.asarray(hidden) - row).max(-1)) > 1e-2


@pytest.mark.usefixtures("x64")
def test_gauss_newton_products_are_those_of_the_whole_batch():
    model_fn, params = normalized()
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, X))
    curvature = rows_of(model_fn, params, x, whole_batch=True)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacrev(lambda p: model_fn(unravel(p), x))(flat)
    jacobian = oracles.float64(jacobian).reshape(-1, len(flat))
    direction = jax.random.normal(jax.random.key(5), flat.shape, flat.dtype)
    expected = 2 * np.sum((jacobian @ np.asarray(direction)) ** 2) / NUM_EXAMPLES
    product = gauss_newton_products(curvature, params, [unravel(direction)])
    assert float(product[0, 0]) == pytest.approx(expected, rel=1e-10)
