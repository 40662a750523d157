"""What `conjugate_gradient` refuses as a system, and what it says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import describe


def check_system(operator: Any, b: PyTree, x0: PyTree, preconditioner: Any) -> None:
    """Checks that an operator maps vectors like ``b`` to vectors like ``b``.

    Args:
      operator: Anything.
      b: The right-hand side.
      x0: The warm start, or None.
      preconditioner: Anything, None for none.

    Raises:
      ValueError: If a structure, a shape or the dtype of ``x0`` differs.
      TypeError: If ``b`` is not real floating point, or an operator none.
    """
    _check_real(b)
    if x0 is not None:
        _check_like_b(x0, b)
    _check_operator("operator", operator, b)
    if preconditioner is not None:
        _check_operator("preconditioner", preconditioner, b)


def _check_real(b: PyTree) -> None:
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise TypeError(
            f"b must hold real floating-point arrays, got {describe(b)} without any. "
            "Pass the right-hand side, an array or a tree of arrays."
        )
    for leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(
                f"b must hold real floating-point arrays, got {describe(leaf)}. "
                "Convert with jnp.asarray(b, jnp.float32)."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"b must hold real floating-point arrays, got dtype {leaf.dtype}. "
                "Convert with jnp.asarray(b, jnp.float32)."
            )


def _check_operator(name: str, operator: Any, b: PyTree) -> None:
    if not callable(getattr(operator, "matvec", None)):
        raise TypeError(
            f"{name} must have a matvec(vector), got {describe(operator)}. Pass an "
            "operator of optax_cgfac, such as curvature.operator('hidden', "
            "damping=0.1), or an object with a method matvec of your own."
        )
    image = jax.eval_shape(operator.matvec, b)
    expected, got = _shapes(b), _shapes(image)
    if expected != got:
        raise ValueError(
            f"{name}.matvec must return vectors like the one that it is given.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Return the product in the structure and shapes of b."
        )


def _check_like_b(x0: PyTree, b: PyTree) -> None:
    def dtypes(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name), tree
        )

    expected, got = dtypes(b), dtypes(x0)
    if expected != got:
        raise ValueError(
            "The warm start x0 must have the structure, shapes and dtypes of b.\n"
            f"  expected: {expected}\n  got:      {got}\n"
            "Start from jax.tree.map(jnp.zeros_like, b) or omit x0."
        )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, tree)
