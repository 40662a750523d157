"""Which leaves of the inputs hold examples, and slices of a few of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac.utils.devices import own_key
from optax_cgfac.utils.types import Array, ModuleInputs, PyTree
from optax_cgfac.utils.validate import check_alike, leaf_types, summarize


def check_input_axes(input_axes: PyTree) -> None:
    """Checks that ``input_axes`` holds 0 and None only, or is ``"auto"``."""
    axes = jax.tree.leaves(input_axes)
    if input_axes != "auto" and any(type(x) is not int or x != 0 for x in axes):
        raise ValueError(
            "input_axes must be 'auto' or a pytree prefix of inputs with 0 and None, "
            f"got {input_axes!r}. Bring examples to the first axis, and pass "
            "{'x': 0, 'scale': None}, say."
        )


def batched_leaves(
    inputs: PyTree, num_examples: int, input_axes: PyTree
) -> tuple[bool, ...]:
    """Returns for every leaf of ``inputs`` whether its first axis is examples."""
    if isinstance(inputs, ModuleInputs):
        # A statistic or a key has no examples, whatever its length.
        rest = (False,) * len(jax.tree.leaves(inputs.rest))
        return rest + batched_leaves(inputs.args[0], num_examples, input_axes)
    leaves = jax.tree.leaves(inputs)
    fits = tuple(jnp.shape(leaf)[:1] == (num_examples,) for leaf in leaves)
    if isinstance(input_axes, str):
        batched = fits
    else:
        is_none = {"is_leaf": lambda axis: axis is None}
        axes = jax.tree.broadcast(input_axes, inputs, **is_none)
        batched = tuple(axis == 0 for axis in jax.tree.leaves(axes, **is_none))
    wrong = [b and not fit for b, fit in zip(batched, fits, strict=True)]
    if any(wrong) or not any(batched):
        raise ValueError(
            f"The model's outputs have {num_examples} examples on their first axis, so "
            "must the leaves of inputs with input_axes 0, at least one of them; got "
            f"shapes {[jnp.shape(leaf) for leaf in leaves]} with input_axes "
            f"{input_axes!r}. Bring the batch to the first axis of inputs and outputs, "
            "and write None for leaves without examples."
        )
    return batched


def check_examples(
    inputs: PyTree, batched: Sequence[bool], model_inputs: PyTree, captured: int
) -> int:
    """Returns the number of examples in ``inputs``, checked against ``init``'s."""
    check_alike(
        "A leaf of inputs has another name, shape or dtype than at estimator.init",
        _example_types(model_inputs, batched),
        _example_types(inputs, batched),
        "Pass inputs like those, or initialise a new curvature.",
    )
    leaves = zip(jax.tree.leaves(inputs), batched, strict=True)
    sizes = sorted({jnp.shape(leaf)[0] for leaf, is_batched in leaves if is_batched})
    if len(sizes) != 1:
        raise ValueError(
            f"Leaves of inputs must agree on the number of examples, got {sizes}. Pass "
            "fisher_estimator(..., input_axes=...) if some of them have no examples."
        )
    check_enough(sizes[0], captured, num_kept(model_inputs, batched))
    return sizes[0]


