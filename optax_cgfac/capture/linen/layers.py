"""The Linen layers that can be tagged, and how each describes a call of itself."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

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


def _dense(module: nn.Dense, inputs: Array) -> Described:
    return describe_dense(inputs, bias=module.use_bias)


def _dense_general(module: nn.DenseGeneral, inputs: Array) -> Described:
    features = module.features
    return describe_dense_general(
        inputs,
        axis=module.axis,
        batch_axes=module.batch_dims,
        num_features=1 if isinstance(features, int) else len(features),
        bias=module.use_bias,
    )


def _einsum(
    module: nn.Einsum, inputs: Array, einsum_str: str | None = None
) -> Described:
    return describe_einsum(
        inputs,
        equation=einsum_str or module.einsum_str or "",
        kernel_ndim=len(module.shape),
        bias=module.use_bias,
    )


def _conv(module: nn.Conv | nn.ConvLocal, inputs: Array) -> Described:
    if isinstance(module, nn.ConvLocal):
        return "it has a kernel for every position"
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
        bias=module.use_bias,
    )


def _conv_transpose(module: nn.ConvTranspose, inputs: Array) -> Described:
    if module.mask is not None:
        return "its kernel is masked: mask the gradient instead"
    return describe_conv_transpose(
        inputs,
        kernel_size=module.kernel_size,
        strides=module.strides,
        padding=module.padding,
        kernel_dilation=module.kernel_dilation,
        transpose_kernel=module.transpose_kernel,
        bias=module.use_bias,
    )


def _embed(module: nn.Embed, inputs: Array) -> Described:
    del module
    return describe_embed(inputs)


def _attend(module: nn.Embed, query: Array) -> Described:
    del module
    return describe_attend(query)


def _norm(module: Any, x: Array, *args: Any, **kwargs: Any) -> Described:
    """The normalized input: what the layer returns without its parameters."""
    axis = getattr(module, "axis", getattr(module, "feature_axes", -1))
    if axis not in (-1, x.ndim - 1, (-1,), (x.ndim - 1,)):
        return "its features are not on the last axis"
    # RMSNorm has no bias, and no option for one.
    use_bias = getattr(module, "use_bias", False)
    off = {"use_scale": False} | ({"use_bias": False} if use_bias else {})
    bare = module.clone(parent=None, name=None, **off)
    state = {
        name: module.variables[name]
        for name in module.variables
        if name not in ("params", "cgfac_inputs", "cgfac_probes")
    }
    normalized, _ = bare.apply(state, x, *args, mutable=list(state), **kwargs)
    return describe_elementwise(
        normalized,
        kind="norm",
        scale="scale" if module.use_scale else None,
        bias="bias" if use_bias else None,
    )


def _prelu(module: nn.PReLU, inputs: Array) -> Described:
    del module
    negative = jnp.where(inputs >= 0, 0, inputs)
    return describe_elementwise(
        negative, kind="prelu", scale="negative_slope", bias=None, param_ndim=0
    )


# The function that runs, not the class: a subclass that overrides __call__ is a
# layer of its own, and its super().__call__() is intercepted as this one.
LAYERS: dict[Callable[..., Any], Describe] = {
    inspect.unwrap(function): describe
    for function, describe in (
        (nn.Dense.__call__, _dense),
        (nn.DenseGeneral.__call__, _dense_general),
        (nn.Einsum.__call__, _einsum),
        (nn.Conv.__call__, _conv),
        (nn.ConvTranspose.__call__, _conv_transpose),
        (nn.Embed.__call__, _embed),
        (nn.Embed.attend, _attend),
        (nn.LayerNorm.__call__, _norm),
        (nn.RMSNorm.__call__, _norm),
        (nn.GroupNorm.__call__, _norm),
        (nn.BatchNorm.__call__, _norm),
        (nn.InstanceNorm.__call__, _norm),
        (nn.PReLU.__call__, _prelu),
    )
}
