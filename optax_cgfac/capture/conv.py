"""The input patches that a convolution multiplies with its kernel.

A table for every spatial dimension says which input position the kernel's tap ``k``
reads at the output position ``p``, if any (padding and dilated inputs have zeros).
Strides, dilation, padding of every mode and transposed convolutions differ only in
their tables. Patches are gathered at the requested output positions.

Grosse & Martens (2016), "A Kronecker-factored approximate Fisher matrix for
convolution layers", section 3, for patches as rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.utils.types import Array


class SpatialDim(NamedTuple):
    """One spatial dimension of a convolution; all static.

    Attributes:
      size: Length of the input.
      taps: Length of the kernel.
      stride: Step between output positions.
      padding: Zeros before and after the dilated input; negative ones crop it.
      input_dilation: Distance of neighbouring inputs.
      kernel_dilation: Distance of neighbouring taps.
      wrap: Positions that are first added before and after the input.
      mode: How, a mode of `numpy.pad`: ``"wrap"`` or ``"reflect"``.
      flip: Whether the kernel is read from its last tap.
    """

    size: int
    taps: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    input_dilation: int = 1
    kernel_dilation: int = 1
    wrap: tuple[int, int] = (0, 0)
    mode: str = "wrap"
    flip: bool = False

    def table(self) -> np.ndarray:
        """Returns input positions by output position and tap, -1 for a zero.

        Example:
          >>> SpatialDim(size=3, taps=2, padding=(1, 0)).table().tolist()
          [[-1, 0], [0, 1], [1, 2]]
        """
        inputs = np.arange(self.size)
        if any(self.wrap):
            inputs = np.pad(inputs, self.wrap, mode=self.mode)  # pyright: ignore
        spread = np.full((max(len(inputs) - 1, 0)) * self.input_dilation + 1, -1)
        spread[:: self.input_dilation] = inputs
        before, after = self.padding
        spread = spread[max(-before, 0) : len(spread) - max(-after, 0)]
        spread = np.pad(spread, (max(before, 0), max(after, 0)), constant_values=-1)
        reach = (self.taps - 1) * self.kernel_dilation + 1
        starts = np.arange(0, len(spread) - reach + 1, self.stride)
        table = spread[starts[:, None] + np.arange(self.taps) * self.kernel_dilation]
        return table[:, ::-1] if self.flip else table


def output_sizes(spatial_dims: Sequence[SpatialDim]) -> tuple[int, ...]:
    """Returns the spatial shape of a convolution's output."""
    return tuple(len(dim.table()) for dim in spatial_dims)


def patches_at(x: Array, spatial_dims: Sequence[SpatialDim], positions: Array) -> Array:
    """Returns patches ``(N, P, taps, channels)`` of ``x (N, E, *spatial, channels)``.

    Args:
      x: The inputs.
      spatial_dims: The spatial dimensions.
      positions: Shape ``(N, P)``, numbers of output positions, ``E`` slowest and the
        last spatial dimension fastest.
    """
    sizes = (x.shape[1], *output_sizes(spatial_dims))
    extra, *places = jnp.unravel_index(positions, sizes)
    num_dims = len(spatial_dims)
    index: list[Array] = []
    valid = jnp.ones((1,) * (2 + num_dims), bool)
    for axis, (dim, place) in enumerate(zip(spatial_dims, places, strict=True)):
        taps = jnp.asarray(dim.table())[place]  # (N, P, taps of this dimension)
        shape = [1] * num_dims
        shape[axis] = dim.taps
        taps = taps.reshape(*positions.shape, *shape)
        valid = valid & (taps >= 0)
        index.append(jnp.maximum(taps, 0))
    ones = (1,) * num_dims
    examples = jnp.arange(x.shape[0]).reshape(-1, 1, *ones)
    patches = x[(examples, extra.reshape(*positions.shape, *ones), *index)]
    patches = jnp.where(valid[..., None], patches, 0)
    return patches.reshape(*positions.shape, -1, x.shape[-1])


def mean_patches(x: Array, spatial_dims: Sequence[SpatialDim]) -> Array:
    """Returns the mean patch ``(N, taps, channels)`` without forming any patch."""
    mean = jnp.mean(x, 1)
    for axis, dim in enumerate(spatial_dims):
        table = dim.table()
        # How often each tap reads each input, over the number of output positions.
        counts = (table[:, :, None] == np.arange(dim.size)).mean(0)
        counts = jnp.asarray(counts, x.dtype)
        mean = jnp.moveaxis(mean, 1 + axis, -1)
        mean = jnp.einsum(
            "...i,ki->...k", mean, counts, precision=jax.lax.Precision.HIGHEST
        )
        mean = jnp.moveaxis(mean, -1, 1 + axis)
    return mean.reshape(x.shape[0], -1, x.shape[-1])
