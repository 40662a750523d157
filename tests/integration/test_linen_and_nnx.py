"""A Linen model and its NNX twin with equal weights take equal steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from models import NUM_EXAMPLES, init, normal
from nnx_models import rngs
from optax_cgfac import cgfac, fisher_estimator, scale_by_cgfac, value_and_grad
from optax_cgfac.utils.paths import leaves_by_path


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.tanh(nn.Dense(4, name="first")(x)))


class Mlp(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(5, 4, rngs=rngs())
        self.last = nnx.Linear(4, 3, rngs=rngs())

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
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


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 5, name="embed")
        return embed.attend(nn.tanh(nn.Dense(5, name="mix")(embed(tokens))))


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 5, rngs=rngs())
        self.mix = nnx.Linear(5, 5, rngs=rngs())

    def __call__(self, tokens):
        return self.embed.attend(nnx.tanh(self.mix(self.embed(tokens))))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention(
            2, qkv_features=6, out_features=4, name="attend"
        )
        return attend(x)


class Attention(nnx.Module):
    def __init__(self):
        self.attend = nnx.MultiHeadAttention(
            2, in_features=5, qkv_features=6, out_features=4, decode=False, rngs=rngs()
        )

    def __call__(self, x):
        return self.attend(x)


TWINS = {
    "mlp": (LinenMlp, Mlp, normal(0, NUM_EXAMPLES, 5)),
    "cnn": (LinenCnn, Cnn, normal(0, NUM_EXAMPLES, 6, 6, 2)),
    "embed and attend": (
        LinenTied,
        Tied,
        jax.random.randint(jax.random.key(3), (NUM_EXAMPLES, 4), 0, 7),
    ),
    "attention": (LinenAttention, Attention, normal(0, NUM_EXAMPLES, 3, 5)),
}


def twins(name):
    linen_class, nnx_class, inputs = TWINS[name]
    linen, module = linen_class(), nnx_class()
    params = init(linen, inputs)
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
    tx = cgfac()
    linen_estimator = fisher_estimator(
        lambda p, x: linen.apply({"params": p}, x), "squared_error", examples=4
    )
    nnx_estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
    linen_curvature = linen_estimator.init(params, inputs)
    nnx_curvature = nnx_estimator.init(module, inputs)
    opt_state = tx.init(params)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    def linen_loss(params):
        return mean_square(linen.apply({"params": params}, inputs))

    @jax.jit
    def linen_step(params, opt_state, curvature, rng):
        value, grads = jax.value_and_grad(linen_loss)(params)
        curvature = linen_estimator.update(curvature, params, inputs, rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=value,
            value_fn=linen_loss,
        )
        return optax.apply_updates(params, updates), opt_state, curvature

    @nnx.jit
    def nnx_step(module, optimizer, curvature, rng):
        graphdef, _, rest = nnx.split(module, nnx.Param, ...)

        def value_fn(params):
            return mean_square(nnx.merge(graphdef, params, rest, copy=True)(inputs))

        value, grads = nnx.value_and_grad(lambda m: mean_square(m(inputs)))(module)
        curvature = nnx_estimator.update(curvature, module, inputs, rng=rng)
        optimizer.update(
            module, grads, curvature=curvature, value=value, value_fn=value_fn
        )
        return curvature

    for seed in range(3):
        rng = jax.random.key(seed)
        params, opt_state, linen_curvature = linen_step(
            params, opt_state, linen_curvature, rng
        )
        nnx_curvature = nnx_step(module, optimizer, nnx_curvature, rng)
        if seed == 0:
            assert_equal_leaves(params, nnx.state(module, nnx.Param))
    for path, leaf in leaves_by_path(params).items():
        other = leaves_by_path(nnx.state(module, nnx.Param))[path]
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4)
