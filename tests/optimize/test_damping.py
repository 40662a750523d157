import jax.numpy as jnp
import numpy as np
import pytest

from optax_cgfac.optimize.adaptive.damping import (
    levenberg_marquardt,
    reduction_ratio,
)
from optax_cgfac.optimize.scheduled import kl_clip_scale

BOUNDS = {"decay": 0.5, "minimum": 1e-3, "maximum": 1e3}


def adapted(ratio, damping=1.0):
    return levenberg_marquardt(jnp.asarray(damping), jnp.asarray(ratio), **BOUNDS)


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (1.0, 0.5),
        (0.76, 0.5),
        (0.75, 1.0),
        (0.5, 1.0),
        (0.25, 1.0),
        (0.24, 2.0),
        (-1.0, 2.0),
        (-np.inf, 2.0),
    ],
)
def test_damping_falls_after_good_and_rises_after_bad_predictions(ratio, factor, dtype):
    damping = levenberg_marquardt(
        jnp.asarray(0.8, dtype), jnp.asarray(ratio, dtype), **BOUNDS
    )
    assert damping.dtype == dtype
    np.testing.assert_allclose(damping, 0.8 * factor, rtol=1e-6)


def test_damping_stays_within_its_bounds():
    np.testing.assert_allclose(adapted(1.0, damping=1.5e-3), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(adapted(0.0, damping=900.0), 1e3, rtol=1e-6)


@pytest.mark.parametrize(
    ("actual", "predicted", "ratio"),
    [
        (-1.0, -2.0, 0.5),
        (-3.0, -2.0, 1.5),
        (1.0, -2.0, -0.5),
        (0.0, -2.0, 0.0),
        (0.0, 0.0, 1.0),
        (np.nan, -2.0, -np.inf),
        (np.inf, -2.0, -np.inf),
        (np.nan, np.nan, -np.inf),
    ],
)
def test_the_reduction_ratio(actual, predicted, ratio, dtype):
    result = reduction_ratio(jnp.asarray(actual, dtype), jnp.asarray(predicted, dtype))
    assert result.dtype == dtype
    assert result == ratio


@pytest.mark.parametrize(
    ("actual", "predicted"), [(1.0, np.nan), (1.0, 0.5), (0.0, np.nan)]
)
def test_damping_does_not_fall_without_a_good_prediction(actual, predicted):
    ratio = reduction_ratio(jnp.asarray(actual), jnp.asarray(predicted))
    assert adapted(ratio) >= 1


@pytest.mark.parametrize(
    ("inner_product", "learning_rate", "clip", "scale"),
    [
        (4.0, 1.0, 1.0, 0.5),
        (4.0, 0.5, 1.0, 1.0),
        (4.0, 0.1, 1.0, 1.0),
        (100.0, 2.0, 4.0, 0.1),
        (0.0, 1.0, 1.0, 1.0),
        (-1.0, 1.0, 1.0, 1.0),
    ],
)
def test_the_clipped_step_has_at_most_the_given_size(
    inner_product, learning_rate, clip, scale, dtype
):
    product, rate = (jnp.asarray(x, dtype) for x in (inner_product, learning_rate))
    result = kl_clip_scale(product, rate, clip)
    np.testing.assert_allclose(result, scale, rtol=1e-6)
    assert result.dtype == dtype
    assert (rate * result) ** 2 * product <= clip * (1 + 1e-6)
