"""Small models train with the defaults, and with each way to put the parts together."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_cgfac
from problems import MLP
from training import train_step


def train(state, step, num_steps):
    """The losses of steps in one compiled scan."""

    def body(state, seed):
        return step(state, None, jax.random.key(seed))

    _, losses = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(num_steps)))(state)
    return losses


def estimated(task, loss, tx, num_steps, **options):
    """Trains with ``fisher_estimator``, as in the README."""
    model, params, x, loss_fn = task
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x), loss, **options
    )
    step = train_step(tx, estimator, lambda p, _: loss_fn(p), inputs=lambda _: x)
    state = params, tx.init(params), estimator.init(params, x)
    return train(state, step, num_steps)


def classifier():
    """Labels by a random teacher network; ten inputs, four classes."""
    model = MLP((16, 16, 4), dtype="float32")
    x = jax.random.normal(jax.random.key(1), (128, 10))
    labels = jnp.argmax(model.apply(model.init(jax.random.key(2), x), x), -1)

    def loss_fn(params):
        logits = model.apply({"params": params}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return model, jax.jit(model.init)(jax.random.key(0), x)["params"], x, loss_fn


def chained():
    """Algorithm 2: Tikhonov damping, warm start, a fixed step."""
    return optax.chain(
        optax_cgfac.scale_by_cgfac(0.03, max_steps=5), optax.scale_by_learning_rate(0.1)
    )


def scheduled():
    """A rate that is too large in between; without `kl_clip` it ends at 0.08."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 3.0, 10, 60)
    return optax_cgfac.cgfac(rate, kl_clip=0.1)


def structured(structure):
    return lambda: optax_cgfac.cgfac(structure=structure)


FEW = {"examples": 16, "window": 4}


@pytest.mark.parametrize(
    ("make", "num_steps", "factor", "options"),
    [
        (optax_cgfac.cgfac, 40, 0.1, {}),
        (chained, 60, 0.5, {}),
        (scheduled, 60, 0.05, {}),
        (structured("block"), 60, 0.5, FEW),
        (structured("full"), 60, 0.5, FEW),
    ],
    ids=["defaults", "building block", "schedule", "block", "full"],
)
def test_a_classifier_trains(make, num_steps, factor, options):
    loss = "softmax_cross_entropy"
    losses = estimated(classifier(), loss, make(), num_steps, **options)
    assert losses[-1] < factor * losses[0]


def test_the_single_pass_trains_with_a_window():
    _, params, _, loss_fn = classifier()
    tx = optax_cgfac.cgfac(learning_rate=0.1, momentum=0.5, kl_clip=1e-2)
    capture = optax_cgfac.value_and_grad(loss_fn)

    def step(state, _, rng):
        del rng
        params, opt_state, window = state
        value, grads, curvature = capture(params)
        window = window.push(curvature)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=window)
        return (optax.apply_updates(params, updates), opt_state, window), value

    window = capture(params)[2].with_window(2)
    losses = train((params, tx.init(params), window), step, 60)
    assert losses[-1] < 0.5 * losses[0]
