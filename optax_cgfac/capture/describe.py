"""How each kind of layer describes a call of itself; shared by Linen and NNX.

A describer takes the arguments of a layer's method and returns the facts of the call
and the captured input in the form that `LayerCall` defines, or the reason why this use
of the layer has no rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import LayerCall
from optax_cgfac.capture.conv import SpatialDim
from optax_cgfac.utils.types import Array

Described = tuple[LayerCall, Array] | str
Describe = Callable[..., Described]


class Reader(NamedTuple):
    """Reads what Linen and NNX name differently."""

    param: Callable[[Any, str], str | None]  # a parameter's name if the module has it
    batch_axes: Callable[[Any], Sequence[int]]  # of a DenseGeneral
    num_features: Callable[[Any], int]  # how many axes a DenseGeneral puts out
    kernel_ndim: Callable[[Any], int]  # of an Einsum
    normalize: Callable[..., Array]  # calls a norm without its scale and bias


def dense(reader: Reader, module: Any, inputs: Array, *_: Any, **__: Any) -> Described:
    """A kernel ``(n_in, n_out)`` applied to the last axis."""
    return dense_call(inputs, reader.param(module, "bias"))


def dense_general(
    reader: Reader, module: Any, inputs: Array, *_: Any, **__: Any
) -> Described:
    """A kernel ``(*batch, *contracted, *features)`` applied to several axes."""
    x = jnp.asarray(inputs)
    # Flax sorts the axes, so the kernel's are in this order too.
    axes = _sorted_axes(module.axis, x.ndim)
    batch = _sorted_axes(reader.batch_axes(module), x.ndim)
    positions = [i for i in range(x.ndim) if i not in axes and i not in batch]
    a = _flatten_last(x.transpose(*batch, *positions, *axes), len(axes))
    num_features = reader.num_features(module)
    rank = len(batch) + len(axes) + num_features
    call = LayerCall(
        "dense_general",
        "dense",
        a.ndim,
        a.ndim - 1 + num_features,
        bias=reader.param(module, "bias"),
        kernel_axes=tuple(range(rank)),
        batch_ndim=len(batch),
        feature_ndim=num_features,
        param_ndim=rank,
    )
    return call, a


def einsum(
    reader: Reader,
    module: Any,
    inputs: Array,
    einsum_str: str | None = None,
    *_: Any,
    **__: Any,
) -> Described:
    """``einsum(equation, x, kernel)``, each letter summed over or kept."""
    x, equation = jnp.asarray(inputs), einsum_str or module.einsum_str or ""
    bias = reader.param(module, "bias")
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    left, result = _spell_out(left, result, x.ndim)
    if "." in right or len(set(left)) < len(left) or len(set(right)) < len(right):
        return f"einsum {equation!r} repeats a letter or broadcasts its kernel"
    contracted = [c for c in right if c in left and c not in result]
    batch = [c for c in result if c in right and c in left]
    features = [c for c in result if c in right and c not in left]
    positions = [c for c in result if c not in right]
    lost = [c for c in left if c not in right and c not in result]
    if lost or len(contracted) + len(batch) + len(features) != len(right):
        return f"einsum {equation!r} sums over an axis of one operand alone"
    if bias and [c for c in result if c in right] != [*batch, *features]:
        return f"einsum {equation!r} puts features before the kernel's batch axes"
    order = [left.index(c) for c in (*batch, *positions, *contracted)]
    a = _flatten_last(x.transpose(*order), len(contracted))
    call = LayerCall(
        "einsum",
        "dense",
        a.ndim,
        len(result),
        bias=bias,
        kernel_axes=tuple(right.index(c) for c in (*batch, *contracted, *features)),
        batch_ndim=len(batch),
        feature_ndim=len(features),
        output_axes=tuple(result.index(c) for c in (*batch, *positions, *features)),
        param_ndim=reader.kernel_ndim(module),
    )
    return call, a


def conv(reader: Reader, module: Any, inputs: Array, *_: Any, **__: Any) -> Described:
    """A convolution with a kernel ``(*taps, channels / groups, features)``."""
    if not getattr(module, "shared_weights", True):
        return "it has a kernel for every position"
    if module.mask is not None:
        return _MASKED
    sizes, taps, strides, dilation, reach = _spatial(module, inputs)
    num_dims, padding = len(taps), module.padding
    wrap, mode = [(0, 0)] * num_dims, "wrap"
    if padding in ("CIRCULAR", "REFLECT"):
        wrap = [((r - 1) // 2, r // 2) for r in reach]
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        pads = [(0, 0)] * num_dims
    elif padding == "CAUSAL":
        pads = [(r - 1, 0) for r in reach]
    elif isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(sizes, reach, strides, padding)
    else:
        pads = _pairs(padding, num_dims)
    spread = _per_dim(module.input_dilation, num_dims)
    by_dim = zip(
        *(sizes, taps, strides, map(tuple, pads), spread, dilation, wrap), strict=True
    )
    dims = tuple(SpatialDim(*own, mode=mode) for own in by_dim)
    bias, groups = reader.param(module, "bias"), module.feature_group_count
    return _conv_call("conv", inputs, dims, bias=bias, groups=groups)


def conv_transpose(
    reader: Reader, module: Any, inputs: Array, *_: Any, **__: Any
) -> Described:
    """A transposed convolution: one on the input spread out by the strides."""
    if module.mask is not None:
        return _MASKED
    if module.padding == "CIRCULAR":
        return "a ConvTranspose with circular padding adds up periods of its output"
    sizes, taps, strides, dilation, reach = _spatial(module, inputs)
    padding, flip = module.padding, module.transpose_kernel
    if isinstance(padding, str):
        pairs = zip(reach, strides, strict=True)
        pads = [_transposed_padding(r, s, padding) for r, s in pairs]
    else:
        pads = _pairs(padding, len(taps))
    dims = tuple(
        SpatialDim(size, tap, 1, pad, stride, own, flip=flip)
        for size, tap, pad, stride, own in zip(
            sizes, taps, pads, strides, dilation, strict=True
        )
    )
    bias = reader.param(module, "bias")
    return _conv_call("conv_transpose", inputs, dims, bias=bias, swap=flip)


def _spatial(module: Any, inputs: Array) -> tuple[tuple[int, ...], ...]:
    """Returns sizes, taps, strides, dilation and reach of the spatial dimensions."""
    kernel_size, ndim = module.kernel_size, jnp.ndim(inputs)
    taps = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    sizes = jnp.shape(inputs)[ndim - 1 - len(taps) : -1]
    strides = _per_dim(module.strides, len(taps))
    dilation = _per_dim(module.kernel_dilation, len(taps))
    reach = tuple((k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True))
    return sizes, taps, strides, dilation, reach


def _conv_call(
    kind: str,
    inputs: Array,
    dims: tuple[SpatialDim, ...],
    *,
    bias: str | None,
    groups: int = 1,
    swap: bool = False,
) -> tuple[LayerCall, Array]:
    x, last = jnp.asarray(inputs), len(dims)
    channels = (last + 1, last) if swap else (last, last + 1)
    call = LayerCall(
        kind,
        "patches",
        x.ndim,
        x.ndim,
        bias=bias,
        kernel_axes=(*range(last), *channels),
        groups=groups,
        spatial_dims=dims,
        param_ndim=last + 2,
    )
    return call, x


_MASKED = "its kernel is masked: mask the gradient instead"


def embed(reader: Reader, module: Any, inputs: Array, *_: Any, **__: Any) -> Described:
    """A look-up in a table ``(n_in, n_out)``."""
    x = jnp.asarray(inputs)
    return LayerCall("embed", "index", x.ndim, x.ndim + 1, "embedding"), x


def attend(reader: Reader, module: Any, query: Array, *_: Any, **__: Any) -> Described:
    """The product with a transposed embedding table."""
    x = jnp.asarray(query)
    return LayerCall("attend", "swapped", x.ndim, x.ndim, "embedding"), x


def norm(reader: Reader, module: Any, x: Array, *args: Any, **kwargs: Any) -> Described:
    """The normalized input: what the layer returns without its parameters."""
    axis = getattr(module, "axis", getattr(module, "feature_axes", -1))
    if axis not in (-1, x.ndim - 1, (-1,), (x.ndim - 1,)):
        return "its features are not on the last axis"
    normalized = reader.normalize(module, x, *args, **kwargs)
    scale, bias = reader.param(module, "scale"), reader.param(module, "bias")
    return elementwise_call(normalized, "norm", scale, bias)


def prelu(reader: Reader, module: Any, inputs: Array) -> Described:
    """The slope multiplies the negative inputs."""
    negative = jnp.where(inputs >= 0, 0, inputs)
    return elementwise_call(negative, "prelu", "negative_slope", None, param_ndim=0)


def dense_call(
    x: Array, bias: str | None, *, kind: str = "dense", kernel: str = "kernel"
) -> tuple[LayerCall, Array]:
    """Describes ``x @ kernel + bias`` on the last axis."""
    x = jnp.asarray(x)
    return LayerCall(kind, "dense", x.ndim, x.ndim, kernel, bias=bias), x


def elementwise_call(
    x: Array, kind: str, scale: str | None, bias: str | None, param_ndim: int = 1
) -> tuple[LayerCall, Array]:
    """Describes ``scale * x + bias`` on the last axis."""
    x = jnp.asarray(x)
    names = None, scale, bias
    call = LayerCall(
        kind, "elementwise", x.ndim, x.ndim, *names, (), param_ndim=param_ndim
    )
    return call, x


def mixes_examples(
    module: Any, x: Array, use_running_average: bool | None = None, **_: Any
) -> bool:
    """Whether a call of BatchNorm compares the examples: in training mode."""
    if use_running_average is None:
        use_running_average = module.use_running_average
    return not use_running_average


def _transposed_padding(reach: int, stride: int, padding: str) -> tuple[int, int]:
    # As the documentation of `jax.lax.conv_transpose` defines it: "SAME" gives outputs
    # of length `stride` times the input's, "VALID" all outputs that an input reaches.
    # An odd zero goes in front.
    if padding == "SAME":
        total = reach + stride - 2
        before = reach - 1 if stride > reach - 1 else -(-total // 2)
    else:
        total = reach + stride - 2 + max(reach - stride, 0)
        before = reach - 1
    return before, total - before


def _sorted_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(axis % ndim for axis in axes))


def _flatten_last(x: Array, count: int) -> Array:
    return x.reshape(*x.shape[: x.ndim - count], -1)


def _per_dim(value: Any, num_dims: int) -> tuple[int, ...]:
    value = 1 if value is None else value  # Flax takes None for 1
    return (value,) * num_dims if isinstance(value, int) else tuple(value)


def _pairs(padding: Any, num_dims: int) -> list[tuple[int, int]]:
    """Returns explicit padding as ``(before, after)`` for each dimension."""
    if isinstance(padding, int):
        return [(padding, padding)] * num_dims
    return [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding]


def _spell_out(left: str, result: str, ndim: int) -> tuple[str, str]:
    """Replaces an ellipsis by letters that the equation does not use."""
    if "..." not in left:
        return left, result
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in left + result]
    letters = "".join(free[: ndim - (len(left) - 3)])
    return left.replace("...", letters), result.replace("...", letters)
