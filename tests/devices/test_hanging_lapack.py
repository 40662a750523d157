"""The warning about OpenBLAS, where it is due."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from optax_cgfac import fisher_estimator


@pytest.mark.parametrize("threads", [None, "2", "1"])
def test_several_devices_are_warned_of_threads(monkeypatch, threads):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    if threads is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    model, x = nn.Dense(2), jnp.ones((8, 3))
    params = model.init(jax.random.key(0), x)
    estimator = fisher_estimator(model.apply, "squared_error", examples=8)
    warned = pytest.warns(RuntimeWarning, match="OPENBLAS_NUM_THREADS=1")
    # Any other warning is an error.
    with contextlib.nullcontext() if threads == "1" else warned:
        estimator.init(params, x)
