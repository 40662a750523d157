"""Layers of the user's own, captured by `tag_layer`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from models import NUM_EXAMPLES, init, normal
from optax_cgfac import check_gradients, fisher_estimator, tag_layer

LAYERS = {
    "own/w": ("own/w", "own/b"),
    "own/gain": ("own/gain",),
    "shift": ("shift",),
    "slope": ("slope",),
    "out": ("out/kernel", "out/bias"),
}


class Own(nn.Module):
    """A matrix and a scale in one module, below a module with a bias and a slope."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], 4))
        b = self.param("b", nn.initializers.normal(1.0), (4,))
        y = tag_layer(self, x, x @ w + b, kernel="w", bias="b")
        gain = self.param("gain", nn.initializers.normal(1.0), (4,))
        return tag_layer(self, y, gain * y, scale="gain")


class Model(nn.Module):
    lift: str | None = None

    @nn.compact
    def __call__(self, x):
        own = {"remat": nn.remat, "jit": nn.jit}.get(self.lift, lambda cls: cls)(Own)
        x = own(name="own")(x)
        shift = self.param("shift", nn.initializers.normal(1.0), (4,))
        x = tag_layer(self, x, nn.tanh(x) + shift, bias="shift")
        slope = self.param("slope", nn.initializers.ones, ())
        x = tag_layer(self, x, slope * x, scale="slope")
        return nn.Dense(2, name="out")(nn.tanh(x))


class OwnNNX(nnx.Module):
    """`Own` in NNX."""

    def __init__(self):
        self.w = nnx.Param(normal(10, 5, 4))
        self.b = nnx.Param(normal(11, 4))
        self.gain = nnx.Param(normal(12, 4))

    def __call__(self, x):
        y = tag_layer(self, x, x @ self.w + self.b, kernel="w", bias="b")
        return tag_layer(self, y, self.gain * y, scale="gain")


class ModelNNX(nnx.Module):
    """`Model` in NNX."""

    def __init__(self, lift=None):
        self.lift = lift
        self.own = OwnNNX()
        self.shift = nnx.Param(normal(13, 4))
        self.slope = nnx.Param(jnp.ones(()))
        self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        lift = {"remat": nnx.remat, "jit": nnx.jit}.get(self.lift, lambda f: f)
        x = lift(lambda own, x: own(x))(self.own, x)
        x = tag_layer(self, x, nn.tanh(x) + self.shift, bias="shift")
        x = tag_layer(self, x, self.slope * x, scale="slope")
        return self.out(nn.tanh(x))


def linen(lift, x):
    model = Model(lift)
    return lambda params, x: model.apply({"params": params}, x), init(model, x)


def in_nnx(lift, x):
    return lambda module, x: module(x), ModelNNX(lift)


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize("lift", [None, "remat", "jit"])
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=["vectors", "positions"])
def test_the_rows_of_own_layers_rebuild_their_gradients(make, lift, shape):
    x = normal(0, NUM_EXAMPLES, *shape)
    model_fn, params = make(lift, x)
    found = check_gradients(
        lambda p, x: jnp.mean(jnp.sum(model_fn(p, x) ** 2, -1)), params, x
    )
    assert set(found.errors) == {leaf for leaves in LAYERS.values() for leaf in leaves}
    assert max(found.errors.values()) < 1e-5
    assert not found.uncovered


@pytest.mark.parametrize("make", [linen, in_nnx])
def test_the_estimator_covers_them(make):
    x = normal(0, NUM_EXAMPLES, 5)
    model_fn, params = make(None, x)
    estimator = fisher_estimator(model_fn, "squared_error", examples=4)
    curvature = estimator.init(params, x)
    update = jax.jit(estimator.update)
    curvature = update(curvature, params, x, rng=jax.random.key(0))
    found = {tag.name: tuple("/".join(p) for p in tag.leaves) for tag in curvature.tags}
    assert found == LAYERS
    assert not curvature.spec.uncovered
    assert all(np.any(curvature.layers[name].g) for name in LAYERS)


def test_an_nnx_layer_without_the_named_parameter_is_refused():
    layer, x = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    with pytest.raises(ValueError, match="Linear has no parameter w; it has kernel"):
        tag_layer(layer, x, x, bias="w")
