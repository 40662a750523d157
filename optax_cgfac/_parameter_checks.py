"""What is refused as parameters, at initialisation and later."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cgfac._curvature import Curvature
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import describe


def check_parameters(params: PyTree) -> None:
    """Checks the parameters of a model whose layers are to be found.

    Args:
      params: A tree of arrays or shapes.

    Raises:
      ValueError: If there are none.
      TypeError: If they are no tree, or one is no real floating-point array.
    """
    leaves = leaves_by_path(params)
    if not leaves:
        raise ValueError(
            f"params has no leaves (got {describe(params)}): there is nothing to "
            "precondition. Pass the tree of parameters, such as "
            "model.init(key, x)['params'], or an nnx.Module that has some."
        )
    if () in leaves:
        raise TypeError(
            "params must be a tree of named parameters, got "
            f"{describe(params)}. Pass the parameters first and the inputs second."
        )
    for path, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"Parameter {text(path)!r} is {describe(leaf)}; expected an array. "
                "Convert numbers by jax.tree.map(jnp.asarray, params), and leave "
                "anything else to model_fn."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            way_out = (
                "Pass the nnx.Module itself, or nnx.state(module, nnx.Param): counters "
                "and statistics are nnx.Variables, but no nnx.Param."
                if isinstance(params, nnx.State)
                else "Pass counters and statistics inside inputs, and split complex "
                "numbers into two real arrays."
            )
            raise TypeError(
                f"Parameter {text(path)!r} has dtype {leaf.dtype}; parameters must be "
                f"real floating-point arrays. {way_out}"
            )


def check_same_parameters(curvature: Curvature, params: PyTree) -> None:
    """Checks that parameters are those whose layers a curvature holds.

    Args:
      curvature: The curvature.
      params: The parameters of an update.

    Raises:
      ValueError: If their names, shapes or precision differ from `init`'s.
    """
    again = (
        "\nThe model has changed: call estimator.init(params, inputs) again, and start "
        "with the curvature it returns."
    )
    leaves = leaves_by_path(params)
    known = {leaf for tag in curvature.tags for leaf in tag.leaves}
    known |= {path for path, _ in curvature.spec.uncovered}
    if leaves.keys() != known:
        raise ValueError(
            "params must have the parameters that estimator.init was given.\n"
            f"  absent: {_listed(known - leaves.keys())}\n"
            f"  new:    {_listed(leaves.keys() - known)}{again}"
        )
    for tag in curvature.tags:
        for path, shape in zip(tag.leaves, tag.shapes, strict=True):
            if leaves[path].shape != shape:
                raise ValueError(
                    f"Parameter {text(path)!r} has another shape than at "
                    f"estimator.init.\n  expected: {shape}\n"
                    f"  got:      {leaves[path].shape}{again}"
                )
        # Half precision is solved in float32, as float32 is.
        dtype = jnp.result_type(leaves[tag.leaves[0]].dtype)
        if jnp.promote_types(dtype, jnp.float32) != tag.dtype:
            raise ValueError(
                f"Parameter {text(tag.leaves[0])!r} has dtype {dtype}, and the "
                f"curvature was initialised for {tag.dtype}. Cast the parameters, or "
                "call estimator.init(params, inputs) again."
            )


def check_trained(
    name: str, params: PyTree, keeps: Callable[[str], bool] = lambda path: True
) -> None:
    """Checks the parameters that ``tx.init`` is given.

    Args:
      name: The transformation, for messages.
      params: Its parameters; masked ones are no leaves.
      keeps: Whether it is the one that trains a parameter.

    Raises:
      TypeError: If they are no tree of real floating-point arrays.
    """
    if params is None or isinstance(params, nnx.Module):
        raise TypeError(
            f"{name}: tx.init must be given the tree of parameters, got "
            f"{describe(params)}. Call tx.init(params); of an nnx.Module, "
            "nnx.Optimizer(module, tx, wrt=nnx.Param)."
        )
    for path, leaf in leaves_by_path(params).items():
        dtype = dtype_of(leaf)
        real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if not real and keeps(text(path)):
            raise TypeError(
                f"{name}: parameter {text(path)!r} must be a real floating-point "
                f"array, got {describe(leaf)}. Leave it to another transformation by "
                "optax.partition or optax.masked."
            )


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of an array or a number; None of anything else."""
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    is_number = isinstance(leaf, (bool, int, float, complex, np.generic))
    return jnp.result_type(leaf) if is_number else None


def _listed(paths: set[tuple[str, ...]]) -> str:
    return ", ".join(map(text, sorted(paths))) or "none"
