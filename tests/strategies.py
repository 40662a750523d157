"""What the property tests draw.

Compiling is what takes time: shapes come from a few, so that the examples of a property
share their programs, and data, scales, ranks and dampings are free.
"""

from typing import NamedTuple

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

# The same examples in every run, and none kept on disk.
properties = settings(
    deadline=None, derandomize=True, database=None, max_examples=30, print_blob=False
)

# (rows, inputs, outputs): one row, fewer rows than features, more, and equally many; a
# side of one feature.
SHAPES = ((1, 3, 2), (3, 5, 4), (12, 3, 2), (4, 4, 4), (5, 1, 4), (4, 6, 1))


class Layer(NamedTuple):
    """A layer's system, as arrays of NumPy in its dtype.

    Attributes:
      a: Inputs, ``(R, n_in)``, of a drawn rank.
      g: Cotangents, ``(R, n_out)``.
      b: A right-hand side.
      x0: A warm start.
      damping: Between a hundredth and ten times the mean curvature.
      seed: For further random numbers.
    """

    a: np.ndarray
    g: np.ndarray
    b: np.ndarray
    x0: np.ndarray
    damping: float
    seed: int

    @property
    def dtype(self):
        return self.a.dtype.name

    def rng(self):
        return np.random.default_rng(self.seed)


def factors(low, high):
    """Positive numbers, evenly in their logarithm."""
    return st.floats(np.log10(low), np.log10(high)).map(lambda x: float(10**x))


def _normalized(x):
    return x / np.sqrt(np.mean(x**2))


@st.composite
def layers(draw, dtypes=("float64", "float32")):
    num_rows, n_in, n_out = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**32 - 1))
    rank = draw(st.integers(1, num_rows))
    rng = np.random.default_rng(seed)
    # The same examples again and again are rows of low rank.
    rows = np.arange(num_rows) % rank
    a = _normalized(rng.normal(size=(num_rows, n_in))[rows]) * draw(factors(0.3, 3))
    g = _normalized(rng.normal(size=(num_rows, n_out))[rows]) * draw(factors(0.3, 3))
    b = rng.normal(size=(n_in, n_out)) * draw(factors(1e-3, 1e3))
    mean_curvature = np.mean(a**2) * np.mean(g**2)
    x0 = b / mean_curvature * draw(st.floats(-1, 1))
    damping = float(mean_curvature * draw(factors(1e-2, 10)))
    arrays = (x.astype(dtype) for x in (a, g, b, x0))
    return Layer(*arrays, damping, seed)


def precision(dtype):
    """A context in which JAX keeps arrays of this dtype."""
    return jax.enable_x64(dtype == "float64")
