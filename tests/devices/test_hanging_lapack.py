"""The warning about OpenBLAS, where it is due."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from optax_cgfac import fisher_estimator

if jax.device_count() < 8:
    pytest.skip("needs eight devices", allow_module_level=True)


@pytest.mark.parametrize("threads", [None, "2", "1"])
def test_several_devices_are_warned_of_threads(monkeypatch, threads):
    if threads is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    else:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    model, x = nn.Dense(2), jnp.ones((8, 3))
    params = model.init(jax.random.key(0), x)
    estimator = fisher_estimator(model.apply, "squared_error", examples=8)
    if threads == "1":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimator.init(params, x)
    else:
        with pytest.warns(RuntimeWarning, match="OPENBLAS_NUM_THREADS=1"):
            estimator.init(params, x)
