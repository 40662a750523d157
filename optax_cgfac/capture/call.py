"""The record of a captured layer call, and what a captured run of a model returns."""

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.conv import SpatialDim, output_sizes
from optax_cgfac.utils.paths import Path
from optax_cgfac.utils.types import Array, PyTree

Form = Literal["dense", "patches", "index", "swapped", "elementwise"]
"""How the input ``x`` and output cotangent ``y`` of a call become rows ``a`` and ``g``.

``dense``: ``a = x``, ``g = y``. ``patches``: ``a`` are patches of ``x``. ``index``:
``x`` are indices, ``a`` one-hot. ``swapped``: the kernel is used transposed, ``a = y``
and ``g = x``. ``elementwise``: the output is ``scale * x + bias``, a row the gradient
of an example with respect to both.
"""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The static facts of one layer call.

    Shapes and axes are those inside all transforms. The captured input has the shape
    ``(*batch, *positions, *inner)``, where ``batch`` are axes that the kernel has too
    and ``inner`` belongs to the form: features, or space and channels (``patches``), or
    nothing (``index``).

    Attributes:
      kind: The kind of layer, for reports.
      form: How the call becomes rows.
      input_ndim: Rank of the captured input.
      output_ndim: Rank of the output.
      kernel: Name of the kernel among the layer's parameters, if it has one.
      scale: Name of an elementwise factor.
      bias: Name of the bias.
      kernel_axes: The kernel's axes in the order batch, summed over, features.
      batch_ndim: How many of them are batched (one matrix each).
      feature_ndim: How many are output features.
      groups: Groups of input and output channels with a matrix each.
      spatial_dims: The spatial dimensions of a convolution.
      output_axes: Transposition of the output into ``(*batch, *positions,
        *features)``; empty if it has that form.
      param_ndim: Rank of the kernel, or of the scale.
    """

    kind: str
    form: Form
    input_ndim: int
    output_ndim: int
    kernel: str | None = "kernel"
    scale: str | None = None
    bias: str | None = None
    kernel_axes: tuple[int, ...] = (0, 1)
    batch_ndim: int = 0
    feature_ndim: int = 1
    groups: int = 1
    spatial_dims: tuple[SpatialDim, ...] = ()
    output_axes: tuple[int, ...] = ()
    param_ndim: int = 2

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the call's parameters; the first one identifies the layer."""
        names = (self.kernel, self.scale, self.bias)
        return tuple(name for name in names if name is not None)

    @property
    def inner_ndim(self) -> int:
        """Trailing axes of the captured input that are not positions."""
        return {"patches": len(self.spatial_dims) + 1, "index": 0}.get(self.form, 1)

    @property
    def output_inner_ndim(self) -> int:
        """Trailing axes of the output that are not positions."""
        inner_ndims = {"patches": len(self.spatial_dims) + 1, "swapped": 1}
        return inner_ndims.get(self.form, self.feature_ndim)

    @property
    def positions_inside(self) -> int:
        """Positions that the call itself makes of one input (a convolution's)."""
        return math.prod(output_sizes(self.spatial_dims))


# The facts of a call travel in the name of a captured variable: Python side effects
# are lost where a lifted transform reuses a cached trace, a pytree's structure is not.
_PREFIX = "cgfac:"


def encode(call: LayerCall) -> str:
    """Returns the facts of a call as a variable name."""
    plain = dataclasses.replace(call, spatial_dims=tuple(map(tuple, call.spatial_dims)))
    return _PREFIX + repr(tuple(vars(plain).values()))


def decode(name: str) -> LayerCall | None:
    """Returns the facts in a variable's name, or None for any other name."""
    if not name.startswith(_PREFIX):
        return None
    call = LayerCall(*ast.literal_eval(name[len(_PREFIX) :]))
    spatial_dims = tuple(SpatialDim(*dim) for dim in call.spatial_dims)
    return dataclasses.replace(call, spatial_dims=spatial_dims)


class CallSite(NamedTuple):
    """Where calls of a layer are captured."""

    root: int  # the index of the outermost module call
    path: Path  # of the module below it
    name: str  # the layer's first parameter there
    # For every call the axis of its input along which examples lie: -1 if the input
    # does not depend on the batch, None if unknown.
    axes: tuple[int | None, ...]


class Root(NamedTuple):
    """What was captured below one outermost module call."""

    # By layer path below the root: facts, input and, in discovery, the output.
    calls: dict[Path, list[tuple[LayerCall, tuple[Array, ...]]]]
    leaf_ids: dict[Path, int]  # the identity of every parameter leaf


class Visit(NamedTuple):
    """A module that the trace met, for reports on uncovered parameters."""

    class_name: str
    problem: str | None = None  # why no rows can be taken from it as it is used here
    mixes: bool = False  # whether its output for an example depends on the others


class Capture(NamedTuple):
    """The outputs of a captured call and everything tagged on the way."""

    outputs: PyTree
    roots: tuple[Root, ...]  # the outermost module calls
    visits: dict[tuple[int, Path], Visit]  # by root and path below it
    state: PyTree = None  # of an NNX module as the call left it, without parameters


def probes_like(roots: Sequence[Mapping[Path, Any]]) -> tuple[PyTree, ...]:
    """Returns zero probes for the outputs in the ``Root.calls`` of a discovery run."""
    probes = []
    for root in roots:
        tree: dict[str, Any] = {}
        for path, calls in root.items():
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            for call, (_, output) in calls:
                # zeros_like and not zeros(shape): under shard_map the latter
                # would not vary over devices and its cotangent would be summed.
                probe = jax.tree.map(jnp.zeros_like, output)
                node[encode(call)] = (*node.get(encode(call), ()), probe)
        probes.append(tree)
    return tuple(probes)


def probe_calls(probes: tuple[PyTree, ...]) -> list[dict[Path, list[Array]]]:
    """Returns probes or their cotangents by root and layer path, in call order."""
    roots: list[dict[Path, list[Array]]] = [{} for _ in probes]
    for found, tree in zip(roots, probes, strict=True):
        for path, _, values in entries(tree):
            found.setdefault(path, []).extend(values)
    return roots


def entries(tree: Mapping[str, Any], path: Path = ()):
    """Yields ``(layer path, call, values)`` from a collection's nested dict."""
    # Sorted, as JAX sorts the keys of what passes a transformation: inputs and
    # cotangents must come in one order where a layer is called in several ways.
    for name, value in sorted(tree.items()):
        call = decode(name)
        if call is not None:
            yield path, call, value
        elif isinstance(value, Mapping):
            yield from entries(value, (*path, name))
