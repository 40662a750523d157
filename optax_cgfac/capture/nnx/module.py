"""An NNX module as a pure function of its parameters, for estimators to work on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from optax_cgfac.utils.types import ModuleInputs, PyTree


@dataclasses.dataclass(frozen=True)
class ModuleFunction:
    """``function(module, *args)`` as a pure function of the module's state.

    Two of the same function and module are equal, so that JAX finds compiled steps.
    """

    function: Callable[..., Any]
    graphdef: nnx.GraphDef[Any]

    def merged(self, params: PyTree, inputs: ModuleInputs) -> Any:
        """Returns a copy of the module with these parameters."""
        # Arrays and not variables: those would be the caller's, shared with the copy.
        return nnx.merge(self.graphdef, pure(params), inputs.rest)

    def __call__(self, params: PyTree, inputs: ModuleInputs) -> PyTree:
        """Calls the function with a copy of the module."""
        return self.function(self.merged(params, inputs), *inputs.args)


def bind(
    function: Callable[..., Any], params: PyTree, *args: Any
) -> tuple[Callable[..., Any], PyTree, tuple[Any, ...]]:
    """Makes the first argument of the user's function a pytree: splits a module."""
    if isinstance(params, nnx.Module):
        graphdef, state, rest = nnx.split(params, nnx.Param, ...)
        inputs = ModuleInputs(pure(rest), args)
        return ModuleFunction(function, graphdef), state, (inputs,)
    if isinstance(params, nnx.State):
        # A module that the function merges exists in there alone, out of reach.
        raise TypeError(
            "params must be the nnx.Module itself, got its nnx.State. Pass the module, "
            "to a function of the module, lambda module, x: module(x). Inside jax.jit, "
            "pass nnx.merge(graphdef, state)."
        )
    return function, params, args


def check_same_module(expected: Any, got: Any) -> None:
    """Raises where both are of one function, and the module has changed."""
    both = isinstance(expected, ModuleFunction) and isinstance(got, ModuleFunction)
    if not both or expected.function != got.function:
        return
    raise ValueError(
        "The module has another structure than the one given to estimator.init: a "
        "layer, a mode (train() or eval()) or an option of it has changed.\n"
        f"  expected: {_first_difference(expected.graphdef, got.graphdef)}\n"
        f"  got:      {_first_difference(got.graphdef, expected.graphdef)}\n"
        "Set modes inside model_fn, lambda model, x: nnx.view(model, "
        "deterministic=True)(x), or call estimator.init(module, inputs) again."
    )


def _first_difference(one: nnx.GraphDef[Any], other: nnx.GraphDef[Any]) -> str:
    """Returns the part of ``one``'s description where it leaves ``other``'s."""
    own, its = (" ".join(repr(graphdef).split()) for graphdef in (one, other))
    if own == its:
        return "an attribute that is equal only to itself"
    pairs = enumerate(zip(own, its, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(its)))
    return f"...{own[max(at - 60, 0) : at + 60]}..."


def pure(state: PyTree) -> PyTree:
    """Returns a state with its variables replaced by their arrays."""
    return jax.tree.map(
        lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x,
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
