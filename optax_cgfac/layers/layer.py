"""A tagged layer: its place in the parameter tree, its parameters as one matrix."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from optax_cgfac.capture.call import CallSite, Form, LayerCall
from optax_cgfac.utils.paths import Path, text
from optax_cgfac.utils.types import Array, LayerRows

LEFT_OUT = "left out by where"
"""The reason of a parameter that the user excluded."""


class Use(NamedTuple):
    """All calls of a layer that have one form."""

    form: Form
    positions: int  # at which an example passes them, together
    kept: int  # positions of each example that become rows
    reduce: bool = False  # whether all positions of an example go into one row
    # Whether a row keeps one entry of its long side, drawn in proportion to the
    # squares: that side's factor is then diagonal, and right in the mean.
    sampled: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the rows of an example add up to its gradient."""
        whole = self.kept == self.positions and not self.sampled
        return self.form == "elementwise" or whole


@dataclasses.dataclass(frozen=True)
class LayerTag:
    """A layer that is preconditioned: its place and its matrix.

    Attributes:
      path: The layer's path in the parameter tree.
      kind: The kind of layer.
      kernel: Path of the kernel; None for an elementwise layer.
      bias: Path of the bias, or None.
      scale: Path of an elementwise layer's scale, or None.
      stack: Sizes of leading axes that hold independent matrices (layers of an
        ``nn.scan``, batched kernels, groups of channels).
      n_in: Rows of the matrix, with one more for a bias; 1 if elementwise.
      n_out: Columns of the matrix.
      positions: Positions at which an example passes the layer (1 for a plain
        dense layer on vectors), all calls of a shared module together; 1 where a
        row stands for the whole example.
      columns: Cotangents per example.
      rows_per_step: Rows that one update of the curvature adds.
      dtype: The dtype of the layer's matrix in solves.
      batch_ndim: Trailing axes of ``stack`` that the kernel itself has.
      view: Shape to which the kernel is brought, behind axes stacked by transforms.
      axes: Transposition of ``view`` to batch, inputs, outputs.
      uses: The forms in which the layer is called.
      shapes: Shapes of the leaves, in the order of ``leaves``.
      sites: Where the layer's calls are captured.
      sharing: Examples that share the layer's input, such as a table of positions;
        its rows are then those of a single example.
    """

    path: Path
    kind: str
    kernel: Path | None
    bias: Path | None
    scale: Path | None
    stack: tuple[int, ...]
    n_in: int
    n_out: int
    positions: int
    columns: int
    rows_per_step: int
    dtype: str
    batch_ndim: int
    view: tuple[int, ...]
    axes: tuple[int, ...]
    uses: tuple[Use, ...]
    shapes: tuple[tuple[int, ...], ...]
    sites: tuple[CallSite, ...]
    sharing: int = 1

    @property
    def name(self) -> str:
        """The path as text; the root module of a model is ``"."``."""
        return text(self.path) or "."

    @property
    def leaves(self) -> tuple[Path, ...]:
        """Paths of the layer's parameters, in the order of the matrix."""
        paths = (self.kernel, self.scale, self.bias)
        return tuple(path for path in paths if path is not None)

    @property
    def is_elementwise(self) -> bool:
        """Whether the matrix is one row that holds every parameter."""
        return self.kernel is None

    @property
    def size(self) -> int:
        """Number of parameters, all stacked matrices together."""
        return math.prod(self.stack) * self.n_in * self.n_out

    def width(self, path: Path) -> int:
        """Returns the columns that a leaf of an elementwise layer has."""
        shape = self.shapes[self.leaves.index(path)]
        return math.prod(shape[len(self.stack) :])


def find_problem(
    call: LayerCall,
    input_shape: tuple[int, ...],
    param_shape: tuple[int, ...],
    num_examples: int,
) -> str | None:
    """Returns why a captured call cannot be turned into rows, or None if it can."""
    stack_ndim = len(param_shape) - call.param_ndim
    added = len(input_shape) - call.input_ndim
    if stack_ndim < 0:
        return "its kernel in the parameter tree has another rank than in the layer"
    stack = param_shape[:stack_ndim]
    if call.kernel is not None:
        batch = call.kernel_axes[: call.batch_ndim]
        stack += tuple(param_shape[stack_ndim + axis] for axis in batch)
    if stack_ndim and added != stack_ndim:
        return "its parameters are stacked by a transform along which its rows are not"
    if stack_ndim and input_shape[: len(stack)] != stack:
        return (
            f"its kernel {param_shape} and its rows {input_shape} are stacked along "
            "different axes; stack both along axis 0"
        )
    if call.batch_ndim and added > stack_ndim:
        return "a batched kernel below a transform that adds positions"
    positions = num_positions(call, input_shape, len(stack))
    if positions == 0 or positions % num_examples:
        return (
            f"its input has {positions} rows, which is not a multiple of the "
            f"{num_examples} examples: it does not depend on the batch, or mixes it"
        )
    return None