def _example_types(inputs: PyTree, batched: Sequence[bool]) -> dict[str, str]:
    """Returns the types of leaves, with one example where there are several."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: inputs))
    if len(leaves) != len(batched):
        return leaf_types(inputs)
    one = [
        jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) if b and x.ndim else x
        for x, b in zip(leaves, batched, strict=True)
    ]
    return leaf_types(jax.tree.unflatten(structure, one))


def check_enough(num_examples: int, captured: int, kept: int = 1) -> None:
    """Checks that a batch has the examples that are captured and kept of it."""
    if num_examples < max(captured, kept, 1):
        raise ValueError(
            f"The batch must hold examples={captured}, and those that the quadratic "
            f"model keeps ({kept}); got {num_examples}. Drop smaller batches, or pass "
            "fewer examples and model_examples to fisher_estimator."
        )


def check_targets(
    targets: PyTree, num_examples: int, num_outputs: int | None, is_needed: bool
) -> None:
    """Checks that targets belong to the batch, a tuple if ``num_outputs`` is given."""
    if (targets is not None) != is_needed:
        raise ValueError(
            "kind='empirical' needs targets, and other kinds take none; got "
            f"targets={summarize(targets)}. Pass targets=batch_targets with it only."
        )
    if is_needed and num_outputs and len(targets) != num_outputs:
        raise ValueError(
            f"targets must be a tuple of {num_outputs}, as the losses are; got "
            f"{summarize(targets)}. Pass targets=(targets_of_first, ...)."
        )
    for leaf in jax.tree.leaves(targets):
        if jnp.shape(leaf)[:1] != (num_examples,):
            raise ValueError(
                f"targets have shape {jnp.shape(leaf)}; expected the {num_examples} "
                "examples of inputs on the first axis. Pass the targets of this batch."
            )


def num_kept(model_inputs: PyTree, batched: Sequence[bool]) -> int:
    """Returns the number of examples in the slice that the curvature holds."""
    leaves = zip(jax.tree.leaves(model_inputs), batched, strict=True)
    return next(leaf.shape[0] for leaf, is_batched in leaves if is_batched)


# Seeds the draws of updates without a key; no user has it by chance.
_SEED = 0xCFAC


def choose(
    rng: Array | None, num_updates: Array, num_examples: int, axis_name: str | None
) -> tuple[Array, list[Any]]:
    """Returns the first example, and keys for targets, positions, signs, entries."""
    if rng is None:
        # Examples and positions cycle. Signs and entries must be random, and are the
        # same in every run.
        fixed = jax.random.fold_in(jax.random.key(_SEED), num_updates)
        return num_updates, [None, None, *jax.random.split(own_key(fixed, axis_name))]
    start_rng, *keys = jax.random.split(own_key(rng, axis_name), 5)
    # One random number where `randint` takes three; nearly uniform.
    return (jax.random.bits(start_rng) % num_examples).astype(jnp.int32), keys


def strided_indices(start: Array, count: int, num_examples: int) -> Array:
    """Returns ``count`` distinct examples, evenly spread, one of them ``start``."""
    # Spread, because a batch may be sorted (by class, by length), and so that every
    # device has some of them if the batch is split over devices.
    stride = num_examples // count
    if num_examples % count:
        return (start + jnp.arange(count) * stride) % num_examples
    return start % stride + jnp.arange(count) * stride


def strided_examples(
    inputs: PyTree, batched: Sequence[bool], start: Array, count: int
) -> PyTree:
    """Returns ``inputs`` with only the examples of `strided_indices`, copied."""

    def pick(leaf: Array) -> Array:
        num_examples, *rest = leaf.shape
        if num_examples % count:
            return leaf[strided_indices(start, count, num_examples)]
        # A slice of a batch that is split over devices stays split; the result of a
        # gather would be sent to every device.
        stride = num_examples // count
        columns = leaf.reshape(count, stride, *rest)
        return jax.lax.dynamic_index_in_dim(columns, start % stride, 1, keepdims=False)

    return _map_batched(pick, inputs, batched)


def slice_examples(inputs: PyTree, batched: Sequence[bool], indices: Array) -> PyTree:
    """Returns ``inputs`` with only the examples at ``indices``, copied."""
    return _map_batched(lambda leaf: leaf[indices], inputs, batched)


def _map_batched(function, inputs: PyTree, batched: Sequence[bool]) -> PyTree:
    leaves, structure = jax.tree.flatten(inputs)
    sliced = [
        # A copy: a caller may donate both the batch or module and the slice.
        function(jnp.asarray(leaf)) if is_batched else jnp.copy(leaf)
        for leaf, is_batched in zip(leaves, batched, strict=True)
    ]
    return jax.tree.unflatten(structure, sliced)
