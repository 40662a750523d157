"""Small models train with the defaults, and with each way to put the parts together."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_cgfac


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def train(model, x, loss_fn, step_of, num_steps):
    """Losses of ``num_steps`` steps in one compiled scan."""
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state, step = step_of(params)

    def body(state, seed):
        return step(state, jax.random.key(seed))

    state, losses = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(num_steps)))(
        state
    )
    return float(losses[0]), float(loss_fn(state[0]))


def estimated(model, x, loss_fn, loss, tx, **options):
    """A step with ``fisher_estimator``, as in the README."""
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x), loss, **options
    )

    def step(state, rng):
        params, opt_state, curvature = state
        value, grads = jax.value_and_grad(loss_fn)(params)
        curvature = estimator.update(curvature, params, x, rng=rng)
        updates, opt_state = tx.update(
            grads, opt_state, params, curvature=curvature, value=value, value_fn=loss_fn
        )
        return (optax.apply_updates(params, updates), opt_state, curvature), value

    return lambda params: ((params, tx.init(params), estimator.init(params, x)), step)


def classifier():
    """Labels by a random teacher network; ten inputs, four classes."""
    model = MLP((16, 16, 4))
    x = jax.random.normal(jax.random.key(1), (128, 10))
    teacher = model.init(jax.random.key(2), x)
    labels = jnp.argmax(model.apply(teacher, x), -1)

    def loss_fn(params):
        logits = model.apply({"params": params}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return model, x, loss_fn


def test_a_classifier_trains_with_the_defaults():
    model, x, loss_fn = classifier()
    step_of = estimated(model, x, loss_fn, "softmax_cross_entropy", optax_cgfac.cgfac())
    start, end = train(model, x, loss_fn, step_of, 40)
    assert end < 0.1 * start


def test_an_autoencoder_trains_with_the_defaults():
    """Ill-conditioned inputs of rank four; the code has four units."""
    model = MLP((16, 4, 16, 20))
    scales = 10.0 ** -jnp.arange(0, 2, 0.5)
    code = jax.random.normal(jax.random.key(1), (128, 4)) * scales
    x = jnp.tanh(code @ jax.random.normal(jax.random.key(2), (4, 20)))

    def loss_fn(params):
        outputs = model.apply({"params": params}, x)
        return jnp.mean(jnp.sum((outputs - x) ** 2, -1))

    step_of = estimated(model, x, loss_fn, "squared_error", optax_cgfac.cgfac())
    start, end = train(model, x, loss_fn, step_of, 60)
    assert end < 0.05 * start


def test_the_building_block_trains_with_a_learning_rate():
    """Algorithm 2: Tikhonov damping, warm start, a fixed step."""
    model, x, loss_fn = classifier()
    tx = optax.chain(
        optax_cgfac.scale_by_cgfac(0.03, max_steps=5), optax.scale_by_learning_rate(0.1)
    )
    step_of = estimated(model, x, loss_fn, "softmax_cross_entropy", tx)
    start, end = train(model, x, loss_fn, step_of, 60)
    assert end < 0.5 * start


def test_a_schedule_trains_with_the_default_damping():
    """A rate that is too large in between; without `kl_clip` it ends at 0.08."""
    model, x, loss_fn = classifier()
    rate = optax.warmup_cosine_decay_schedule(0.0, 3.0, 10, 60)
    tx = optax_cgfac.cgfac(rate, kl_clip=0.1)
    step_of = estimated(model, x, loss_fn, "softmax_cross_entropy", tx)
    start, end = train(model, x, loss_fn, step_of, 60)
    assert end < 0.05 * start


def test_the_single_pass_trains_with_a_window():
    model, x, loss_fn = classifier()
    tx = optax_cgfac.cgfac(learning_rate=0.1, momentum=0.5, kl_clip=1e-2)
    run = optax_cgfac.value_and_grad(loss_fn)

    def step(state, rng):
        del rng
        params, opt_state, window = state
        value, grads, curvature = run(params)
        window = window.push(curvature)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=window)
        return (optax.apply_updates(params, updates), opt_state, window), value

    def step_of(params):
        _, _, curvature = run(params)
        return (params, tx.init(params), curvature.with_window(2)), step

    start, end = train(model, x, loss_fn, step_of, 60)
    assert end < 0.5 * start
