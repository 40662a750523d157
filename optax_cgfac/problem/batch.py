"""Which leaves of the inputs hold examples, and slices of a few of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.utils.types import Array, ModuleInputs, PyTree
from optax_cgfac.utils.validate import summarize

_EMPTY = (
    "The batch must hold examples, got one of 0. Drop empty batches, and initialise "
    "with a whole one."
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
        length, or ``input_axes`` is no prefix.
    """
    if isinstance(inputs, ModuleInputs):
        # A statistic or a key has no examples, whatever its length.
        rest = (False,) * len(jax.tree.leaves(inputs.rest))
        return rest + batched_leaves(inputs.args[0], num_examples, input_axes)
    leaves = jax.tree.leaves(inputs)
    if isinstance(input_axes, str):
        batched = tuple(jnp.shape(leaf)[:1] == (num_examples,) for leaf in leaves)
    else:
        try:
            axes = jax.tree.broadcast(input_axes, inputs, is_leaf=_is_none)
        except ValueError:
            raise ValueError(
                "input_axes must be a pytree prefix of inputs with 0 and None.\n"
                f"  expected: a prefix of {jax.tree.structure(inputs)}\n"
                f"  got:      {input_axes!r}\n"
                "Write 0 or None in the place of every leaf, or of a whole subtree."
            ) from None
        batched = tuple(axis == 0 for axis in jax.tree.leaves(axes, is_leaf=_is_none))
        for leaf, is_batched in zip(leaves, batched, strict=True):
            if is_batched and jnp.shape(leaf)[:1] != (num_examples,):
                raise ValueError(
                    f"A leaf of inputs with input_axes 0 has shape {jnp.shape(leaf)}, "
                    f"but the outputs have {num_examples} examples on their first "
                    "axis. Write None for it if it has no axis of examples."
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
    """Returns the number of examples in ``inputs``, checked against ``init``'s.

    Args:
      inputs: The inputs of one update.
      batched: From `batched_leaves`.
      model_inputs: The slice that the curvature holds.
      captured: Examples captured per update.

    Returns:
      The length of the axis of examples.

    Raises:
      ValueError: If the structure or a shape does not fit.
    """
    structure, expected = jax.tree.structure(inputs), jax.tree.structure(model_inputs)
    if structure != expected:
        raise ValueError(
            "inputs must have the structure that estimator.init was given.\n"
            f"  expected: {expected}\n  got:      {structure}\n"
            "Pass the same tree at every update, or initialise a new curvature."
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
            "Leaves of inputs must agree on the number of examples, got "
            f"{sorted(sizes)}. Cut them to one length, or say by "
            "fisher_estimator(..., input_axes=...) which of them have examples."
        )
    ((num_examples,),) = sizes
    if num_examples < max(kept, captured):
        if num_examples == 0:
            raise ValueError(_EMPTY)
        raise ValueError(
            f"The batch has {num_examples} examples; the curvature was initialised to "
            f"capture examples={captured} and to keep {kept} for the quadratic model. "
            "Drop smaller batches, or pass examples and model_examples of at most "
            f"{num_examples} to fisher_estimator."
        )
    return num_examples


def check_enough(num_examples: int, captured: int) -> None:
    """Checks that a batch has the examples that are captured of it.

    Raises:
      ValueError: If it has fewer.
    """
    if num_examples == 0:
        raise ValueError(_EMPTY)
    if num_examples < captured:
        raise ValueError(
            f"examples={captured} are captured per update, but the inputs hold "
            f"{num_examples}. Pass fisher_estimator(..., examples={num_examples}) or "
            "initialise with a whole batch."
        )


def check_inputs(inputs: PyTree) -> None:
    """Checks that inputs hold nothing but arrays and numbers.

    Raises:
      TypeError: If a leaf is something else.
    """
    for leaf in jax.tree.leaves(inputs):
        is_array = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
        is_number = isinstance(leaf, (bool, int, float, complex))
        if isinstance(leaf, (np.ndarray, np.generic)):
            is_array = leaf.dtype.kind not in "OSUMm"  # objects, texts and times
        if not is_array and not is_number:
            raise TypeError(
                f"A leaf of inputs is {summarize(leaf)}; expected arrays and numbers "
                "only. Convert it by jnp.asarray; what is no data belongs in model_fn, "
                "lambda params, x: model.apply({'params': params}, x, train=True)."
            )


def check_input_axes(input_axes: PyTree) -> None:
    """Checks the option ``input_axes``, as far as it can be without inputs.

    Raises:
      ValueError: If it holds something else than 0 and None.
    """
    if isinstance(input_axes, str):
        if input_axes != "auto":
            raise ValueError(
                "input_axes must be 'auto' or a pytree prefix of inputs with 0 and "
                f"None, got {input_axes!r}. Pass {{'x': 0, 'scale': None}}, say."
            )
        return
    for axis in jax.tree.leaves(input_axes, is_leaf=_is_none):
        if axis is not None and not (type(axis) is int and axis == 0):
            raise ValueError(
                f"input_axes takes 0 and None, got {summarize(axis)} in it. Bring "
                "examples to the first axis, and write 0 for leaves that have one."
            )


def check_targets(targets: PyTree, num_examples: int, num_outputs: int | None) -> None:
    """Checks that targets belong to the batch.

    Args:
      targets: The targets; None for none.
      num_examples: Examples of the batch.
      num_outputs: How many outputs the model returns a tuple of; None for one array.

    Raises:
      ValueError: If they are of another number of examples or outputs.
      TypeError: If one is no array.
    """
    if targets is None:
        return
    if num_outputs is not None and (
        not isinstance(targets, (tuple, list)) or len(targets) != num_outputs
    ):
        count = f" of {len(targets)}" if isinstance(targets, (tuple, list)) else ""
        raise ValueError(
            f"targets must be a tuple of {num_outputs}, as the losses are; got "
            f"{summarize(targets)}{count}. Pass targets=(targets_of_first, ...)."
        )
    for leaf in jax.tree.leaves(targets):
        is_array = isinstance(leaf, jax.Array)
        if isinstance(leaf, np.ndarray):
            is_array = leaf.dtype.kind not in "OSUMm"  # objects, texts and times
        if not is_array:
            raise TypeError(
                f"targets must be arrays of numbers, got {summarize(leaf)}. Pass "
                "targets=jnp.asarray(targets)."
            )
        if leaf.shape[:1] != (num_examples,):
            raise ValueError(
                f"targets have shape {leaf.shape}; expected the {num_examples} "
                "examples of inputs on the first axis. Pass the targets of this batch."
            )


def _is_none(axis: object) -> bool:
    return axis is None


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
