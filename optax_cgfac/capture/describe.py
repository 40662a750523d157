"""Layer calls from the options of a layer; shared by the framework adapters.

Each function takes plain numbers and arrays, and returns the facts of the call and the
captured input in the form that `LayerCall` describes, or the reason why the layer, used
like that, has no rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import LayerCall
from optax_cgfac.capture.conv import SpatialDim
from optax_cgfac.utils.types import Array

Described = tuple[LayerCall, Array] | str


def describe_dense(x: Array, *, bias: bool) -> Described:
    """A kernel ``(n_in, n_out)`` applied to the last axis."""
    x = jnp.asarray(x)
    call = LayerCall("dense", "dense", x.ndim, x.ndim, bias=_name(bias))
    return call, x


def describe_dense_general(
    x: Array,
    *,
    axis: int | Sequence[int],
    batch_axes: Sequence[int],
    num_features: int,
    bias: bool,
) -> Described:
    """A kernel ``(*batch, *contracted, *features)`` applied to several axes."""
    x = jnp.asarray(x)
    # Flax sorts the axes, so the kernel's are in this order too.
    axes, batch = _sorted_axes(axis, x.ndim), _sorted_axes(batch_axes, x.ndim)
    positions = [i for i in range(x.ndim) if i not in axes and i not in batch]
    a = _flatten_last(x.transpose(*batch, *positions, *axes), len(axes))
    rank = len(batch) + len(axes) + num_features
    call = LayerCall(
        "dense_general",
        "dense",
        a.ndim,
        a.ndim - 1 + num_features,
        bias=_name(bias),
        kernel_axes=tuple(range(rank)),
        batch_ndim=len(batch),
        feature_ndim=num_features,
        param_ndim=rank,
    )
    return call, a


def describe_einsum(
    x: Array, *, equation: str, kernel_ndim: int, bias: bool
) -> Described:
    """``einsum(equation, x, kernel)``, each letter summed over or kept."""
    x = jnp.asarray(x)
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
        bias=_name(bias),
        kernel_axes=tuple(right.index(c) for c in (*batch, *contracted, *features)),
        batch_ndim=len(batch),
        feature_ndim=len(features),
        output_axes=tuple(result.index(c) for c in (*batch, *positions, *features)),
        param_ndim=kernel_ndim,
    )
    return call, a


def describe_conv(
    x: Array,
    *,
    kernel_size: int | Sequence[int],
    strides: Any,
    padding: Any,
    input_dilation: Any,
    kernel_dilation: Any,
    groups: int,
    bias: bool,
) -> Described:
    """A convolution with a kernel ``(*taps, channels / groups, features)``."""
    x = jnp.asarray(x)
    taps = _per_dim(kernel_size)
    num_dims = len(taps)
    sizes = x.shape[x.ndim - 1 - num_dims : -1]
    strides, input_dilation, kernel_dilation = (
        _per_dim(value, num_dims)
        for value in (strides, input_dilation, kernel_dilation)
    )
    reach = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation, strict=True)]
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
    spatial_dims = tuple(
        SpatialDim(
            sizes[i],
            taps[i],
            strides[i],
            (pads[i][0], pads[i][1]),
            input_dilation[i],
            kernel_dilation[i],
            wrap[i],
            mode,
        )
        for i in range(num_dims)
    )
    return _conv_call("conv", x, spatial_dims, groups=groups, bias=bias), x


def describe_conv_transpose(
    x: Array,
    *,
    kernel_size: int | Sequence[int],
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    transpose_kernel: bool,
    bias: bool,
) -> Described:
    """A transposed convolution: one on the input spread out by the strides."""
    x = jnp.asarray(x)
    taps = _per_dim(kernel_size)
    num_dims = len(taps)
    if padding == "CIRCULAR":
        return "a ConvTranspose with circular padding adds up periods of its output"
    sizes = x.shape[x.ndim - 1 - num_dims : -1]
    strides = _per_dim(strides, num_dims)
    kernel_dilation = _per_dim(kernel_dilation, num_dims)
    reach = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation, strict=True)]
    if isinstance(padding, str):
        pads = [
            _transposed_padding(r, s, padding)
            for r, s in zip(reach, strides, strict=True)
        ]
    else:
        pads = _pairs(padding, num_dims)
    spatial_dims = tuple(
        SpatialDim(
            sizes[i],
            taps[i],
            1,
            (pads[i][0], pads[i][1]),
            strides[i],
            kernel_dilation[i],
            flip=transpose_kernel,
        )
        for i in range(num_dims)
    )
    swap = transpose_kernel
    return _conv_call("conv_transpose", x, spatial_dims, bias=bias, swap=swap), x


def describe_embed(x: Array) -> Described:
    """A look-up in a table ``(n_in, n_out)``."""
    x = jnp.asarray(x)
    return LayerCall("embed", "index", x.ndim, x.ndim + 1, "embedding"), x


def describe_attend(x: Array) -> Described:
    """The product with a transposed embedding table."""
    x = jnp.asarray(x)
    return LayerCall("attend", "swapped", x.ndim, x.ndim, "embedding"), x


def describe_elementwise(
    x: Array,
    *,
    kind: str,
    scale: str | None,
    bias: str | None,
    feature_ndim: int = 1,
    param_ndim: int | None = None,
) -> Described:
    """``scale * x + bias`` on the trailing ``feature_ndim`` axes."""
    x = jnp.asarray(x)
    call = LayerCall(
        kind,
        "elementwise",
        x.ndim,
        x.ndim,
        kernel=None,
        scale=scale,
        bias=bias,
        kernel_axes=(),
        feature_ndim=feature_ndim,
        param_ndim=feature_ndim if param_ndim is None else param_ndim,
    )
    return call, x


def _conv_call(
    kind: str,
    x: Array,
    spatial_dims: tuple[SpatialDim, ...],
    *,
    groups: int = 1,
    bias: bool,
    swap: bool = False,
) -> LayerCall:
    last = len(spatial_dims)
    channels = (last + 1, last) if swap else (last, last + 1)
    return LayerCall(
        kind,
        "patches",
        x.ndim,
        x.ndim,
        bias=_name(bias),
        kernel_axes=(*range(last), *channels),
        groups=groups,
        spatial_dims=spatial_dims,
        param_ndim=last + 2,
    )


def _transposed_padding(reach: int, stride: int, padding: str) -> tuple[int, int]:
    """The padding of `jax.lax.conv_transpose`, which its documentation defines.

    ``"SAME"`` gives outputs of length ``stride`` times the input's, ``"VALID"`` all
    outputs that an input reaches; an odd zero is put in front.

    Returns:
      Zeros before and after the spread input.
    """
    if padding == "SAME":
        total = reach + stride - 2
        before = reach - 1 if stride > reach - 1 else -(-total // 2)
    else:
        total = reach + stride - 2 + max(reach - stride, 0)
        before = reach - 1
    return before, total - before


def mixes_examples(
    module: Any, x: Array, use_running_average: bool | None = None, **options: Any
) -> bool:
    """Whether a call of BatchNorm compares the examples: in training mode."""
    del x, options
    given = use_running_average
    return not (module.use_running_average if given is None else given)


def _name(bias: bool) -> str | None:
    return "bias" if bias else None


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _sorted_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted(axis % ndim for axis in _as_tuple(axes)))


def _flatten_last(x: Array, count: int) -> Array:
    return x.reshape(*x.shape[: x.ndim - count], -1)


def _per_dim(value: Any, num_dims: int | None = None) -> tuple[int, ...]:
    """Returns a number for each spatial dimension; Flax takes None for 1."""
    if num_dims is None:
        return _as_tuple(value)
    if value is None:
        value = 1
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
