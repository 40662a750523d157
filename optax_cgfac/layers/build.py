"""Makes tags of the layers that discovery found, and explains what has no tag."""

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
    LayerTag,
    Use,
    find_problem,
    num_positions,
)
from optax_cgfac.utils.paths import Path, leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree

Where = Callable[[str], bool]


class RowOptions(NamedTuple):
    """How many rows a layer gets."""

    num_examples: int  # of a captured batch
    examples: int | None = None  # how many of them become rows; None for all
    columns: int = 1  # cotangents per example
    positions: int | None = 1  # of each example that become rows; None for all
    reduce: bool = False  # whether all positions of an example go into one row
    shares: bool = False  # whether layers whose input all examples share are covered
    sharing: int = 1  # examples that share the layer's calls

    @property
    def num_chosen(self) -> int:
        """Examples that become rows."""
        return self.num_examples if self.examples is None else self.examples


def make_tags(
    discovery: Discovery,
    params: PyTree,
    options: RowOptions,
    *,
    where: Where | None,
    fallback: bool,
) -> tuple[tuple[LayerTag, ...], tuple[tuple[Path, str], ...]]:
    """Builds the tags, and the list of parameters without one.

    Returns:
      The tags in the order of the parameter tree, and the uncovered parameters
      with the reason of each.
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
        layer, visit = discovery.layers[anchor], discovery.visits.get(anchor[:-1])
        if visit is not None and visit.problem is not None:
            continue
        own = options
        if all(axis == -1 for axis in layer.axes):
            own = options._replace(
                num_examples=1, examples=1, sharing=options.num_chosen
            )
        problem = _problem(layer, leaves[anchor], own)
        present = {role: path for role, path in layer.params.items() if path in kept}
        if problem is not None:
            own_paths = [*layer.params.values(), *layer.clashes.values()]
            problems |= dict.fromkeys(own_paths, problem)
        elif "kernel" in present or (present and layer.call.kernel is None):
            tags.append(_make_tag(layer, present, leaves, own))
        elif present:
            problem = f"where leaves its kernel {text(anchor)!r} out: leave both out"
            problems |= dict.fromkeys(present.values(), problem)
    covered = {leaf for tag in tags for leaf in tag.leaves}
    uncovered = tuple(
        (path, (problems.get(path) or _reason(path, discovery)))
        if path in kept
        else (path, LEFT_OUT)
        for path in leaves
        if path not in covered
    )
    errors = [(path, reason) for path, reason in uncovered if path in kept]
    if errors and not fallback:
        raise ValueError(_uncovered_message(errors))
    names = collections.Counter(tag.name for tag in tags)
    unique = (
        tag if names[tag.name] == 1 else dataclasses.replace(tag, path=tag.leaves[0])
        for tag in tags
    )
    return tuple(unique), uncovered


def _problem(layer: Layer, leaf: Array, options: RowOptions) -> str | None:
    """Returns why a layer's calls do not become rows, or None if they do."""
    if options.sharing > 1 and not options.shares:
        return (
            "its input does not depend on the batch, so that no example has a gradient "
            "of its own in it: fisher_estimator covers it, the single pass cannot"
        )
    if len({axis == -1 for axis in layer.axes}) > 1:
        return "some of its calls depend on the batch and some do not"
    if layer.clashes:
        return "its kernel is shared with a layer that has another bias, or none"
    for call, shape in layer.calls:
        problem = find_problem(call, shape, leaf.shape, options.num_examples)
        if problem:
            return problem
    forms = {call.form for call, _ in layer.calls}
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
) -> LayerTag:
    call, anchor = layer.call, next(iter(present.values()))
    shapes = {role: leaves[path].shape for role, path in present.items()}
    lifted = leaves[anchor].ndim - call.param_ndim
    matrix = _matrix(call, shapes, lifted)
    uses = _uses(layer.calls, lifted + call.batch_ndim, matrix.n_in, options)
    per_example = sum(use.kept for use in uses)
    whole = call.form == "elementwise" or all(use.reduce for use in uses)
    kinds = sorted({call.kind for call, _ in layer.calls})
    # Half precision cannot hold a Gram matrix; float64 parameters keep theirs.
    dtype = jnp.dtype(jnp.promote_types(leaves[anchor].dtype, jnp.float32)).name
    return LayerTag(
        path=anchor[:-1],
        kind="+".join(reversed(kinds)),
        kernel=present.get("kernel"),
        bias=present.get("bias"),
        scale=present.get("scale"),
        **matrix._asdict(),
        positions=1 if whole else sum(use.positions for use in uses),
        columns=options.columns,
        rows_per_step=options.num_chosen * per_example * options.columns,
        dtype=dtype,
        uses=uses,
        shapes=tuple(
            shapes[role] for role in ("kernel", "scale", "bias") if role in shapes
        ),
        sites=tuple(found.site for found in layer.found),
        sharing=options.sharing,
    )


class _Matrix(NamedTuple):
    """The fields of a tag that describe its matrix."""

    stack: tuple[int, ...]
    n_in: int
    n_out: int
    batch_ndim: int = 0
    view: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


def _matrix(
    call: LayerCall, shapes: dict[str, tuple[int, ...]], lifted: int
) -> _Matrix:
    if "kernel" not in shapes:
        stack = next(iter(shapes.values()))[:lifted]
        n_out = sum(math.prod(shape[lifted:]) for shape in shapes.values())
        return _Matrix(stack, 1, n_out)
    stack, view = shapes["kernel"][:lifted], shapes["kernel"][lifted:]
    axes = call.kernel_axes
    if call.groups > 1:
        # Output channels of a group are neighbours: (..., c, o) -> (..., c, groups, o).
        last = len(view) - 1
        view = (*view[:-1], call.groups, view[-1] // call.groups)
        axes = (last, *axes[:-1], last + 1)
    arranged = [view[axis] for axis in axes]
    first = call.batch_ndim + (call.groups > 1)
    last = len(arranged) - call.feature_ndim
    n_in = math.prod(arranged[first:last]) + ("bias" in shapes)
    n_out = math.prod(arranged[last:])
    return _Matrix((*stack, *arranged[:first]), n_in, n_out, first, view, axes)


# From this length of a table on, a row of its transposed use is not kept whole.
_LONG = 2048


def _uses(
    calls: list[tuple[LayerCall, tuple[int, ...]]],
    stack_ndim: int,
    n_in: int,
    options: RowOptions,
) -> tuple[Use, ...]:
    """Sums the calls by form, look-ups first."""
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
    if visit is None:
        return (
            "no module that reads it was met: it is unused, or read below a function "
            "that was jitted before"
        )
    return visit.problem or (
        f"a parameter of {visit.class_name} itself, which is not a known layer: where "
        "the module is yours, tag it with optax_cgfac.tag_layer"
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
