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
"""How the rows of a call come out of its input ``x`` and output cotangent ``y``.

``dense``: ``a = x``, ``g = y``. ``patches``: ``a`` are patches of ``x``. ``index``:
``x`` are indices, ``a`` one-hot. ``swapped``: the kernel is used transposed, ``a = y``
and ``g = x``. ``elementwise``: the output is ``scale * x + bias``; a row is the
gradient of an example with respect to both.
"""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The static facts of one layer call, as its framework adapter saw it.

    Shapes and axes are those inside all transforms. The captured input has the form
    ``(*batch, *positions, *inner)``, where ``batch`` are axes that the kernel has too
    and ``inner`` belongs to the form: one axis of features (``dense``, ``swapped``),
    space and channels (``patches``), nothing (``index``), the output's features
    (``elementwise``).

    Attributes:
      kind: The kind of layer, for reports.
      form: How rows come out of the call.
      input_ndim: Rank of the captured input.
      output_ndim: Rank of the output.
      kernel: Name of the kernel among the layer's parameters, if it has one.
      scale: Name of an elementwise factor.
      bias: Name of the bias.
      kernel_axes: The kernel's axes in the order batch, summed over, features.
      batch_ndim: How many of them are batched (one matrix each).
      feature_ndim: How many are output features; of an ``elementwise`` call, the
        trailing axes of its output that have parameters of their own.
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
        if self.form == "patches":
            return len(self.spatial_dims) + 1
        return {"index": 0, "elementwise": self.feature_ndim}.get(self.form, 1)

    @property
    def output_inner_ndim(self) -> int:
        """Trailing axes of the output that are not positions."""
        if self.form == "patches":
            return len(self.spatial_dims) + 1
        return 1 if self.form == "swapped" else self.feature_ndim

    @property
    def positions_inside(self) -> int:
        """Positions that the call itself makes of one input (a convolution's)."""
        return math.prod(output_sizes(self.spatial_dims))


# The facts of a call travel in the name of a captured variable: Python side effects
# are lost where a lifted transform reuses a cached trace, a pytree's structure is not.
_PREFIX = "cgfac:"


def encode(call: LayerCall) -> str:
    """Returns the facts of a call as a variable name."""
    fields = [getattr(call, field.name) for field in dataclasses.fields(call)]
    plain = [
        tuple(map(tuple, value))
        if isinstance(value, tuple) and value is call.spatial_dims
        else value
        for value in fields
    ]
    return _PREFIX + repr(tuple(plain))


def decode(name: str) -> LayerCall | None:
    """Returns the facts in a variable's name, or None for any other name."""
    if not name.startswith(_PREFIX):
        return None
    call = LayerCall(*ast.literal_eval(name[len(_PREFIX) :]))
    spatial_dims = tuple(SpatialDim(*dim) for dim in call.spatial_dims)
    return dataclasses.replace(call, spatial_dims=spatial_dims)


class Root(NamedTuple):
    """What was captured below one outermost module call.

    Attributes:
      calls: For every layer path below the root, its calls: the facts, the input
        and, in discovery, the output.
      leaf_ids: The identity of every parameter leaf the root module was given.
    """

    calls: dict[Path, list[tuple[LayerCall, tuple[Array, ...]]]]
    leaf_ids: dict[Path, int]


class Visit(NamedTuple):
    """A module that the trace met, for reports on uncovered parameters.

    Attributes:
      class_name: Its class.
      liftable: Whether the collections of capture reach it.
      hidden: Whether it runs below a JAX transform inside the user's function.
      problem: Why a known layer has no rows as it is used here.
      mixes: Whether what it computes for an example depends on the others.
    """

    class_name: str
    liftable: bool
    hidden: bool
    problem: str | None = None
    mixes: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether rows can be taken from a layer that runs like this."""
        return self.liftable and not self.hidden and self.problem is None


class Capture(NamedTuple):
    """The outputs of a captured call and everything tagged on the way.

    Attributes:
      outputs: What the function returned.
      roots: The outermost module calls.
      visits: The modules that were met, by root and path below it.
      state: The state of the one NNX module as the call left it, without parameters.
    """

    outputs: PyTree
    roots: tuple[Root, ...]
    visits: dict[tuple[int, Path], Visit]
    state: PyTree = None


def probes_like(roots: Sequence[Mapping[Path, Any]]) -> tuple[PyTree, ...]:
    """Returns zero probes for the outputs found by a discovery run.

    Args:
      roots: ``Root.calls`` of every root of a `run_captured` without probes,
        arrays or shapes.

    Returns:
      What `run_captured` takes as ``probes``.
    """
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
    roots = []
    for tree in probes:
        found: dict[Path, list[Array]] = {}
        for path, _, values in entries(tree):
            found.setdefault(path, []).extend(values)
        roots.append(found)
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
