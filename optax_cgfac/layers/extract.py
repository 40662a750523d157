"""Call calls of a layer become rows, one form of call at a time.

Positions (of a sequence, of an image) that share weights become rows of their own, all
of them or a few of each example ("expand"), or are averaged and summed into one row
("reduce"); Eschenhagen et al. (2023), "Kronecker-Factored Approximate Curvature for
Modern Neural Network Architectures", sections 3.1 and 3.2.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import LayerCall
from optax_cgfac.capture.conv import mean_patches, patches_at
from optax_cgfac.layers.layer import (
    LayerTag,
    Use,
)
from optax_cgfac.operators.rows import IndexRows, StackedRows, split_rows
from optax_cgfac.utils.paths import Path
from optax_cgfac.utils.types import Array, LayerRows


class Call(NamedTuple):
    """One call.

    Attributes:
      call: Its facts.
      x: Its input.
      y: Its output's cotangent.
      axis: The axis of ``x`` along which examples lie, slowest if it holds positions
        too; None to go by sizes.
    """

    call: LayerCall
    x: Array
    y: Array
    axis: int | None = None


class Draw(NamedTuple):
    """Which examples and positions become rows, where not all of them do.

    Attributes:
      rng: A key that draws positions, or None to take turns.
      turn: The turn of each example, shape ``(N,)``.
      examples: The examples of a captured batch, shape ``(N,)``; None for all.
      entries: A key that draws entries of rows; None where whole rows are kept.
      part: The layer, and the form of its calls: each draws with keys of its own.
    """

    rng: Array | None = None
    turn: Array | None = None
    examples: Array | None = None
    entries: Array | None = None
    part: tuple[int, ...] = ()

    def of_part(self, number: int) -> "Draw":
        """Returns the draw for a part of what it was for."""
        return self._replace(part=(*self.part, number))

    def own(self, key: Array) -> Array:
        """Returns a key's own descendant for this part."""
        for number in self.part:
            key = jax.random.fold_in(key, number)
        return key

    def pick(self, x: Array, axis: int) -> Array:
        """Returns the chosen examples along an axis."""
        return x if self.examples is None else jnp.take(x, self.examples, axis)

    def place(self, x: Array, like: Array) -> Array:
        """Returns ``x`` at the chosen examples of ``like``, zero at the others."""
        if self.examples is None:
            return x
        return jnp.zeros_like(like).at[self.examples].set(x)

    def count(self, num_examples: int) -> int:
        """Returns how many of a batch's examples are chosen."""
        return num_examples if self.examples is None else len(self.examples)


