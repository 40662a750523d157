"""One update's rows: a few examples forward and backward through the model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import probe_calls
from optax_cgfac.capture.discover import Discovery, discover
from optax_cgfac.capture.nnx.module import check_same_module
from optax_cgfac.capture.run import run_captured
from optax_cgfac.curvature.curvature import Curvature, check_rows
from optax_cgfac.curvature.history import gathered
from optax_cgfac.curvature.spec import CaptureSpec
from optax_cgfac.layers.extract import Draw, calls_of, example_rows, merge_columns
from optax_cgfac.problem.batch import (
    check_examples,
    check_targets,
    choose,
    num_kept,
    strided_examples,
    strided_indices,
)
from optax_cgfac.problem.objective import Kind, cotangents, with_random_signs
from optax_cgfac.utils.devices import axis_size, per_device
from optax_cgfac.utils.types import Array, LayerRows, PyTree, user_inputs
from optax_cgfac.utils.validate import summarize


def updated(
    curvature: Curvature, params: PyTree, inputs: PyTree, rng: Any, targets: PyTree
) -> Curvature:
    """Returns the curvature after one update, whether or not it captures rows."""
    spec = curvature.spec

    def capture() -> Curvature:
        return captured_rows(curvature, params, inputs, rng, targets)

    every = spec.capture_every or 1
    # Every update counts until the window is full.
    due = (curvature.num_updates < spec.window) | (curvature.num_calls % every == 0)
    updated = capture() if every == 1 else jax.lax.cond(due, capture, lambda: curvature)
    # Of this batch, the one of the gradient: examples of an older batch are fitted
    # already, and the quadratic model would promise too much.
    count = curvature.num_calls + 1
    kept = num_kept(curvature.model_inputs, spec.batched)
    model_inputs = strided_examples(inputs, spec.batched, count, kept)
    return dataclasses.replace(updated, num_calls=count, model_inputs=model_inputs)


def captured_rows(
    curvature: Curvature, params: PyTree, inputs: PyTree, rng: Any, targets: PyTree
) -> Curvature:
    """Adds rows of a few of the examples to a curvature of `fisher_estimator`."""
    spec = curvature.spec
    function: Any = spec.model_fn
    objective: Any = spec.objective
    axis_name = objective.axis_name
    count = per_device("examples", spec.examples, axis_name)
    num_examples = num_kept(inputs, spec.batched)
    start, keys = choose(rng, curvature.num_updates, num_examples, axis_name)
    target_rng, position_rng, sign_rng, entry_rng = keys
    indices = strided_indices(start, count, num_examples)
    if spec.whole_batch:
        seen, captured, examples = inputs, num_examples, indices
    else:
        seen = strided_examples(inputs, spec.batched, start, count)
        captured, examples = count, None
    discovery = discover_few(function, params, seen, captured)

    def forward(probes):
        args = (params, seen)
        capture = run_captured(function, args, probes, lifted=discovery.lifted)
        return capture.outputs, [root.calls for root in capture.roots]

    returned, backward, calls = jax.vjp(forward, discovery.probes, has_aux=True)
    outputs = objective.outputs(returned)
    cycle = curvature.num_updates // (num_examples // count)
    draw = Draw(position_rng, indices + cycle, examples, entry_rng)
    few = [draw.pick(output, 0) for output in outputs]
    is_target = [True] * len(jax.tree.leaves(targets))
    columns = cotangents(
        objective,
        spec.kind,
        [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in few],
        objective.scales(user_inputs(inputs), few, indices, num_examples),
        factor=objective.factor(num_examples * axis_size(axis_name)),
        rng=target_rng,
        targets=strided_examples(targets, is_target, start, count),
    )
    if spec.kind != "mc" and any(tag.sharing > 1 for tag in spec.tags):
        columns = with_random_signs(columns, sign_rng)

    structure = jax.tree.structure(returned)

    def rows_of(tangents: Sequence[Array], column: Array | int) -> dict[str, LayerRows]:
        # The columns of an example share its positions, but not the sampled entries.
        own = draw._replace(entries=jax.random.fold_in(entry_rng, column))
        cast = [
            draw.place(t.astype(output.dtype), output)
            for t, output in zip(tangents, outputs, strict=True)
        ]
        by_call = probe_calls(*backward(jax.tree.unflatten(structure, cast)))
        return {
            tag.name: example_rows(
                tag, calls_of(tag, calls, by_call), captured, own.of_part(number)
            )
            for number, tag in enumerate(spec.tags)
        }

    new = _all_columns(rows_of, columns)
    dtypes = {tag.name: spec.rows_dtype_of(tag) for tag in spec.tags}
    return curvature.push_rows(
        {name: gathered(new[name], dtypes[name], axis_name) for name in dtypes}
    )


def _all_columns(
    rows_of: Callable[..., dict[str, LayerRows]], columns: Sequence[Array]
) -> dict[str, LayerRows]:
    """Returns the rows of all columns of cotangents."""
    if columns[0].shape[0] == 1:
        return rows_of([column[0] for column in columns], 0)
    numbers = jnp.arange(columns[0].shape[0])
    by_column = jax.vmap(rows_of)(list(columns), numbers)
    return {name: merge_columns(rows) for name, rows in by_column.items()}


def discover_few(
    function: Callable[..., PyTree], params: PyTree, few: PyTree, count: int
) -> Discovery:
    """Finds the layers in a run on inputs that hold ``count`` examples."""
    discovery = discover(function, params, few)
    got = jax.tree.leaves(discovery.outputs)[0].shape
    if got[:1] != (count,):
        raise ValueError(
            f"With {count} examples sliced from inputs the outputs have shape {got}. "
            "Pass fisher_estimator(..., input_axes=...)."
        )
    return discovery


def check_key(rng: Any, kind: Kind, inputs: PyTree) -> None:
    """Checks that there is a key where one is needed, and that it is not shared."""
    if rng is None and kind == "mc":
        raise ValueError(
            "kind='mc' draws targets from the model and needs a key, got None: pass "
            "rng=jax.random.fold_in(key, step), a new key for every update."
        )
    if rng is not None and any(leaf is rng for leaf in jax.tree.leaves(inputs)):
        raise ValueError(
            "rng must be a key of its own, got one that inputs hold too, which gives "
            "equal draws. Split it before, key, rng = jax.random.split(key)."
        )


def check_curvature(
    options: CaptureSpec, model_fn: Callable[..., PyTree], curvature: Curvature
) -> None:
    """Checks that a curvature is this estimator's."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "estimator.update takes the Curvature that estimator.init returned, got "
            f"{summarize(curvature)}. Call estimator.update(curvature, params, inputs)."
        )
    if not curvature.spec.is_from(options, model_fn):
        check_same_module(curvature.spec.model_fn, model_fn)
        raise ValueError(
            "estimator.update needs a curvature of its own estimator, got one that "
            "comes from another estimator or from value_and_grad. Call "
            "estimator.init(params, inputs) of the one that updates it, made once."
        )
    check_rows(curvature)


def check_batch(curvature: Curvature, inputs: PyTree, targets: PyTree) -> None:
    """Checks inputs and targets against those of ``init``."""
    spec, objective = curvature.spec, curvature.spec.objective
    captured = per_device("examples", spec.examples, objective.axis_name)
    kept = curvature.model_inputs
    num_examples = check_examples(inputs, spec.batched, kept, captured)
    is_needed = spec.kind == "empirical"
    check_targets(targets, num_examples, objective.num_targets, is_needed)
