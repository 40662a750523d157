"""What the rows of each kind of layer are; knows arrays and shapes, not Flax.

A framework adapter reports, for every call of a layer, its input brought to the
form ``(*stack, *positions, n_in)`` and the cotangent of its output,
``(*stack, *positions, *features)``. This module turns both into rows, and the
layer's parameters into one matrix and back.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from optax_cgfac._paths import Path, text
from optax_cgfac._types import Array, LayerRows

LEFT_OUT = "left out by where"
"""The reason of a parameter that the user excluded."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The static facts of one layer call, as its framework adapter saw it.

    Attributes:
      kind: The kind of layer, ``"dense"`` or ``"dense_general"``.
      batch_ndim: Leading kernel axes that are batched (one matrix each).
      contract_ndim: Kernel axes that are summed over.
      feature_ndim: Trailing kernel axes, the output features.
      input_ndim: Rank of the input in the form above, inside all transforms.
      has_bias: Whether the layer adds a bias.
    """

    kind: str
    batch_ndim: int
    contract_ndim: int
    feature_ndim: int
    input_ndim: int
    has_bias: bool

    @property
    def kernel_ndim(self) -> int:
        """Rank of the kernel inside all transforms."""
        return self.batch_ndim + self.contract_ndim + self.feature_ndim


@dataclasses.dataclass(frozen=True)
class LayerTag:
    """A layer that is preconditioned: where it is and what its matrix looks like.

    Attributes:
      path: The layer's path in the parameter tree.
      kind: The kind of layer.
      kernel: Path of the kernel leaf.
      bias: Path of the bias leaf, or None.
      stack: Sizes of leading axes that hold independent matrices (layers of an
        ``nn.scan``, batched kernels).
      n_in: Rows of the matrix, with one more for a bias.
      n_out: Columns of the matrix.
      positions: Positions at which an example passes the layer (1 for a plain
        dense layer on vectors), all calls of a shared module together.
      columns: Cotangents per example (the Hessian's columns of ``kind="exact"``).
      rows_per_step: Rows that one update of the curvature adds.
      dtype: The dtype of the rows.
      sources: Where the layer's calls are captured: the outermost module call's
        index and the layer's path below it.
    """

    path: Path
    kind: str
    kernel: Path
    bias: Path | None
    stack: tuple[int, ...]
    n_in: int
    n_out: int
    positions: int
    columns: int
    rows_per_step: int
    dtype: str
    sources: tuple[tuple[int, Path], ...]

    @property
    def name(self) -> str:
        """The path as text; the root module of a model is ``"."``."""
        return text(self.path) or "."

    @property
    def leaves(self) -> tuple[Path, ...]:
        """Paths of the layer's parameters."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    @property
    def size(self) -> int:
        """Number of parameters, all stacked matrices together."""
        return math.prod(self.stack) * self.n_in * self.n_out


def matrix_from_leaves(tag: LayerTag, leaves: Mapping[Path, Array]) -> Array:
    """Returns the layer's parameters as ``(*stack, n_in, n_out)`` in the rows' dtype.

    Only the leaves that are present take part: a masked kernel or bias leaves
    the rows of the other.
    """
    parts = []
    if tag.kernel in leaves:
        parts.append(leaves[tag.kernel].reshape(*tag.stack, -1, tag.n_out))
    if tag.bias is not None and tag.bias in leaves:
        parts.append(leaves[tag.bias].reshape(*tag.stack, 1, tag.n_out))
    return jnp.concatenate([part.astype(tag.dtype) for part in parts], -2)


def leaves_from_matrix(
    tag: LayerTag, matrix: Array, like: Mapping[Path, Array]
) -> dict[Path, Array]:
    """Splits a matrix into leaves with the shapes and dtypes of those in ``like``."""
    leaves = {}
    if tag.kernel in like:
        end = tag.n_in if tag.bias is None else tag.n_in - 1
        leaves[tag.kernel] = matrix[..., :end, :]
    if tag.bias is not None and tag.bias in like:
        leaves[tag.bias] = matrix[..., -1, :]
    return {
        path: leaf.reshape(like[path].shape).astype(like[path].dtype)
        for path, leaf in leaves.items()
    }


def rows_for_leaves(
    tag: LayerTag, rows: LayerRows, leaves: Mapping[Path, Array]
) -> LayerRows:
    """Returns the rows with the activation columns of the leaves that are present."""
    if tag.bias is None or all(path in leaves for path in tag.leaves):
        return rows
    columns = rows.a[..., :-1] if tag.kernel in leaves else rows.a[..., -1:]
    return LayerRows(columns, rows.g)


def example_rows(
    tag: LayerTag,
    calls: Sequence[tuple[LayerCall, Array, Array]],
    num_examples: int,
) -> LayerRows:
    """Brings the calls of one layer to ``(*stack, N, T, n)``, calls concatenated.

    Args:
      tag: The layer.
      calls: For each call its facts, its input and its output cotangent.
      num_examples: ``N``; the positions of an example follow it.

    Returns:
      Rows with ``a`` of shape ``(*stack, N, T, n_in)``, a column of ones
      appended for a bias, and ``g`` of shape ``(*stack, N, T, n_out)``.
    """
    inputs, cotangents = [], []
    for call, a, g in calls:
        a = _examples_first(tag, call, a.astype(tag.dtype), call.input_ndim, 1)
        g_ndim = call.input_ndim - 1 + call.feature_ndim
        g = _examples_first(tag, call, g.astype(tag.dtype), g_ndim, call.feature_ndim)
        inputs.append(a.reshape(*tag.stack, num_examples, -1, a.shape[-1]))
        cotangents.append(g.reshape(*tag.stack, num_examples, -1, tag.n_out))
    a = jnp.concatenate(inputs, -2)
    if tag.bias is not None:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], -1)
    return LayerRows(a, jnp.concatenate(cotangents, -2))


def _examples_first(
    tag: LayerTag, call: LayerCall, x: Array, inner_ndim: int, feature_ndim: int
) -> Array:
    """Moves axes that a transform added as positions (time) behind the examples'."""
    added = x.ndim - inner_ndim
    transform_stack = len(tag.stack) - call.batch_ndim
    if added > transform_stack:  # positions in front: (T, N, ...) -> (N, T, ...)
        examples = added + call.batch_ndim
        if x.ndim - feature_ndim > examples:
            x = jnp.moveaxis(x, examples, 0)
    return x


def find_problem(
    call: LayerCall,
    input_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    num_examples: int,
) -> str | None:
    """Returns why a captured call cannot be turned into rows, or None if it can."""
    stack_ndim = len(kernel_shape) - call.kernel_ndim
    added = len(input_shape) - call.input_ndim
    if stack_ndim < 0:
        return "its kernel in the parameter tree has another rank than in the layer"
    stack = kernel_shape[: stack_ndim + call.batch_ndim]
    if stack_ndim and added != stack_ndim:
        return "its parameters are stacked by a transform along which its rows are not"
    if stack_ndim and input_shape[: len(stack)] != stack:
        return (
            f"its kernel {kernel_shape} and its rows {input_shape} are stacked along "
            "different axes; stack both along axis 0"
        )
    if call.batch_ndim and added > stack_ndim:
        return "a batched kernel below a transform that adds positions"
    positions = math.prod(input_shape[len(stack) : -1])
    if positions == 0 or positions % num_examples:
        return (
            f"its input has {positions} rows, which is no multiple of the "
            f"{num_examples} examples: it does not depend on the batch, or mixes it"
        )
    return None
