"""Patches against `jax.lax.conv_general_dilated_patches` and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import normal
from optax_cgfac import fisher_estimator
from optax_cgfac.capture.conv import SpatialDim, mean_patches, output_sizes, patches_at

WINDOWS = {
    "plain": (SpatialDim(5, 3), SpatialDim(4, 2)),
    "padded": (SpatialDim(5, 3, padding=(1, 1)), SpatialDim(4, 2, padding=(0, 2))),
    "strided": (SpatialDim(5, 3, 2, (1, 1)), SpatialDim(4, 2, 3, (1, 0))),
    "dilated": (
        SpatialDim(5, 2, 1, (1, 0), 2, 3),
        SpatialDim(4, 3, 2, (2, 1), 3, 2),
    ),
    "cropped": (SpatialDim(5, 2, padding=(-1, 1)), SpatialDim(4, 2, padding=(1, -2))),
}


def by_lax(x, spatial_dims):
    """Shape ``(N, positions, taps, channels)``."""
    patches = jax.lax.conv_general_dilated_patches(
        x,
        [w.taps for w in spatial_dims],
        [w.stride for w in spatial_dims],
        [w.padding for w in spatial_dims],
        lhs_dilation=[w.input_dilation for w in spatial_dims],
        rhs_dilation=[w.kernel_dilation for w in spatial_dims],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    patches = patches.reshape(*patches.shape[:3], x.shape[-1], -1).swapaxes(-1, -2)
    return patches.reshape(len(x), -1, *patches.shape[3:])


@pytest.mark.parametrize("name", WINDOWS)
def test_patches_are_those_of_lax(name):
    spatial_dims, x = WINDOWS[name], normal(0, 2, 5, 4, 3)
    expected = by_lax(x, spatial_dims)
    count = int(np.prod(output_sizes(spatial_dims)))
    assert count == expected.shape[1]
    # Backwards for one example: positions are each example's own.
    positions = jnp.stack([jnp.arange(count), jnp.arange(count)[::-1]])
    patches = patches_at(x[:, None], spatial_dims, positions)
    expected_rows = jnp.stack([expected[0], expected[1, ::-1]])
    np.testing.assert_allclose(patches, expected_rows, rtol=1e-6)
    mean = mean_patches(x[:, None], spatial_dims)
    np.testing.assert_allclose(mean, expected.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["wrap", "reflect"])
def test_padding_that_repeats_the_input_by_a_loop(mode):
    dim = SpatialDim(4, 3, 2, wrap=(1, 2), mode=mode)
    x = np.arange(1, 9).reshape(1, 1, 4, 2)
    padded = np.pad(x[0, 0], ((1, 2), (0, 0)), mode=mode)
    expected = [padded[start : start + 3] for start in (0, 2, 4)]
    got = patches_at(jnp.asarray(x), [dim], jnp.arange(3)[None])
    np.testing.assert_array_equal(got[0], expected)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "eqns"):
                yield from shapes_in(value)


def test_no_array_of_all_patches_is_made_for_a_large_image():
    model, x = nn.Conv(4, (3, 3)), jnp.zeros((8, 64, 64, 4))
    params = model.init(jax.random.key(0), x)["params"]

    def apply(p, x):
        return model.apply({"params": p}, x).mean((1, 2))

    estimator = fisher_estimator(apply, "squared_error", examples=4)
    curvature = estimator.init(params, x)
    jaxpr = jax.make_jaxpr(estimator.update)(
        curvature, params, x, rng=jax.random.key(0)
    )
    sizes = [int(np.prod(shape)) for shape in shapes_in(jaxpr.jaxpr)]
    assert max(sizes) >= 4 * 64 * 64 * 4  # the convolution itself was looked at
    # The model's own arrays are the largest: patches of all positions are 9 times.
    assert max(sizes) <= 8 * 64 * 64 * 4