def example_rows(
    tag: LayerTag, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    """Brings the calls of one layer to rows.

    Args:
      tag: The layer.
      calls: Its calls, in any order.
      num_examples: Examples of the captured batch.
      draw: Which examples and positions are chosen.

    Returns:
      Rows ``(*stack, R, n)``, those of an example next to each other, with a column
      of ones in ``a`` for a bias. One-hot rows of a look-up come before the rows of
      its transposed use.
    """
    if tag.sharing > 1:
        # The sum of N independent cotangents without mean: squares add up to N times
        # those of an example.
        num_examples = 1
        turn = None if draw.turn is None else draw.turn[:1]
        draw = draw._replace(turn=turn, examples=None)
        root = tag.sharing**-0.5
        calls = [
            call._replace(y=call.y * jnp.asarray(root, call.y.dtype)) for call in calls
        ]
    parts: list[LayerRows] = []
    total = sum(use.positions for use in tag.uses)
    for number, use in enumerate(tag.uses):
        members = [captured for captured in calls if captured.call.form == use.form]
        own = draw.of_part(number)
        rows = _EXTRACT[use.form](tag, use, members, num_examples, own)
        if len(tag.uses) > 1 and use.kept < use.positions:
            # One form may stand for more positions than the other.
            share = use.positions / total * len(tag.uses)
            rows = _weigh(rows, share**0.5)
        parts.append(rows)
    if len(parts) == 1:
        return parts[0]
    top, bottom = parts
    g = jnp.concatenate([top.g, bottom.g], -2)
    if not isinstance(bottom.a, IndexRows):
        return LayerRows(StackedRows(top.a, bottom.a), g)
    indices = jnp.concatenate([top.a.indices, bottom.a.indices], -1)
    weights = jnp.concatenate([top.a.weights, bottom.a.weights], -1)
    return LayerRows(IndexRows(indices, weights, tag.n_in), g)


def _weigh(rows: LayerRows, weight: float) -> LayerRows:
    if isinstance(rows.a, IndexRows):
        a = IndexRows(rows.a.indices, rows.a.weights * weight, rows.a.size)
    else:
        a = rows.a * weight
    return LayerRows(a, rows.g * weight)


def _dense(
    tag: LayerTag, use: Use, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    inputs = jnp.concatenate([_inputs(tag, c, num_examples, draw) for c in calls], -2)
    cotangents = jnp.concatenate(
        [_outputs(tag, c, num_examples, draw) for c in calls], -2
    )
    if use.reduce:
        a = jnp.mean(inputs, -2)
        return LayerRows(_with_ones(tag, a), jnp.sum(cotangents, -2))
    chosen = _choose(use, draw.count(num_examples), draw)
    a, g = _take(inputs, chosen), _take(cotangents, chosen)
    return LayerRows(_with_ones(tag, a), g)


def _swapped(
    tag: LayerTag, use: Use, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    rows = _dense(tag, use, calls, num_examples, draw)
    if not use.sampled:
        return LayerRows(rows.g, rows.a)
    key = jax.random.key(0) if draw.entries is None else draw.entries
    squares = rows.g**2
    picked = jax.random.categorical(draw.own(key), jnp.log(squares)).astype(jnp.int32)
    weights = jnp.sqrt(jnp.sum(squares, -1))
    return LayerRows(IndexRows(picked, weights, tag.n_in), rows.a)


def _index(
    tag: LayerTag, use: Use, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    indices = jnp.concatenate(
        [_inputs(tag, c, num_examples, draw)[..., None] for c in calls], -2
    )
    cotangents = jnp.concatenate(
        [_outputs(tag, c, num_examples, draw) for c in calls], -2
    )
    chosen = _choose(use, draw.count(num_examples), draw)
    picked = _take(indices, chosen)[..., 0]
    picked = jnp.where(picked < 0, picked + tag.n_in, picked).astype(jnp.int32)
    weights = jnp.ones(picked.shape, tag.dtype)
    return LayerRows(IndexRows(picked, weights, tag.n_in), _take(cotangents, chosen))


def _patches(
    tag: LayerTag, use: Use, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    lifted = len(tag.stack) - tag.batch_ndim
    count = draw.count(num_examples)

    def extract(inputs: list[Array], cotangents: list[Array]) -> LayerRows:
        g = jnp.concatenate([x.reshape(count, -1, x.shape[-1]) for x in cotangents], 1)
        if use.reduce:
            means = [
                mean_patches(x, c.call.spatial_dims)
                for x, c in zip(inputs, calls, strict=True)
            ]
            weights = [x.size / g.size for x in cotangents]
            a = sum(w * mean for w, mean in zip(weights, means, strict=True))
            a, g = jnp.asarray(a)[:, None], jnp.sum(g, 1, keepdims=True)
        else:
            chosen = _choose(use, count, draw)
            if chosen is None:
                everything = jnp.arange(use.positions)
                chosen = jnp.broadcast_to(everything, (count, use.positions))
            a = _patches_of_calls(inputs, calls, chosen)
            g = _take(g, chosen)
        return _split_groups(a, g, calls[0].call.groups)

    inputs = [_inputs(tag, c, num_examples, draw) for c in calls]
    cotangents = [_outputs(tag, c, num_examples, draw, flat=False) for c in calls]
    for _ in range(lifted):
        extract = jax.vmap(extract)
    rows = extract(inputs, cotangents)
    return LayerRows(_with_ones(tag, rows.a), rows.g)


def _patches_of_calls(
    inputs: Sequence[Array], calls: Sequence[Call], chosen: Array
) -> Array:
    """Patches ``(N, P, taps, channels)`` at positions counted over all calls."""
    start, patches = 0, jnp.zeros(())
    for x, captured in zip(inputs, calls, strict=True):
        size = x.shape[1] * captured.call.positions_inside
        local = jnp.clip(chosen - start, 0, size - 1)
        found = patches_at(x, captured.call.spatial_dims, local)
        patches = jnp.where((chosen >= start)[..., None, None], found, patches)
        start += size
    return patches


def _split_groups(a: Array, g: Array, groups: int) -> LayerRows:
    """Brings channels to their group: ``(N, P, taps, c) -> ([groups,] N·P, n)``."""
    g = g.reshape(-1, g.shape[-1])
    a = a.reshape(g.shape[0], *a.shape[2:])
    if groups == 1:
        return LayerRows(a.reshape(g.shape[0], -1), g)
    a = a.reshape(*a.shape[:2], groups, -1)
    a = jnp.moveaxis(a, 2, 0).reshape(groups, g.shape[0], -1)
    return LayerRows(a, jnp.moveaxis(g.reshape(g.shape[0], groups, -1), 1, 0))


def _elementwise(
    tag: LayerTag, use: Use, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    """The gradient of every example, exact whatever the number of positions."""
    del use
    parts = []
    if tag.scale is not None:
        products = [
            _inputs(tag, c, num_examples, draw) * _outputs(tag, c, num_examples, draw)
            for c in calls
        ]
        gradient = sum(jnp.sum(product, -2) for product in products)
        if tag.width(tag.scale) == 1:  # one slope for all features
            gradient = jnp.sum(jnp.asarray(gradient), -1, keepdims=True)
        parts.append(gradient)
    if tag.bias is not None:
        cotangents = [_outputs(tag, c, num_examples, draw) for c in calls]
        parts.append(sum(jnp.sum(g, -2) for g in cotangents))
    g = jnp.concatenate(parts, -1)
    return LayerRows(jnp.ones((*g.shape[:-1], 1), g.dtype), g)


_EXTRACT = {
    "dense": _dense,
    "patches": _patches,
    "index": _index,
    "swapped": _swapped,
    "elementwise": _elementwise,
}


def _inputs(tag: LayerTag, captured: Call, num_examples: int, draw: Draw) -> Array:
    """The captured input as ``(*stack, N, T, *inner)``, features flat."""
    call, x = captured.call, captured.x
    if call.form != "index":
        x = x.astype(tag.dtype)
    x = _examples_first(
        tag, captured, x, call.input_ndim, call.inner_ndim, num_examples
    )
    stack_ndim = len(tag.stack) if call.groups == 1 else len(tag.stack) - 1
    inner = x.shape[x.ndim - call.inner_ndim :]
    if call.form == "elementwise":
        inner = (math.prod(inner),)
    x = x.reshape(*x.shape[:stack_ndim], num_examples, -1, *inner)
    return draw.pick(x, stack_ndim)


def _outputs(
    tag: LayerTag,
    captured: Call,
    num_examples: int,
    draw: Draw,
    *,
    flat: bool = True,
) -> Array:
    """The cotangent as ``(*stack, N, T, features)``, or with a convolution's space."""
    call, y = captured.call, captured.y.astype(tag.dtype)
    if call.output_axes:
        added = y.ndim - call.output_ndim
        order = (added + axis for axis in call.output_axes)
        y = y.transpose(*range(added), *order)
    y = _examples_first(
        tag, captured, y, call.output_ndim, call.output_inner_ndim, num_examples
    )
    stack_ndim = len(tag.stack) if call.groups == 1 else len(tag.stack) - 1
    inner = y.shape[y.ndim - call.output_inner_ndim :]
    if flat:
        inner = (math.prod(inner),)
    y = y.reshape(*y.shape[:stack_ndim], num_examples, -1, *inner)
    return draw.pick(y, stack_ndim)


def _examples_first(
    tag: LayerTag,
    captured: Call,
    x: Array,
    inside_ndim: int,
    inner_ndim: int,
    num_examples: int,
) -> Array:
    """Moves the examples in front of axes of positions: time-major, or of a scan."""
    start = len(tag.stack) - (captured.call.groups > 1)
    end = x.ndim - inner_ndim
    axis = captured.axis
    if axis is None:
        added = x.ndim - inside_ndim
        axis = start
        if added > len(tag.stack) - tag.batch_ndim:
            axis = added  # the transform's own axes are positions
        if axis < end and x.shape[axis] != num_examples:
            sizes = x.shape[start:end]
            axis = start + sizes.index(num_examples) if num_examples in sizes else axis
    return jnp.moveaxis(x, axis, start) if start < axis < end else x


def _choose(use: Use, num_examples: int, draw: Draw) -> Array | None:
    """Positions of each example, shape ``(N, kept)``; None for all of them.

    Evenly spread from a random one on, so that every position is as likely.

    Returns:
      Positions, or None.
    """
    if use.kept == use.positions:
        return None
    if draw.rng is None:
        start = draw.turn if draw.turn is not None else jnp.arange(num_examples)
    else:
        key = draw.own(draw.rng)
        start = jax.random.randint(key, (num_examples,), 0, use.positions)
    steps = jnp.arange(use.kept) * (use.positions // use.kept)
    return (start[:, None] + steps) % use.positions


def _take(x: Array, chosen: Array | None) -> Array:
    """``(*stack, N, T, n) -> (*stack, N·P, n)``."""
    if chosen is not None:
        index = chosen.reshape(*([1] * (x.ndim - 3)), *chosen.shape, 1)
        x = jnp.take_along_axis(x, index, -2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _with_ones(tag: LayerTag, a: Array) -> Array:
    if tag.bias is None:
        return a
    return jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], -1)


def merge_columns(rows: LayerRows) -> LayerRows:
    """Puts the rows of several columns, stacked on a first axis, below each other."""
    if isinstance(rows.a, StackedRows):
        halves = [
            merge_columns(LayerRows(a, g))
            for a, g in zip(
                (rows.a.top, rows.a.bottom), split_rows(rows.a, rows.g), strict=True
            )
        ]
        a = StackedRows(*(half.a for half in halves))
        return LayerRows(a, jnp.concatenate([half.g for half in halves], -2))

    def merge(x: Array, axis: int) -> Array:
        x = jnp.moveaxis(x, 0, axis - 1)
        shape = (*x.shape[: axis - 1], -1, *x.shape[x.ndim + axis + 1 :])
        return x.reshape(shape)

    if isinstance(rows.a, IndexRows):
        a = IndexRows(merge(rows.a.indices, -1), merge(rows.a.weights, -1), rows.a.size)
    else:
        a = merge(rows.a, -2)
    return LayerRows(a, merge(rows.g, -2))


def calls_of(
    tag: LayerTag,
    captured: list[dict[Path, list[Any]]],
    cotangents: list[dict[Path, list[Array]]],
) -> list[Call]:
    """Returns facts, input and output cotangent of every call of one layer.

    Args:
      tag: The layer.
      captured: ``Root.calls`` of every root of a captured run.
      cotangents: Of the same run's probes, from `probe_calls`.
    """
    found = []
    for site in tag.sources:
        calls = captured[site.root][site.path]
        own = [
            (call, x, y)
            for (call, (x,)), y in zip(
                calls, cotangents[site.root][site.path], strict=True
            )
            if call.params[:1] == (site.name,)
        ]
        found += [Call(*call, axis) for call, axis in zip(own, site.axes, strict=True)]
    return found
