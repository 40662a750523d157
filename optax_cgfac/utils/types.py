"""Array aliases and the records that every module shares."""

from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any


class LinearOperator(Protocol):
    """A symmetric linear map on vectors, which may be any pytree of arrays."""

    def matvec(self, vector: PyTree) -> PyTree:
        """Returns the operator applied to ``vector``."""
        ...


class LayerRows(NamedTuple):
    """Captured rows of one layer.

    Attributes:
      a: Input activations, one row per example or position, shape
        ``(*stack, R, n_in)``. A layer with a bias has a last column of ones.
        Rows not yet captured are zero. One-hot rows of an embedding are kept as
        indices.
      g: Cotangents of the layer's output, shape ``(*stack, R, n_out)``: gradients
        of each example's own loss.
    """

    a: Any
    g: Array


class ModuleInputs(NamedTuple):
    """The arguments of a function of a module, without its parameters.

    Attributes:
      rest: The module's state without its parameters.
      args: Further arguments of the user's function.
    """

    rest: PyTree
    args: tuple[Any, ...]


def user_inputs(inputs: PyTree) -> PyTree:
    """Returns the inputs as the user passed them."""
    return inputs.args[0] if isinstance(inputs, ModuleInputs) else inputs
