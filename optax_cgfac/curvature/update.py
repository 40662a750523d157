"""One update's rows: a few examples forward and backward through the model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.capture.call import probe_calls
from optax_cgfac.capture.discover import Discovery, discover
from optax_cgfac.capture.run import run_captured
from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.curvature.history import gathered
from optax_cgfac.layers.extract import Draw, calls_of, example_rows, merge_columns
from optax_cgfac.problem.batch import num_kept, strided_examples, strided_indices
from optax_cgfac.problem.objective import Kind, Objective, cotangents
from optax_cgfac.utils.devices import axis_size, own_key, per_device
from optax_cgfac.utils.types import Array, LayerRows, PyTree, user_inputs

# Of the draws that are made without a user's key: one that no user has by chance.
_SEED = 0xCFAC


class CaptureOptions(NamedTuple):
    """What `fisher_estimator` was told about captures; see there."""

    objective: Objective
    kind: Kind
    examples: int
    samples: int
    whole_batch: bool


def captured_rows(
    options: CaptureOptions,
    curvature: Curvature,
    function: Callable[..., PyTree],
    params: PyTree,
    inputs: PyTree,
    rng: Array | None,
    targets: PyTree,
) -> Curvature:
    """Adds rows of a few of the examples to a curvature.

    Args:
      options: The options.
      curvature: The curvature.
      function: The model.
      params: Its parameters.
      inputs: The batch.
      rng: A key, or None to take turns.
      targets: The targets of the batch, for the empirical Fisher.

    Returns:
      The curvature with one update more.
    """
    objective = options.objective
    axis_name = objective.axis_name
    count = per_device("examples", options.examples, axis_name)
    batched = curvature.spec.batched
    num_examples = num_kept(inputs, batched)
    if rng is None:
        # Without randomness the choice of examples and positions cycles; what cannot
        # do without is the same in every run.
        start, sample_rng, position_rng = curvature.num_updates, None, None
        fixed = jax.random.fold_in(jax.random.key(_SEED), curvature.num_updates)
        sign_rng, entry_rng = jax.random.split(own_key(fixed, axis_name))
    else:
        keys = jax.random.split(own_key(rng, axis_name), 5)
        start_rng, sample_rng, position_rng, sign_rng, entry_rng = keys
        # One draw where `randint` takes three, and as good as uniform.
        start = (jax.random.bits(start_rng) % num_examples).astype(jnp.int32)
    indices = strided_indices(start, count, num_examples)
    is_target = [True] * len(jax.tree.leaves(targets))
    few_targets = strided_examples(targets, is_target, start, count)
    seen, captured, examples = inputs, num_examples, indices
    if not options.whole_batch:
        seen, captured = strided_examples(inputs, batched, start, count), count
        examples = None

    cycle = curvature.num_updates // (num_examples // count)
    discovery = discover_few(function, params, seen, captured)

    def forward(probes):
        capture = run_captured(
            function, (params, seen), probes, lifted=discovery.lifted
        )
        return capture.outputs, [root.calls for root in capture.roots]

    outputs, backward, calls = jax.vjp(forward, discovery.probes, has_aux=True)
    all_heads = objective.heads(outputs)
    draw = Draw(position_rng, indices + cycle, examples, entry_rng)
    heads = [draw.pick(head, 0) for head in all_heads]
    precise = [head.astype(_at_least_float32(head)) for head in heads]

    def rows_of(tangents: Sequence[Array], column: Array | int) -> dict[str, LayerRows]:
        # The columns of an example share its positions, and nothing else.
        own = draw._replace(entries=jax.random.fold_in(entry_rng, column))
        cast = [
            draw.place(t.astype(head.dtype), head)
            for t, head in zip(tangents, all_heads, strict=True)
        ]
        cotangent = jax.tree.unflatten(jax.tree.structure(outputs), cast)
        by_call = probe_calls(*backward(cotangent))
        return {
            tag.name: example_rows(
                tag, calls_of(tag, calls, by_call), captured, own.of_part(number)
            )
            for number, tag in enumerate(curvature.tags)
        }

    columns = cotangents(
        objective,
        options.kind,
        precise,
        objective.scales(user_inputs(inputs), heads, indices, num_examples),
        factor=objective.factor(num_examples * axis_size(axis_name)),
        samples=options.samples,
        rng=sample_rng,
        targets=few_targets,
    )
    if options.kind != "mc" and any(tag.sharing > 1 for tag in curvature.tags):
        columns = _with_random_signs(columns, sign_rng)
    if columns[0].shape[0] == 1:
        new = rows_of([column[0] for column in columns], 0)
    else:
        numbers = jnp.arange(columns[0].shape[0])
        by_column = jax.vmap(rows_of)(list(columns), numbers)
        new = {name: merge_columns(x) for name, x in by_column.items()}
    new = {
        tag.name: gathered(new[tag.name], curvature.spec.rows_dtype_of(tag), axis_name)
        for tag in curvature.tags
    }
    return curvature.push_rows(new)


def discover_few(
    function: Callable[..., PyTree], params: PyTree, few: PyTree, count: int
) -> Discovery:
    """Finds the layers in a run on ``count`` examples.

    Args:
      function: The model.
      params: Its parameters.
      few: Its inputs, cut to ``count`` examples.
      count: Their number.

    Returns:
      What was found.

    Raises:
      ValueError: If the outputs are of another number of examples.
    """
    discovery = discover(function, params, few)
    got = jax.tree.leaves(discovery.outputs)[0].shape
    if got[:1] != (count,):
        raise ValueError(
            f"With {count} examples sliced from inputs the outputs have shape "
            f"{got}. Say which leaves of inputs have an axis of examples: "
            "fisher_estimator(..., input_axes=...)."
        )
    return discovery


def _with_random_signs(columns: Sequence[Array], rng: Array) -> list[Array]:
    """Gives the cotangents of every example and column a random sign.

    In a layer whose input all examples share, their cotangents arrive added up; with
    independent signs, as with independent draws, the cross terms of squares vanish in
    the mean. Squares of a single example do not see its sign.

    Returns:
      Arrays like ``columns``.
    """
    signs = jax.random.rademacher(rng, columns[0].shape[:2])
    return [
        x * signs.reshape(*x.shape[:2], *([1] * (x.ndim - 2))).astype(x.dtype)
        for x in columns
    ]


def _at_least_float32(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
