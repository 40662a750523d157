"""The problems that every contestant trains on: model, data, loss and goal.

To add a workload, write a function that returns a `Workload` and add it to
`WORKLOADS`. The command line, tuning, robustness runs and the report pick it up.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import make_curves, mnist, text
from networks import CNN, MLP, Autoencoder, PixelAutoencoder, Transformer

CHUNK = 1000  # examples evaluated at once

Batch = dict[str, jax.Array]

# Summed over the last axis of the outputs, averaged over all others, as in
# `optax_cgfac.fisher_estimator`.
LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
    "sigmoid_binary_cross_entropy": lambda outputs, targets: (
        optax.sigmoid_binary_cross_entropy(outputs, targets).sum(axis=-1)
    ),
    "squared_error": lambda outputs, targets: optax.squared_error(outputs, targets).sum(
        axis=-1
    ),
}


class Workload(NamedTuple):
    """A problem to train on."""

    name: str  # for file names and the command line
    title: str  # for tables and plots
    metric: str  # what the loss measures, for tables and plots
    model: nn.Module  # maps ``batch["x"]`` to outputs
    loss: str  # a key of `LOSSES`, and a loss of `optax_cgfac.fisher_estimator`
    data: dict[str, np.ndarray]  # ``x`` and ``y``, with a leading axis of examples
    batch_size: int  # of `cgfac` and of the paired step times
    thresholds: tuple[float, ...] = ()  # decreasing losses over all the data
    # Without thresholds, the loss to reach is Adam's best in so many epochs.
    epochs: int | None = None
    other_batch_sizes: tuple[int, ...] = ()  # further ones for `cgfac`
    min_steps: int = 0  # `cgfac` takes so many, for a target at a fixed step

    @property
    def num_examples(self) -> int:
        return len(self.data["x"])

    def num_steps(self, batch_size: int) -> int:
        """Returns the steps of ``epochs`` epochs, 0 without ``epochs``."""
        return (self.epochs or 0) * (self.num_examples // batch_size)

    def init(self, seed: int) -> Any:
        """Returns the initial parameters shared by all contestants."""
        return self.model.init(jax.random.key(seed), jnp.asarray(self.data["x"][:1]))

    def model_fn(self, params: Any, inputs: jax.Array) -> jax.Array:
        return self.model.apply(params, inputs)

    def loss_fn(self, params: Any, batch: Batch) -> jax.Array:
        """Returns the mean loss of a batch."""
        outputs = self.model_fn(params, batch["x"])
        return LOSSES[self.loss](outputs, batch["y"]).mean()

    def batch(self, size: int) -> Batch:
        """Returns the first examples, for compilation."""
        return {key: jnp.asarray(value[:size]) for key, value in self.data.items()}

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Yields batches without replacement forever, reshuffled every epoch."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(self.num_examples)
            for first in range(0, self.num_examples - size + 1, size):
                chosen = order[first : first + size]
                yield {k: jnp.asarray(v[chosen]) for k, v in self.data.items()}

    def evaluator(self) -> Callable[[Any], float]:
        """Returns a compiled function from parameters to the loss over all the data."""
        loss_fn = jax.jit(self.loss_fn)
        chunks = [
            {k: jnp.asarray(v[i : i + CHUNK]) for k, v in self.data.items()}
            for i in range(0, self.num_examples, CHUNK)
        ]
        weights = [len(chunk["x"]) / self.num_examples for chunk in chunks]

        def evaluate(params: Any) -> float:
            losses = [loss_fn(params, chunk) for chunk in chunks]
            return sum(w * float(x) for w, x in zip(weights, losses, strict=True))

        return evaluate


def curves(smoke: bool) -> Workload:
    """The 784-1000-500-250-30 autoencoder of Hinton and Salakhutdinov on CURVES."""
    images = make_curves(300 if smoke else 10_000)
    return Workload(
        name="curves",
        title="CURVES autoencoder",
        metric="cross-entropy per image",
        model=Autoencoder((32, 8) if smoke else (1000, 500, 250, 30)),
        loss="sigmoid_binary_cross_entropy",
        data={"x": images, "y": images},
        batch_size=100 if smoke else 1000,
        thresholds=(300.0, 220.0) if smoke else (120.0, 100.0, 80.0, 70.0, 60.0),
        other_batch_sizes=(50,) if smoke else (256,),
        min_steps=10 if smoke else 100,
    )


def mnist_autoencoder(smoke: bool) -> Workload:
    """The same autoencoder on 5,000 digits, with squared error."""
    images, _ = mnist(250 if smoke else None)
    return Workload(
        name="mnist_autoencoder",
        title="MNIST autoencoder",
        metric="squared error per image",
        model=PixelAutoencoder((32, 8) if smoke else (1000, 500, 250, 30)),
        loss="squared_error",
        data={"x": images, "y": images},
        batch_size=100 if smoke else 500,
        thresholds=(90.0, 60.0) if smoke else (20.0, 10.0, 5.0, 3.0, 2.2),
    )


def mnist_mlp(smoke: bool) -> Workload:
    """784-512-256-10 with ReLU on 5,000 digits."""
    images, labels = mnist(250 if smoke else None)
    return Workload(
        name="mnist_mlp",
        title="MNIST classifier, MLP",
        metric="cross-entropy",
        model=MLP((32, 10) if smoke else (512, 256, 10)),
        loss="softmax_cross_entropy",
        data={"x": images, "y": labels},
        batch_size=50 if smoke else 128,
        epochs=2 if smoke else 10,
    )


def mnist_cnn(smoke: bool) -> Workload:
    """Two strided convolutions and two dense layers on 5,000 digits."""
    images, labels = mnist(250 if smoke else None)
    return Workload(
        name="mnist_cnn",
        title="MNIST classifier, CNN",
        metric="cross-entropy",
        model=CNN((4, 4), 16) if smoke else CNN(),
        loss="softmax_cross_entropy",
        data={"x": images.reshape(-1, 28, 28, 1), "y": labels},
        batch_size=50 if smoke else 128,
        epochs=2 if smoke else 10,
    )


def transformer(smoke: bool) -> Workload:
    """A small transformer that predicts the next character of a text."""
    length, stride = (16, 64) if smoke else (32, 4)
    characters, tokens = np.unique(list(text()), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride]
    windows = windows.astype(np.int32)
    return Workload(
        name="transformer",
        title="character-level transformer",
        metric="cross-entropy per character",
        model=Transformer(len(characters), **({"width": 16} if smoke else {})),
        loss="softmax_cross_entropy",
        data={"x": windows[:, :-1], "y": windows[:, 1:]},
        batch_size=32 if smoke else 64,
        thresholds=(3.9, 3.7) if smoke else (2.5, 2.0, 1.5, 1.0),
    )


WORKLOADS = {
    f.__name__: f
    for f in (curves, mnist_autoencoder, mnist_mlp, mnist_cnn, transformer)
}


def dense(width: int, batch_size: int) -> Workload:
    """One square dense layer with squared error, to measure costs by width."""
    rng = np.random.default_rng(0)
    shape = (batch_size, width)
    return Workload(
        name=f"dense-{width}",
        title=f"one dense layer of width {width}",
        metric="squared error",
        model=nn.Dense(width),
        loss="squared_error",
        data={key: rng.standard_normal(shape, np.float32) for key in ("x", "y")},
        batch_size=batch_size,
    )


def get(name: str, smoke: bool = False) -> Workload:
    """Returns a workload: a key of `WORKLOADS`, or ``dense-1024`` for any width.

    With ``smoke`` it is small enough to train within seconds.
    """
    if name.startswith("dense-"):
        return dense(int(name.removeprefix("dense-")), 64 if smoke else 256)
    return WORKLOADS[name](smoke)