def num_positions(
    call: LayerCall, input_shape: tuple[int, ...], stack_ndim: int
) -> int:
    """Returns the rows of a call, examples times positions, before a choice."""
    outer = input_shape[stack_ndim : len(input_shape) - call.inner_ndim]
    return call.positions_inside * math.prod(outer)


def matrix_from_leaves(tag: LayerTag, leaves: Mapping[Path, Array]) -> Array:
    """Returns the parameters that are present as ``(*stack, n_in, n_out)``."""
    blocks = blocks_from_leaves(tag, leaves)
    return jnp.concatenate(blocks, -1 if tag.is_elementwise else -2)


def blocks_from_leaves(tag: LayerTag, leaves: Mapping[Path, Array]) -> list[Array]:
    """Returns the leaves that are present as parts of the layer's matrix."""
    blocks = []
    for path in tag.leaves:
        if path not in leaves:
            continue
        leaf = leaves[path].astype(tag.dtype)
        if path == tag.kernel:
            lifted = leaf.shape[: len(tag.stack) - tag.batch_ndim]
            leaf = leaf.reshape(*lifted, *tag.view)
            order = (len(lifted) + axis for axis in tag.axes)
            leaf = leaf.transpose(*range(len(lifted)), *order)
            blocks.append(leaf.reshape(*tag.stack, -1, tag.n_out))
        else:
            blocks.append(leaf.reshape(*tag.stack, 1, -1))
    return blocks


def leaves_from_matrix(
    tag: LayerTag, matrix: Array, like: Mapping[Path, Array]
) -> dict[Path, Array]:
    """Inverts `matrix_from_leaves`, with the shapes and dtypes of ``like``."""
    blocks = []
    if tag.is_elementwise:
        start = 0
        for path in tag.leaves:
            if path in like:
                end = start + tag.width(path)
                blocks.append(matrix[..., start:end])
                start = end
    else:
        if tag.kernel is not None and tag.kernel in like:
            blocks.append(matrix[..., : tag.n_in - (tag.bias is not None), :])
        if tag.bias is not None and tag.bias in like:
            blocks.append(matrix[..., -1:, :])
    return leaves_from_blocks(tag, blocks, like)


def leaves_from_blocks(
    tag: LayerTag, blocks: Sequence[Array], like: Mapping[Path, Array]
) -> dict[Path, Array]:
    """Inverts `blocks_from_leaves`, with the shapes and dtypes of ``like``."""
    leaves = {}
    present = (path for path in tag.leaves if path in like)
    for path, block in zip(present, blocks, strict=True):
        if path == tag.kernel:
            lifted = tag.stack[: len(tag.stack) - tag.batch_ndim]
            kernel = block.reshape(*lifted, *(tag.view[axis] for axis in tag.axes))
            back = sorted(range(len(tag.axes)), key=tag.axes.__getitem__)
            order = (len(lifted) + axis for axis in back)
            block = kernel.transpose(*range(len(lifted)), *order)
        leaves[path] = block.reshape(like[path].shape).astype(like[path].dtype)
    return leaves


def rows_for_leaves(
    tag: LayerTag, rows: LayerRows, leaves: Mapping[Path, Array]
) -> LayerRows:
    """Returns the rows with the columns of the leaves that are present."""
    if len(tag.leaves) == 1 or all(path in leaves for path in tag.leaves):
        return rows
    if tag.is_elementwise:
        first = tag.width(tag.leaves[0])
        g = rows.g[..., :first] if tag.leaves[0] in leaves else rows.g[..., first:]
        return LayerRows(rows.a, g)
    a = rows.a[..., :-1] if tag.kernel in leaves else rows.a[..., -1:]
    return LayerRows(a, rows.g)
