"""Array aliases and the records that every module shares."""

from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array


PyTree = Any


class LinearOperator(Protocol):
    """A symmetric linear map on vectors, which may be any pytree of arrays.

    The solver and the preconditioners see this interface and nothing else.
    """

    def matvec(self, vector: PyTree) -> PyTree:
        """Returns the operator applied to ``vector``."""
        ...


class InspectableOperator(LinearOperator, Protocol):
    """A linear operator on one layer's matrix that can be looked at."""

    def diagonal(self) -> Array:
        """Returns the diagonal in the shape of the vectors."""
        ...

    def trace(self) -> Array:
        """Returns the trace."""
        ...

    def to_dense(self) -> Array:
        """Returns the dense matrix over row-major vectors."""
        ...

    def eigenvalue_extremes(self) -> tuple[Array, Array]:
        """Returns the smallest and the largest eigenvalue."""
        ...


class LayerRows(NamedTuple):
    """Captured rows of one layer.

    Attributes:
      a: Input activations, one row per example or position, shape
        ``(*stack, R, n_in)``. A layer with a bias has a last column of ones.
        Rows that have not been seen yet are zero. The one-hot rows of an embedding
        are kept as indices.
      g: Cotangents of the layer's output, shape ``(*stack, R, n_out)``, per
        example: the gradient of the example's own loss.
    """

    a: Any
    g: Array


class ModuleInputs(NamedTuple):
    """The arguments of a function of a module, beside its parameters.

    Attributes:
      rest: The module's state without its parameters.
      args: What the user's function takes after the module.
    """

    rest: PyTree
    args: tuple[Any, ...]


def user_inputs(inputs: PyTree) -> PyTree:
    """Returns the inputs that the user gave."""
    return inputs.args[0] if isinstance(inputs, ModuleInputs) else inputs
