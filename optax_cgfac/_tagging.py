"""Finding layers: one abstract run of the model, matched to the parameter tree."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._layers import LEFT_OUT, LayerCall, LayerTag, find_problem
from optax_cgfac._linen import (
    TAGGED_LAYERS,
    Capture,
    Visit,
    probes_like,
    run_captured,
)
from optax_cgfac._paths import Path, leaves_by_path, text
from optax_cgfac._types import Array, PyTree

Where = Callable[[str], bool]


class Source(NamedTuple):
    """The calls of one layer below one outermost module call."""

    root: int
    path: Path
    calls: tuple[tuple[LayerCall, tuple[int, ...]], ...]  # facts, input shape


class Discovery(NamedTuple):
    """What an abstract run of the user's function found.

    Attributes:
      outputs: Shapes of the outputs.
      sources: Captured layers by the path of their kernel in the parameter tree.
      biases: The path of each kernel's bias.
      visits: The modules that were met, by path in the parameter tree.
      probes: Zero probes for a captured run on arguments of these shapes.
    """

    outputs: PyTree
    sources: dict[Path, list[Source]]
    biases: dict[Path, Path | None]
    visits: dict[Path, Visit]
    probes: tuple[PyTree, ...]


def discover(function: Callable[..., PyTree], params: PyTree, *args: Any) -> Discovery:
    """Runs ``function(params, *args)`` on shapes only and finds its layers.

    Args:
      function: Applies Linen modules.
      params: Its first argument, the parameters.
      *args: Its other arguments.

    Returns:
      The `Discovery`.
    """
    links: list[dict[Path, Path]] = []
    visits: dict[tuple[int, Path], Visit] = {}

    def traced(params, *args):
        capture = run_captured(function, (params, *args))
        # Tracers keep their identity from here into the outermost module call.
        links[:] = _link(params, capture)
        visits.update(capture.visits)
        return capture.outputs, [root.calls for root in capture.roots]

    outputs, roots = jax.eval_shape(traced, params, *args)
    sources: dict[Path, list[Source]] = {}
    biases: dict[Path, Path | None] = {}
    for index, calls in enumerate(roots):
        for path, found in calls.items():
            kernel = links[index].get((*path, "kernel"))
            if kernel is None:
                continue
            shapes = tuple((call, values[0].shape) for call, values in found)
            sources.setdefault(kernel, []).append(Source(index, path, shapes))
            bias = links[index].get((*path, "bias"))
            biases[kernel] = bias if found[0][0].has_bias else None
    probes = probes_like(roots)
    return Discovery(outputs, sources, biases, _by_path(visits, links), probes)


def _link(params: PyTree, capture: Capture) -> list[dict[Path, Path]]:
    """Maps each root's parameter paths to paths in the user's tree."""
    leaves = leaves_by_path(params)
    by_id = {id(leaf): path for path, leaf in leaves.items()}
    links = []
    for root in capture.roots:
        link = {}
        for path, leaf_id in root.leaf_ids.items():
            if leaf_id in by_id:
                link[path] = by_id[leaf_id]
                continue
            # The user cast or rebuilt the leaf on its way: match by name.
            same = [full for full in leaves if full[-len(path) :] == path]
            if len(same) == 1:
                link[path] = same[0]
        links.append(link)
    return links


def _by_path(
    visits: dict[tuple[int, Path], Visit], links: list[dict[Path, Path]]
) -> dict[Path, Visit]:
    found = {}
    for (index, path), visit in visits.items():
        if index >= len(links):
            continue
        for inner, full in links[index].items():
            if inner[: len(path)] == path:
                prefix = full[: len(full) - len(inner) + len(path)]
                found.setdefault(prefix, visit)
                break
    return found


class Rows(NamedTuple):
    """How many rows a tag gets.

    Attributes:
      num_examples: Examples ``N`` that are captured.
      columns: Cotangents per example.
      all_positions: Whether every position becomes a row, or one per example.
    """

    num_examples: int
    columns: int = 1
    all_positions: bool = False


def make_tags(
    discovery: Discovery,
    params: PyTree,
    rows: Rows,
    *,
    where: Where | None,
    fallback: bool,
) -> tuple[tuple[LayerTag, ...], tuple[tuple[Path, str], ...]]:
    """Builds the tags, and the list of parameters without one.

    Args:
      discovery: From `discover`.
      params: The user's parameters, arrays or shapes.
      rows: How many rows a tag gets.
      where: Keeps the parameters for which it is true; None keeps all.
      fallback: Whether parameters without a tag are accepted.

    Returns:
      The tags in the order of the parameter tree, and the uncovered parameters
      with the reason of each.

    Raises:
      ValueError: If a parameter has no tag although ``where`` keeps it and
        ``fallback`` is false.
    """
    leaves = leaves_by_path(params)
    _check_floating(leaves)
    kept = {path for path in leaves if where is None or where(text(path))}
    tags, problems = [], {}
    for kernel in (path for path in leaves if path in discovery.sources):
        bias = discovery.biases[kernel]
        problem = _problem(discovery.sources[kernel], leaves[kernel], rows)
        if problem is None and kernel in kept:
            bias = bias if bias in kept else None
            tags.append(_make_tag(kernel, bias, discovery, leaves, rows))
        elif problem is not None:
            problems[kernel] = problem
            if bias is not None:
                problems[bias] = problem
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
    return tuple(tags), tuple(uncovered)


def calls_of(
    tag: LayerTag,
    captured: list[dict[Path, list[Any]]],
    cotangents: list[dict[Path, list[Array]]],
) -> list[tuple[LayerCall, Array, Array]]:
    """Returns facts, input and output cotangent of every call of one layer.

    Args:
      tag: The layer.
      captured: ``Root.calls`` of every root of a captured run.
      cotangents: Of the same run's probes, from `probe_calls`.
    """
    return [
        (call, a, g)
        for root, path in tag.sources
        for (call, (a,)), g in zip(
            captured[root][path], cotangents[root][path], strict=True
        )
    ]


def _problem(sources: list[Source], kernel: Array, rows: Rows) -> str | None:
    for source in sources:
        for call, shape in source.calls:
            problem = find_problem(call, shape, kernel.shape, rows.num_examples)
            if problem:
                return problem
    return None


def _make_tag(
    kernel: Path,
    bias: Path | None,
    discovery: Discovery,
    leaves: dict[Path, Array],
    rows: Rows,
) -> LayerTag:
    sources = discovery.sources[kernel]
    first = sources[0].calls[0][0]
    leaf = leaves[kernel]
    stack = leaf.shape[: leaf.ndim - first.contract_ndim - first.feature_ndim]
    n_out = math.prod(leaf.shape[leaf.ndim - first.feature_ndim :])
    n_in = math.prod(leaf.shape[len(stack) : leaf.ndim - first.feature_ndim])
    num_inputs = sum(
        math.prod(shape[len(stack) : -1])
        for source in sources
        for _, shape in source.calls
    )
    positions = num_inputs // rows.num_examples
    per_example = rows.columns * (positions if rows.all_positions else 1)
    # Half precision cannot hold a Gram matrix; float64 parameters keep theirs.
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return LayerTag(
        path=kernel[:-1],
        kind=first.kind,
        kernel=kernel,
        bias=bias,
        stack=tuple(stack),
        n_in=n_in + (bias is not None),
        n_out=n_out,
        positions=positions,
        columns=rows.columns,
        rows_per_step=rows.num_examples * per_example,
        dtype=jnp.dtype(dtype).name,
        sources=tuple((source.root, source.path) for source in sources),
    )


def _check_floating(leaves: dict[Path, Array]) -> None:
    if not leaves:
        raise ValueError("params has no leaves: there is nothing to precondition.")
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Parameter {text(path)!r} has dtype {jnp.result_type(leaf).name}; "
                "parameters must be real floating-point arrays. Pass counters and "
                "statistics inside inputs."
            )


def _reason(path: Path, discovery: Discovery) -> str:
    visit = discovery.visits.get(path[:-1])
    if visit is None:
        return (
            "no module that reads it was met: it is unused, or read below a function "
            "that was jitted before"
        )
    if visit.hidden:
        return (
            f"its {visit.class_name} runs below a jax.jit, vmap, cond or scan (or an "
            "outermost nn.jit or nn.remat) inside model_fn, out of which no rows can "
            "be taken; jit the whole training step instead"
        )
    if not visit.liftable:
        return (
            f"its {visit.class_name} runs below a transform that does not carry the "
            "capture's variables: add optax_cgfac.capture_axes() to the variable_axes "
            "of nn.scan or nn.vmap"
        )
    return (
        f"a parameter of {visit.class_name}; tagged layers are "
        f"{', '.join(TAGGED_LAYERS)}"
    )


def _uncovered_message(errors: list[tuple[Path, str]]) -> str:
    listed = "\n".join(f"  {text(path)}: {reason}" for path, reason in errors)
    return (
        f"{len(errors)} parameters have no curvature:\n{listed}\n"
        "Ways out:\n"
        "  1. where: leave them out, fisher_estimator(..., where=lambda path: ...), "
        "true for the parameters to keep; the others get their plain gradient.\n"
        "  2. fallback: train them by another optimizer, "
        "fisher_estimator(..., fallback=True) with "
        "cgfac(fallback=optax.adam(1e-3), where=curvature.covers).\n"
        f"  3. another layer: build them from {' or '.join(TAGGED_LAYERS)}."
    )
