"""What is refused as parameters, at initialisation and later."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import describe


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
