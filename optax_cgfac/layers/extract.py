"""The calls of a layer become rows, one form of call at a time.

Positions (of a sequence, of an image) that share weights become rows of their own, all
of them or a few of each example ("expand"), or are averaged and summed into one row
("reduce"); Eschenhagen et al. (2023), "Kronecker-Factored Approximate Curvature for
Modern Neural Network Architectures", sections 3.1 and 3.2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import LayerCall
from optax_cgfac.capture.conv import mean_patches, patches_at
from optax_cgfac.layers.layer import LayerTag, Use
from optax_cgfac.operators.rows import IndexRows, StackedRows, split_rows
from optax_cgfac.utils.paths import Path
from optax_cgfac.utils.types import Array, LayerRows


class Call(NamedTuple):
    """One captured call."""

    call: LayerCall
    x: Array  # the input
    y: Array  # the output's cotangent
    axis: int | None = None  # as in `CallSite`; examples are slowest along it


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
        """Returns the draw for one part of the whole."""
        return self._replace(part=(*self.part, number))

    def own(self, key: Array) -> Array:
        """Derives this part's own key."""
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


class _Batch(NamedTuple):
    """What all calls of a layer have in common."""

    tag: LayerTag
    num_examples: int
    draw: Draw

    @property
    def num_chosen(self) -> int:
        examples = self.draw.examples
        return self.num_examples if examples is None else len(examples)


