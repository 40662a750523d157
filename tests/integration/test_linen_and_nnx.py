"""A Linen model and its NNX twin with equal weights take equal steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from models import BATCH, NUM_EXAMPLES, init, normal
from models.linen_modules import Function
from models.nnx_modules import Mlp, attention, rngs, tied
from models.table import CODES, FEATURES
from optax_cgfac import cgfac, fisher_estimator, scale_by_cgfac, value_and_grad
from optax_cgfac.utils.paths import leaves_by_path
from training import assert_close, nnx_step, train_step


@Function
def linen_mlp(x):
    return nn.Dense(3, name="last")(nn.tanh(nn.Dense(4, name="first")(x)))


@Function
def linen_cnn(x):
    x = nn.tanh(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
    x = nn.GroupNorm(num_groups=2, name="norm")(x)
    return nn.Dense(3, name="last")(x.reshape(x.shape[0], -1))


class Cnn(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs())
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs())
        self.last = nnx.Linear(36, 3, rngs=rngs())

    def __call__(self, x):
        x = self.norm(nnx.tanh(self.conv(x)))
        return self.last(x.reshape(x.shape[0], -1))


@Function
def linen_tied(tokens):
    embed = nn.Embed(7, 5, name="embed")
    return embed.attend(nn.tanh(nn.Dense(5, name="mix")(embed(tokens))))


@Function
def linen_attention(x):
    return nn.MultiHeadDotProductAttention(
        2, qkv_features=6, out_features=4, name="attend"
    )(x)


TWINS = {
    "mlp": (linen_mlp, lambda: Mlp(rngs()), BATCH),
    "cnn": (linen_cnn, Cnn, normal(0, NUM_EXAMPLES, 6, 6, 2)),
    "embed and attend": (linen_tied, tied, CODES),
    "attention": (linen_attention, lambda: attention(out_features=4), FEATURES),
}


def twins(name):
    linen, make, inputs = TWINS[name]
    module, params = make(), init(linen, inputs)
    nnx.update(module, params)
    return linen, params, module, inputs


def assert_equal_leaves(linen, module):
    linen, module = leaves_by_path(linen), leaves_by_path(module)
    assert linen.keys() == module.keys()
    scale = max(float(jnp.abs(leaf).max()) for leaf in linen.values())
    for path, leaf in linen.items():
        if path == ("attend", "key", "bias"):
            continue  # softmax does not see it: its gradient is rounding alone
        difference = float(jnp.abs(leaf - module[path]).max())
        assert difference <= 1e-6 * scale, (path, difference / scale)


def mean_square(outputs):
    return jnp.mean(jnp.sum((outputs - 0.3) ** 2, -1))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("damping_form", ["tikhonov", "factored"])
def test_the_single_pass_gives_equal_updates(name, damping_form):
    # Of attention's keys, nearly singular, CG makes more of a float's rounding.
    with jax.enable_x64(name == "attention"):
        check_updates(name, damping_form)


def check_updates(name, damping_form):
    linen, params, module, inputs = twins(name)
    if name == "attention":
        params, inputs = jax.tree.map(lambda x: x.astype(jnp.float64), (params, inputs))
        nnx.update(module, params)
    tx = scale_by_cgfac(0.1, damping_form=damping_form)

    def linen_loss(params, x):
        return mean_square(linen.apply({"params": params}, x))

    def nnx_loss(module, x):
        return mean_square(module(x))

    value, grads, curvature = jax.jit(value_and_grad(linen_loss))(params, inputs)
    updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)

    got, got_grads, got_curvature = nnx.jit(value_and_grad(nnx_loss))(module, inputs)
    state = nnx.state(module, nnx.Param)
    got_updates, _ = tx.update(
        got_grads, tx.init(state), state, curvature=got_curvature
    )

    np.testing.assert_allclose(got, value, rtol=1e-6)
    assert got_curvature.tags == curvature.tags
    assert_equal_leaves(grads, got_grads)
    assert_equal_leaves(updates, got_updates)


@pytest.mark.parametrize("name", TWINS)
def test_optimizers_take_equal_steps(name):
    linen, params, module, inputs = twins(name)
    tx, batch = cgfac(), {"x": inputs}
    options = {"loss": "squared_error", "examples": 4}

    def linen_fn(params, x):
        return linen.apply({"params": params}, x)

    estimator = fisher_estimator(linen_fn, **options)
    state = params, tx.init(params), estimator.init(params, inputs)
    linen_step = jax.jit(
        train_step(tx, estimator, lambda p, b: mean_square(linen_fn(p, b["x"])))
    )
    estimator = fisher_estimator(lambda m, x: m(x), **options)
    curvature = estimator.init(module, inputs)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    module_step = nnx.jit(nnx_step(estimator, lambda m, b: mean_square(m(b["x"]))))
    for seed in range(3):
        rng = jax.random.key(seed)
        state, _ = linen_step(state, batch, rng)
        curvature, _ = module_step(module, optimizer, curvature, batch, rng)
        if seed == 0:
            assert_equal_leaves(state[0], nnx.state(module, nnx.Param))
    found = leaves_by_path(nnx.state(module, nnx.Param))
    assert_close(found, leaves_by_path(state[0]), rtol=1e-3, atol=1e-4)
