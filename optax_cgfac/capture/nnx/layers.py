"""The NNX layers that capture covers."""

import functools
from typing import Any

from flax import nnx

from optax_cgfac.capture import describe
from optax_cgfac.utils.types import Array


class CaptureVariable(nnx.Variable):
    """What a layer captures while it is traced; for `nnx.StateAxes` only.

    Example:
      >>> from flax import nnx
      >>> import optax_cgfac
      >>> axes = nnx.StateAxes({optax_cgfac.CaptureVariable: 0, ...: None})
      >>> shared = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0))
    """


def _param(module: Any, name: str) -> str | None:
    return None if getattr(module, name, None) is None else name


def _normalize(module: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
    # A copy, so that the running statistics are not updated once more.
    bare = nnx.clone(module)
    for name in [n for n, v in vars(bare).items() if isinstance(v, CaptureVariable)]:
        delattr(bare, name)
    bare.scale = bare.bias = nnx.data(None)
    return bare(x, *args, **kwargs)


_READER = describe.Reader(
    param=_param,
    batch_axes=lambda module: tuple(module.batch_axis),
    num_features=lambda module: len(module.out_features),
    kernel_ndim=lambda module: len(module.kernel_shape),
    normalize=_normalize,
)


def _methods(**describers: describe.Describe) -> dict[str, describe.Describe]:
    return {
        name: functools.partial(describer, _READER)
        for name, describer in describers.items()
    }


LAYERS: dict[type[nnx.Module], dict[str, describe.Describe]] = {
    nnx.Linear: _methods(__call__=describe.dense),
    nnx.LinearGeneral: _methods(__call__=describe.dense_general),
    nnx.Einsum: _methods(__call__=describe.einsum),
    nnx.Conv: _methods(__call__=describe.conv),
    nnx.ConvTranspose: _methods(__call__=describe.conv_transpose),
    nnx.Embed: _methods(__call__=describe.embed, attend=describe.attend),
    nnx.LayerNorm: _methods(__call__=describe.norm),
    nnx.RMSNorm: _methods(__call__=describe.norm),
    nnx.GroupNorm: _methods(__call__=describe.norm),
    nnx.BatchNorm: _methods(__call__=describe.norm),
    nnx.InstanceNorm: _methods(__call__=describe.norm),
    nnx.PReLU: _methods(__call__=describe.prelu),
}
"""The describers of every known class's methods."""

REPARAMETRIZED = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that call a layer with other weights than its parameters."""
