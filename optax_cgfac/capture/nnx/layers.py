"""The NNX layers that can be tagged, and how each describes a call of itself."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from optax_cgfac.capture.describe import (
    Described,
    describe_attend,
    describe_conv,
    describe_conv_transpose,
    describe_dense,
    describe_dense_general,
    describe_einsum,
    describe_elementwise,
    describe_embed,
)
from optax_cgfac.utils.types import Array

Describe = Callable[..., Described]


class CaptureVariable(nnx.Variable):
    """What a layer captures while it is traced; for `nnx.StateAxes` only.

    Example:
      >>> from flax import nnx
      >>> import optax_cgfac
      >>> axes = nnx.StateAxes({optax_cgfac.CaptureVariable: 0, ...: None})
      >>> shared = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0))
    """


def _linear(module: nnx.Linear, inputs: Array, **options: Any) -> Described:
    del options
    return describe_dense(inputs, bias=module.bias is not None)


def _linear_general(
    module: nnx.LinearGeneral, inputs: Array, **options: Any
) -> Described:
    del options
    return describe_dense_general(
        inputs,
        axis=module.axis,
        batch_axes=tuple(module.batch_axis),
        num_features=len(module.out_features),
        bias=module.bias is not None,
    )


def _einsum(
    module: nnx.Einsum, inputs: Array, einsum_str: str | None = None, **options: Any
) -> Described:
    del options
    return describe_einsum(
        inputs,
        equation=einsum_str or module.einsum_str or "",
        kernel_ndim=len(module.kernel_shape),
        bias=module.bias is not None,
    )


def _conv(module: nnx.Conv, inputs: Array, **options: Any) -> Described:
    del options
    if module.mask is not None:
        return "its kernel is masked: mask the gradient instead"
    return describe_conv(
        inputs,
        kernel_size=module.kernel_size,
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
        bias=module.bias is not None,
    )


def _conv_transpose(
    module: nnx.ConvTranspose, inputs: Array, **options: Any
) -> Described:
    del options
    if module.mask is not None:
        return "its kernel is masked: mask the gradient instead"
    return describe_conv_transpose(
        inputs,
        kernel_size=module.kernel_size,
        strides=module.strides,
        padding=module.padding,
        kernel_dilation=module.kernel_dilation,
        transpose_kernel=module.transpose_kernel,
        bias=module.bias is not None,
    )


def _embed(module: nnx.Embed, inputs: Array, **options: Any) -> Described:
    del module, options
    return describe_embed(inputs)


def _attend(module: nnx.Embed, query: Array, **options: Any) -> Described:
    del module, options
    return describe_attend(query)


def _norm(module: Any, x: Array, *args: Any, **kwargs: Any) -> Described:
    """The normalized input: what the layer returns without its parameters."""
    axis = getattr(module, "axis", getattr(module, "feature_axes", -1))
    if axis not in (-1, x.ndim - 1, (-1,), (x.ndim - 1,)):
        return "its features are not on the last axis"
    # A copy, so that the running statistics are not updated once more.
    bare = nnx.clone(module)
    for name in [n for n, v in vars(bare).items() if isinstance(v, CaptureVariable)]:
        delattr(bare, name)
    bare.scale = bare.bias = nnx.data(None)
    return describe_elementwise(
        bare(x, *args, **kwargs),
        kind="norm",
        scale=_name(module, "scale"),
        bias=_name(module, "bias"),
    )


def _prelu(module: nnx.PReLU, inputs: Array) -> Described:
    del module
    negative = jnp.where(inputs >= 0, 0, inputs)
    return describe_elementwise(
        negative, kind="prelu", scale="negative_slope", bias=None, param_ndim=0
    )


def _name(module: nnx.Module, name: str) -> str | None:
    return None if getattr(module, name, None) is None else name


LAYERS: dict[type[nnx.Module], dict[str, Describe]] = {
    nnx.Linear: {"__call__": _linear},
    nnx.LinearGeneral: {"__call__": _linear_general},
    nnx.Einsum: {"__call__": _einsum},
    nnx.Conv: {"__call__": _conv},
    nnx.ConvTranspose: {"__call__": _conv_transpose},
    nnx.Embed: {"__call__": _embed, "attend": _attend},
    nnx.LayerNorm: {"__call__": _norm},
    nnx.RMSNorm: {"__call__": _norm},
    nnx.GroupNorm: {"__call__": _norm},
    nnx.BatchNorm: {"__call__": _norm},
    nnx.InstanceNorm: {"__call__": _norm},
    nnx.PReLU: {"__call__": _prelu},
}
"""The methods of every known class, by the class that defines them."""


REPARAMETRIZED = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that call a layer with other weights than its parameters."""
