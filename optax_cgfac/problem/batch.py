"""Which leaves of the inputs hold examples, and slices of a few of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_cgfac.utils.types import Array, ModuleInputs, PyTree
from optax_cgfac.utils.validate import summarize


def check_input_axes(input_axes: PyTree) -> None:
    """Checks that ``input_axes`` holds 0 and None only, or is ``"auto"``."""
    for axis in jax.tree.leaves(input_axes, is_leaf=_is_none):
        is_zero = type(axis) is int and axis == 0
        if axis is not None and not is_zero and input_axes != "auto":
            raise ValueError(
                "input_axes must be 'auto' or a pytree prefix of inputs with 0 and "
                f"None, got {summarize(axis)} in it. Bring examples to the first axis, "
                "and pass {'x': 0, 'scale': None}, say."
            )


def batched_leaves(
    inputs: PyTree, num_examples: int, input_axes: PyTree
) -> tuple[bool, ...]:
    """Returns for every leaf of ``inputs`` whether its first axis is examples.

    Args:
      inputs: The inputs of the model, any pytree.
      num_examples: Length of the first axis of the model's outputs.
      input_axes: A prefix of ``inputs`` with 0 or None, or ``"auto"``.

    Returns:
      One bool per leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: If no leaf has an axis of examples, one that should has another
        length, or ``input_axes`` is not a prefix.
    """
    if isinstance(inputs, ModuleInputs):
        # A statistic or a key has no examples, whatever its length.
        rest = (False,) * len(jax.tree.leaves(inputs.rest))
        return rest + batched_leaves(inputs.args[0], num_examples, input_axes)
    leaves = jax.tree.leaves(inputs)
    fits = tuple(jnp.shape(leaf)[:1] == (num_examples,) for leaf in leaves)
    if isinstance(input_axes, str):
        batched = fits
    else:
        try:
            axes = jax.tree.broadcast(input_axes, inputs, is_leaf=_is_none)
        except ValueError:
            raise ValueError(
                "input_axes must be a pytree prefix of inputs with 0 and None.\n"
                f"  expected: a prefix of {jax.tree.structure(inputs)}\n"
                f"  got:      {input_axes!r}\n"
                "Write 0 or None for every leaf, or for a whole subtree."
            ) from None
        batched = tuple(axis == 0 for axis in jax.tree.leaves(axes, is_leaf=_is_none))
    for leaf, is_batched, fit in zip(leaves, batched, fits, strict=True):
        if is_batched and not fit:
            raise ValueError(
                f"A leaf of inputs with input_axes 0 has shape {jnp.shape(leaf)}, but "
                f"the outputs have {num_examples} examples on their first axis. Write "
                "None for it if it has no axis of examples."
            )
    if not any(batched):
        raise ValueError(
            f"The model's outputs have {num_examples} examples on their first axis, "
            "and no leaf of inputs has a first axis of that length; shapes of inputs: "
            f"{[jnp.shape(leaf) for leaf in leaves]}. The first axis of inputs and "
            "outputs must be the batch."
        )
    return batched


def check_examples(
    inputs: PyTree, batched: Sequence[bool], model_inputs: PyTree, captured: int
) -> int:
    """Returns the number of examples in ``inputs``, checked against ``init``'s."""
    structure, expected = jax.tree.structure(inputs), jax.tree.structure(model_inputs)
    if structure != expected:
        raise ValueError(
            "inputs must have the structure that estimator.init was given.\n"
            f"  expected: {expected}\n  got:      {structure}\n"
            "Pass the same tree at every update, or initialise a new curvature."
        )
    sizes = set()
    leaves = zip(
        jax.tree.leaves(inputs), jax.tree.leaves(model_inputs), batched, strict=True
    )
    for leaf, kept_leaf, is_batched in leaves:
        # A slice of the examples has the shape of all but the first axis.
        likes = [
            f"{jnp.result_type(x)} {('N',) * is_batched + jnp.shape(x)[is_batched:]}"
            for x in (kept_leaf, leaf)
        ]
        if likes[0] != likes[1]:
            raise ValueError(
                "A leaf of inputs has another shape or dtype than at estimator.init.\n"
                f"  expected: {likes[0]}\n  got:      {likes[1]}\n"
                "Pass inputs like those, or initialise a new curvature."
            )
        if is_batched:
            sizes.add(jnp.shape(leaf)[0])
    if len(sizes) != 1:
        raise ValueError(
            "Leaves of inputs must agree on the number of examples, got "
            f"{sorted(sizes)}. Pass fisher_estimator(..., input_axes=...) if some of "
            "them have no examples."
        )
    (num_examples,) = sizes
    check_enough(num_examples, captured, num_kept(model_inputs, batched))
    return num_examples


def check_enough(num_examples: int, captured: int, kept: int = 1) -> None:
    """Checks that a batch has the examples that are captured and kept of it."""
    if num_examples < max(captured, kept, 1):
        raise ValueError(
            f"The batch has {num_examples} examples; the estimator captures "
            f"examples={captured}, and the curvature keeps {kept} for the quadratic "
            "model. Drop smaller batches, or pass fewer examples and model_examples to "
            "fisher_estimator."
        )


def check_targets(targets: PyTree, num_examples: int, num_outputs: int | None) -> None:
    """Checks that targets belong to the batch, a tuple if ``num_outputs`` is given."""
    is_tuple = isinstance(targets, (tuple, list))
    if num_outputs is not None and (not is_tuple or len(targets) != num_outputs):
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


def _is_none(axis: object) -> bool:
    return axis is None


def num_kept(model_inputs: PyTree, batched: Sequence[bool]) -> int:
    """Returns the number of examples in the slice that the curvature holds."""
    leaves = zip(jax.tree.leaves(model_inputs), batched, strict=True)
    return next(leaf.shape[0] for leaf, is_batched in leaves if is_batched)


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