def example_rows(
    tag: LayerTag, calls: Sequence[Call], num_examples: int, draw: Draw
) -> LayerRows:
    """Brings the calls of one layer to rows.

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
        calls = [c._replace(y=c.y * jnp.asarray(root, c.y.dtype)) for c in calls]
    parts: list[LayerRows] = []
    total = sum(use.positions for use in tag.uses)
    for number, use in enumerate(tag.uses):
        members = [c for c in calls if c.call.form == use.form]
        batch = _Batch(tag, num_examples, draw.of_part(number))
        rows = _EXTRACT[use.form](batch, use, members)
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
    a = rows.a
    if isinstance(a, IndexRows):
        a = IndexRows(a.indices, a.weights * weight, a.size)
    else:
        a = a * weight
    return LayerRows(a, rows.g * weight)


def _dense(batch: _Batch, use: Use, calls: Sequence[Call]) -> LayerRows:
    inputs = jnp.concatenate([_inputs(batch, c) for c in calls], -2)
    cotangents = jnp.concatenate([_outputs(batch, c) for c in calls], -2)
    if use.reduce:
        a, g = jnp.mean(inputs, -2), jnp.sum(cotangents, -2)
    else:
        chosen = _choose(batch, use)
        a, g = _take(inputs, chosen), _take(cotangents, chosen)
    return LayerRows(_with_ones(batch.tag, a), g)


def _swapped(batch: _Batch, use: Use, calls: Sequence[Call]) -> LayerRows:
    rows, draw = _dense(batch, use, calls), batch.draw
    if not use.sampled:
        return LayerRows(rows.g, rows.a)
    key = jax.random.key(0) if draw.entries is None else draw.entries
    squares = rows.g**2
    picked = jax.random.categorical(draw.own(key), jnp.log(squares)).astype(jnp.int32)
    weights = jnp.sqrt(jnp.sum(squares, -1))
    return LayerRows(IndexRows(picked, weights, batch.tag.n_in), rows.a)


def _index(batch: _Batch, use: Use, calls: Sequence[Call]) -> LayerRows:
    tag, chosen = batch.tag, _choose(batch, use)
    indices = jnp.concatenate([_inputs(batch, c)[..., None] for c in calls], -2)
    cotangents = jnp.concatenate([_outputs(batch, c) for c in calls], -2)
    picked = _take(indices, chosen)[..., 0]
    picked = jnp.where(picked < 0, picked + tag.n_in, picked).astype(jnp.int32)
    weights = jnp.ones(picked.shape, tag.dtype)
    return LayerRows(IndexRows(picked, weights, tag.n_in), _take(cotangents, chosen))


def _patches(batch: _Batch, use: Use, calls: Sequence[Call]) -> LayerRows:
    tag, count = batch.tag, batch.num_chosen

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
            chosen = _choose(batch, use)
            if chosen is None:
                everything = jnp.arange(use.positions)
                chosen = jnp.broadcast_to(everything, (count, use.positions))
            a = _patches_of_calls(inputs, calls, chosen)
            g = _take(g, chosen)
        return _split_groups(a, g, calls[0].call.groups)

    inputs = [_inputs(batch, c) for c in calls]
    cotangents = [_outputs(batch, c, flat=False) for c in calls]
    for _ in range(len(tag.stack) - tag.batch_ndim):
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


def _elementwise(batch: _Batch, use: Use, calls: Sequence[Call]) -> LayerRows:
    """The gradient of every example, exact whatever the number of positions."""
    del use
    tag, parts = batch.tag, []
    if tag.scale is not None:
        products = [_inputs(batch, c) * _outputs(batch, c) for c in calls]
        gradient = sum(jnp.sum(product, -2) for product in products)
        if tag.width(tag.scale) == 1:  # one slope for all features
            gradient = jnp.sum(jnp.asarray(gradient), -1, keepdims=True)
        parts.append(gradient)
    if tag.bias is not None:
        parts.append(sum(jnp.sum(_outputs(batch, c), -2) for c in calls))
    g = jnp.concatenate(parts, -1)
    return LayerRows(jnp.ones((*g.shape[:-1], 1), g.dtype), g)


_EXTRACT: dict[str, Callable[[_Batch, Use, Sequence[Call]], LayerRows]] = {
    "dense": _dense,
    "patches": _patches,
    "index": _index,
    "swapped": _swapped,
    "elementwise": _elementwise,
}


def _inputs(batch: _Batch, captured: Call) -> Array:
    call, x = captured.call, captured.x
    x = x if call.form == "index" else x.astype(batch.tag.dtype)
    return _by_example(batch, captured, x, x.ndim - call.input_ndim, call.inner_ndim)


def _outputs(batch: _Batch, captured: Call, *, flat: bool = True) -> Array:
    call, y = captured.call, captured.y.astype(batch.tag.dtype)
    added = y.ndim - call.output_ndim
    if call.output_axes:
        y = y.transpose(*range(added), *(added + axis for axis in call.output_axes))
    y = _by_example(batch, captured, y, added, call.output_inner_ndim)
    return y.reshape(*y.shape[: y.ndim - call.output_inner_ndim], -1) if flat else y


def _by_example(
    batch: _Batch, captured: Call, x: Array, added: int, inner_ndim: int
) -> Array:
    """Brings an input or cotangent to ``(*stack, N, T, *inner)``, chosen examples."""
    # Examples may lie behind axes of positions: time-major, or those of a scan.
    tag, num_examples, draw = batch
    axis = captured.axis
    start = len(tag.stack) - (captured.call.groups > 1)
    end = x.ndim - inner_ndim
    if axis is None or axis == -1:
        # Axes of transforms that do not stack parameters are positions.
        axis = added if added > len(tag.stack) - tag.batch_ndim else start
        sizes = x.shape[start:end]
        if axis < end and x.shape[axis] != num_examples and num_examples in sizes:
            axis = start + sizes.index(num_examples)
    x = jnp.moveaxis(x, axis, start) if start < axis < end else x
    shape = (*x.shape[:start], num_examples, -1, *x.shape[end:])
    return draw.pick(x.reshape(shape), start)


def _choose(batch: _Batch, use: Use) -> Array | None:
    """Chooses positions of each example, shape ``(N, kept)``; None for all of them."""
    if use.kept == use.positions:
        return None
    draw, count = batch.draw, batch.num_chosen
    if draw.rng is None:
        start = draw.turn if draw.turn is not None else jnp.arange(count)
    else:
        start = jax.random.randint(draw.own(draw.rng), (count,), 0, use.positions)
    # Evenly spread from there on, so that every position is as likely.
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
        parts = zip(
            (rows.a.top, rows.a.bottom), split_rows(rows.a, rows.g), strict=True
        )
        halves = [merge_columns(LayerRows(a, g)) for a, g in parts]
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
    """Returns a layer's calls from ``Root.calls`` and `probe_calls` of one run."""
    found = []
    for root, path, name, axes in tag.sites:
        calls = zip(captured[root][path], cotangents[root][path], strict=True)
        own = [(call, x, y) for (call, (x,)), y in calls if call.params[:1] == (name,)]
        found += [Call(*call, axis) for call, axis in zip(own, axes, strict=True)]
    return found
