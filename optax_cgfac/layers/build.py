"""From the layers that a run has found to tags, and what has none with the reason."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from optax_cgfac.capture.call import Form, LayerCall
from optax_cgfac.capture.discover import Discovery, Layer
from optax_cgfac.layers.layer import (
    LEFT_OUT,
    CallSite,
    LayerTag,
    Use,
    find_problem,
    num_positions,
)
from optax_cgfac.utils.paths import Path, leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree

Where = Callable[[str], bool]


class RowOptions(NamedTuple):
    """How many rows a layer gets.

    Attributes:
      num_examples: Examples ``N`` of a captured batch.
      examples: How many of them become rows; None for all.
      columns: Cotangents per example.
      positions: Positions of each example that become rows; None for all.
      reduce: Whether all positions of an example go into one row.
      shares: Whether the cotangents of a call that all examples share may be those
        of one example.
      sharing: Examples that share the layer's calls.
    """

    num_examples: int
    examples: int | None = None
    columns: int = 1
    positions: int | None = 1
    reduce: bool = False
    shares: bool = False
    sharing: int = 1

    @property
    def num_rows(self) -> int:
        """Examples that become rows."""
        return self.num_examples if self.examples is None else self.examples


def make_tags(
    discovery: Discovery,
    params: PyTree,
    options: RowOptions,
    *,
    where: Where | None,
    fallback: bool,
    wider: Discovery | None = None,
) -> tuple[tuple[LayerTag, ...], tuple[tuple[Path, str], ...]]:
    """Builds the tags, and the list of parameters without one.

    Args:
      discovery: From `discover`.
      params: The user's parameters, arrays or shapes.
      options: How many rows a tag gets.
      where: Keeps the parameters for which it is true; None keeps all.
      fallback: Whether parameters without a tag are accepted.
      wider: A run on twice as many examples, to tell calls apart that do not depend
        on the batch; None to trust the sizes.

    Returns:
      The tags in the order of the parameter tree, and the uncovered parameters
      with the reason of each.

    Raises:
      ValueError: If a parameter has no tag although ``where`` keeps it and
        ``fallback`` is false, or ``where`` keeps none.
    """
    leaves = leaves_by_path(params)
    kept = {path for path in leaves if where is None or where(text(path))}
    if not kept:
        raise ValueError(
            "where must be true for the parameters to precondition, got false for all "
            f"of them: {', '.join(map(text, leaves))}. Test for a part of such a path, "
            "where=lambda path: 'Dense' in path."
        )
    tags, problems = [], {}
    for anchor in (path for path in leaves if path in discovery.layers):
        layer = discovery.layers[anchor]
        visit = discovery.visits.get(anchor[:-1])
        if visit is not None and not visit.has_rows:
            continue
        own = options
        axes = _example_axes(layer, wider and wider.layers.get(anchor))
        depends = [axis != -1 for own_axes in axes for axis in own_axes]
        if not any(depends):
            own = options._replace(num_examples=1, examples=1, sharing=options.num_rows)
        problem = _problem(layer, leaves[anchor], own)
        if any(depends) and not all(depends):
            problem = "some of its calls depend on the batch and some do not"
        present = {role: path for role, path in layer.params.items() if path in kept}
        if problem is not None:
            own_paths = [*layer.params.values(), *layer.clashes.values()]
            problems |= dict.fromkeys(own_paths, problem)
        elif "kernel" in present or (present and layer.call.kernel is None):
            tags.append(_make_tag(layer, present, leaves, own, axes))
        elif present:
            problem = f"where leaves its kernel {text(anchor)!r} out: leave both out"
            problems |= dict.fromkeys(present.values(), problem)
    covered = {leaf for tag in tags for leaf in tag.leaves}
    uncovered, errors = [], []
    for path in leaves:
        if path in covered:
            continue
        if path not in kept:
            uncovered.append((path, LEFT_OUT))
        else:
            reason = problems.get(path) or _reason(path, discovery)
            uncovered.append((path, reason))
            errors.append((path, reason))
    if errors and not fallback:
        raise ValueError(_uncovered_message(errors))
    names = collections.Counter(tag.name for tag in tags)
    unique = (
        tag if names[tag.name] == 1 else dataclasses.replace(tag, path=tag.leaves[0])
        for tag in tags
    )
    return tuple(unique), tuple(uncovered)


def _example_axes(layer: Layer, wider: Layer | None) -> list[list[int | None]]:
    """Returns for the calls of every source the axis that grows with the batch.

    -1 where none does, as in a call on a table of positions; None without a run on
    another number of examples.
    """
    if wider is None:
        return [[None] * len(source.calls) for source in layer.sources]

    def grown(shape: tuple[int, ...], other: tuple[int, ...]) -> int:
        differ = [
            i
            for i, sizes in enumerate(zip(shape, other, strict=True))
            if sizes[0] != sizes[1]
        ]
        return differ[0] if differ else -1

    return [
        [
            grown(shape, other)
            for (_, shape), (_, other) in zip(x.calls, y.calls, strict=True)
        ]
        for x, y in zip(layer.sources, wider.sources, strict=True)
    ]


def _problem(layer: Layer, leaf: Array, options: RowOptions) -> str | None:
    if options.sharing > 1 and not options.shares:
        return (
            "its input does not depend on the batch, so that no example has a gradient "
            "of its own in it: fisher_estimator covers it, the single pass cannot"
        )
    if layer.clashes:
        return "its kernel is shared with a layer that has another bias, or none"
    for source in layer.sources:
        for call, shape in source.calls:
            problem = find_problem(call, shape, leaf.shape, options.num_examples)
            if problem:
                return problem
    calls = [call for source in layer.sources for call, _ in source.calls]
    forms = {call.form for call in calls}
    if len(forms) > 1 and forms != {"index", "swapped"}:
        return f"its calls are of different forms: {', '.join(sorted(forms))}"
    if "swapped" in forms and "bias" in layer.params:
        return "it is used transposed and has a bias"
    return None


def _make_tag(
    layer: Layer,
    present: dict[str, Path],
    leaves: dict[Path, Array],
    options: RowOptions,
    example_axes: list[list[int | None]],
) -> LayerTag:
    call = layer.call
    anchor = next(iter(present.values()))
    shape = leaves[anchor].shape
    lifted = shape[: len(shape) - call.param_ndim]
    bias, own = present.get("bias"), ()
    view, axes = _kernel_view(call, shape[len(lifted) :])
    if call.kernel is not None:
        batch_ndim = call.batch_ndim + (call.groups > 1)
        arranged = [view[axis] for axis in axes]
        own = tuple(arranged[:batch_ndim])
        columns = call.feature_ndim
        n_out = math.prod(arranged[len(arranged) - columns :])
        n_in = math.prod(arranged[batch_ndim : len(arranged) - columns])
        n_in += bias is not None
    else:
        entries = [
            math.prod(leaves[path].shape[len(lifted) :]) for path in present.values()
        ]
        n_in, n_out, view, axes = 1, sum(entries), (), ()
    stack = (*lifted, *own)
    calls = [found for source in layer.sources for found in source.calls]
    uses = _uses(calls, len(lifted) + call.batch_ndim, n_in, options)
    per_example = sum(use.kept for use in uses)
    whole = call.form == "elementwise" or all(use.reduce for use in uses)
    kinds = sorted({call.kind for call, _ in calls})
    # Half precision cannot hold a Gram matrix; float64 parameters keep theirs.
    dtype = jnp.dtype(jnp.promote_types(leaves[anchor].dtype, jnp.float32)).name
    return LayerTag(
        path=anchor[:-1],
        kind="+".join(reversed(kinds)),
        kernel=present.get("kernel"),
        bias=bias,
        scale=present.get("scale"),
        stack=stack,
        n_in=n_in,
        n_out=n_out,
        positions=1 if whole else sum(use.positions for use in uses),
        columns=options.columns,
        rows_per_step=options.num_rows * per_example * options.columns,
        dtype=dtype,
        batch_ndim=len(own),
        view=view,
        axes=axes,
        uses=uses,
        shapes=tuple(
            tuple(leaves[present[role]].shape)
            for role in ("kernel", "scale", "bias")
            if role in present
        ),
        sources=tuple(
            CallSite(
                source.root,
                source.path,
                source.name,
                tuple(None if axis == -1 else axis for axis in own_axes),
            )
            for source, own_axes in zip(layer.sources, example_axes, strict=True)
        ),
        sharing=options.sharing,
    )


def _kernel_view(
    call: LayerCall, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns a shape of the kernel and its axes as batch, inputs, outputs."""
    axes = call.kernel_axes
    if call.groups == 1:
        return shape, axes
    # Output channels of a group are neighbours: (..., c, o) -> (..., c, groups, o).
    last = len(shape) - 1
    view = (*shape[:-1], call.groups, shape[-1] // call.groups)
    return view, (last, *axes[:-1], last + 1)


# From this length of a table on, a row of its transposed use is not kept whole.
_LONG = 2048


def _uses(
    calls: list[tuple[LayerCall, tuple[int, ...]]],
    stack_ndim: int,
    n_in: int,
    options: RowOptions,
) -> tuple[Use, ...]:
    """Returns how many positions of each form there are, look-ups first."""
    totals: dict[Form, int] = {}
    for call, shape in calls:
        count = num_positions(call, shape, stack_ndim) // options.num_examples
        totals[call.form] = totals.get(call.form, 0) + count
    reduce = options.reduce and "index" not in totals
    uses = []
    for form in sorted(totals):
        total = totals[form]
        is_long = options.positions is not None and n_in > _LONG
        sampled = form == "swapped" and is_long
        if form == "elementwise":
            uses.append(Use(form, total, 1))
        elif reduce and total > 1:
            uses.append(Use(form, total, 1, reduce=True, sampled=sampled))
        else:
            kept = (options.positions or total) * options.sharing
            uses.append(Use(form, total, min(kept, total), sampled=sampled))
    return tuple(uses)


def _reason(path: Path, discovery: Discovery) -> str:
    visit = discovery.visits.get(path[:-1])
    if visit is not None and visit.problem is not None:
        return visit.problem
    if visit is None:
        return (
            "no module that reads it was met: it is unused, or read below a function "
            "that was jitted before"
        )
    if visit.hidden:
        return (
            f"its {visit.class_name} runs below a transform of JAX's own (jax.jit, "
            "checkpoint, vmap, cond, scan), or an outermost nn.jit or nn.remat, inside "
            "model_fn, out of which no rows can be taken; use nn.remat, nn.vmap or "
            "nn.scan inside the model, and jit the whole training step"
        )
    if not visit.liftable:
        return (
            f"its {visit.class_name} runs below a transform that does not carry the "
            "capture's variables: add optax_cgfac.capture_axes() to the variable_axes "
            "of nn.scan or nn.vmap; no other (nn.while_loop, say) can carry them"
        )
    return (
        f"a parameter of {visit.class_name} itself, which is no known layer: where the "
        "module is yours, tag it with optax_cgfac.tag_layer"
    )


def _uncovered_message(errors: list[tuple[Path, str]]) -> str:
    listed = "\n".join(f"  {text(path)}: {reason}" for path, reason in errors)
    arrays = "1 parameter has" if len(errors) == 1 else f"{len(errors)} parameters have"
    return (
        f"{arrays} no curvature:\n{listed}\n"
        "Ways out:\n"
        "  1. where: leave them out, fisher_estimator(..., where=lambda path: ...), "
        "true for the parameters to keep; the others get their plain gradient.\n"
        "  2. fallback: train them by another optimizer, "
        "fisher_estimator(..., fallback=True) with "
        "cgfac(fallback=optax.adam(1e-3), where=curvature.covers).\n"
        "  3. another layer: build them from Flax's own, or tag your layer, "
        "y = optax_cgfac.tag_layer(self, x, y, kernel='kernel')."
    )
