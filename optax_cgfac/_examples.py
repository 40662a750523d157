"""Which leaves of the inputs hold examples, and slices of a few of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_cgfac._types import Array, ModuleInputs, PyTree


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
        length, or ``input_axes`` is no prefix with 0 and None.
    """
    if isinstance(inputs, ModuleInputs):
        # A statistic or a key has no examples, whatever its length.
        rest = (False,) * len(jax.tree.leaves(inputs.rest))
        return rest + batched_leaves(inputs.args[0], num_examples, input_axes)
    leaves = jax.tree.leaves(inputs)
    if isinstance(input_axes, str):
        if input_axes != "auto":
            raise ValueError(
                "input_axes must be 'auto' or a pytree prefix of inputs with 0 and "
                f"None, got {input_axes!r}."
            )
        batched = tuple(jnp.shape(leaf)[:1] == (num_examples,) for leaf in leaves)
    else:
        axes = jax.tree.broadcast(input_axes, inputs, is_leaf=lambda axis: axis is None)
        axes = jax.tree.leaves(axes, is_leaf=lambda axis: axis is None)
        if any(axis not in (0, None) for axis in axes):
            raise ValueError(f"input_axes takes 0 and None, got {input_axes!r}.")
        batched = tuple(axis == 0 for axis in axes)
        for leaf, is_batched in zip(leaves, batched, strict=True):
            if is_batched and jnp.shape(leaf)[:1] != (num_examples,):
                raise ValueError(
                    f"A leaf of inputs with input_axes 0 has shape {jnp.shape(leaf)}, "
                    f"but the outputs have {num_examples} examples on their first axis."
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
    inputs: PyTree, batched: Sequence[bool], model_inputs: PyTree, rows: int
) -> int:
    """Returns the number of examples in ``inputs``, checked against ``init``'s.

    Args:
      inputs: The inputs of one update.
      batched: From `batched_leaves`.
      model_inputs: The slice that the curvature holds.
      rows: Examples captured per update.

    Returns:
      The length of the axis of examples.

    Raises:
      ValueError: If the structure or a shape does not fit.
    """
    structure, expected = jax.tree.structure(inputs), jax.tree.structure(model_inputs)
    if structure != expected:
        raise ValueError(
            "inputs must have the structure that estimator.init was given.\n"
            f"  expected: {expected}\n  got:      {structure}"
        )
    sizes, kept = set(), 0
    leaves = zip(
        jax.tree.leaves(inputs), jax.tree.leaves(model_inputs), batched, strict=True
    )
    for leaf, model_leaf, is_batched in leaves:
        shape, model_shape = jnp.shape(leaf), jnp.shape(model_leaf)
        if is_batched:
            sizes.add(shape[:1])
            kept = model_shape[0]
        skip = 1 if is_batched else 0
        if shape[skip:] != model_shape[skip:]:
            raise ValueError(
                "A leaf of inputs has another shape than at estimator.init.\n"
                f"  expected: {('N',) * skip + model_shape[skip:]}\n"
                f"  got:      {shape}\n"
                "Initialise a new curvature for inputs of another shape."
            )
        if jnp.result_type(leaf) != jnp.result_type(model_leaf):
            raise ValueError(
                f"A leaf of inputs has dtype {jnp.result_type(leaf)}, and had "
                f"{jnp.result_type(model_leaf)} at estimator.init. Cast the inputs, or "
                "initialise a new curvature."
            )
    if len(sizes) != 1:
        raise ValueError(
            f"Leaves of inputs disagree on the number of examples: {sorted(sizes)}."
        )
    ((num_examples,),) = sizes
    if num_examples < max(kept, rows):
        raise ValueError(
            f"The batch has {num_examples} examples; the curvature was initialised to "
            f"capture rows={rows} and to keep {kept} for the quadratic model. Drop "
            f"smaller batches, or pass rows and model_rows of at most {num_examples} "
            "to fisher_estimator."
        )
    return num_examples


def check_targets(targets: PyTree, num_examples: int) -> None:
    """Checks that targets belong to the batch.

    Raises:
      ValueError: If they are of another number of examples.
    """
    for leaf in jax.tree.leaves(targets):
        if jnp.shape(leaf)[:1] != (num_examples,):
            raise ValueError(
                f"targets have shape {jnp.shape(leaf)}; expected the {num_examples} "
                "examples of inputs on the first axis."
            )


def num_kept(model_inputs: PyTree, batched: Sequence[bool]) -> int:
    """Returns the number of examples in the slice that the curvature holds."""
    leaves = zip(jax.tree.leaves(model_inputs), batched, strict=True)
    return next(leaf.shape[0] for leaf, is_batched in leaves if is_batched)


def strided_indices(start: Array, count: int, num_examples: int) -> Array:
    """Returns ``count`` distinct examples, evenly spread, one of them ``start``.

    Spread, because a batch may be sorted (by class, by length), and because every
    device then has some of them, if a batch is split over devices.
    """
    stride = num_examples // count
    if num_examples % count:
        return (start + jnp.arange(count) * stride) % num_examples
    return start % stride + jnp.arange(count) * stride


def strided_examples(
    inputs: PyTree, batched: Sequence[bool], start: Array, count: int
) -> PyTree:
    """Returns ``inputs`` with only the examples of `strided_indices`.

    As a slice where the batch is a multiple of ``count``: of a batch that is split over
    devices a slice stays split, and its work is shared, while every device would be
    sent what a gather finds.
    """

    def pick(leaf: Array) -> Array:
        num_examples, *rest = leaf.shape
        if num_examples % count:
            return leaf[strided_indices(start, count, num_examples)]
        stride = num_examples // count
        columns = leaf.reshape(count, stride, *rest)
        return jax.lax.dynamic_index_in_dim(columns, start % stride, 1, keepdims=False)

    leaves, structure = jax.tree.flatten(inputs)
    sliced = [
        # A copy: a caller may donate both the batch or module and the slice.
        pick(jnp.asarray(leaf)) if is_batched else jnp.copy(leaf)
        for leaf, is_batched in zip(leaves, batched, strict=True)
    ]
    return jax.tree.unflatten(structure, sliced)


def slice_examples(inputs: PyTree, batched: Sequence[bool], indices: Array) -> PyTree:
    """Returns ``inputs`` with only the examples at ``indices``, copied."""
    leaves, structure = jax.tree.flatten(inputs)
    sliced = [
        jnp.asarray(leaf)[indices] if is_batched else jnp.copy(leaf)
        for leaf, is_batched in zip(leaves, batched, strict=True)
    ]
    return jax.tree.unflatten(structure, sliced)
