"""An NNX module as a pure function of its parameters, for estimators to work on."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from optax_cgfac._nnx import open_module
from optax_cgfac._types import ModuleInputs, PyTree


@dataclasses.dataclass(frozen=True)
class ModuleFunction:
    """``function(module, *args)`` as a pure function of the module's state.

    Two of the same function and module are equal, so that compiled steps are found
    again.

    Attributes:
      function: The user's function, of a module.
      graphdef: The module without its state.
    """

    function: Callable[..., Any]
    graphdef: nnx.GraphDef[Any]

    def __call__(self, params: PyTree, inputs: ModuleInputs) -> PyTree:
        """Calls the function with a copy of the module.

        Args:
          params: The state of the module's parameters, variables or arrays.
          inputs: The rest of its state and the other arguments.

        Returns:
          What the function returns.
        """
        # Arrays and not variables: those would be the caller's, shared with the copy.
        module = nnx.merge(self.graphdef, pure(params), inputs.rest)
        open_module(module)
        return self.function(module, *inputs.args)


class Bound(NamedTuple):
    """A function of parameters in whatever form, as one of a pytree.

    Attributes:
      function: The pure function.
      params: Its first argument.
      args: Its other arguments.
    """

    function: Callable[..., Any]
    params: PyTree
    args: tuple[Any, ...]


def bind(function: Callable[..., Any], params: PyTree, *args: Any) -> Bound:
    """Makes the first argument of ``function`` a pytree of parameters.

    Args:
      function: The user's function.
      params: An `nnx.Module`, which is split, or a pytree, which is kept.
      *args: The other arguments.

    Returns:
      The `Bound`.
    """
    if isinstance(params, nnx.Module):
        graphdef, state, rest = nnx.split(params, nnx.Param, ...)
        inputs = ModuleInputs(pure(rest), args)
        return Bound(ModuleFunction(function, graphdef), state, (inputs,))
    if isinstance(params, nnx.State):
        _open_what_users_merge()
    return Bound(function, params, args)


def update_module(module: Any, state: PyTree) -> None:
    """Hands what a call did to the copy of a module on to the module itself."""
    if isinstance(module, nnx.Module):
        nnx.update(module, state)


def check_same_module(expected: Any, got: Any) -> None:
    """Tells a module that changed from another estimator's curvature.

    Raises:
      ValueError: If both are of one function of a module.
    """
    functions = [getattr(f, "function", None) for f in (expected, got)]
    if functions[0] is None or functions[0] != functions[1]:
        return
    raise ValueError(
        "The module has another structure than the one given to estimator.init: a "
        "layer, a mode (train() or eval()) or an option of it has changed.\n"
        f"  expected: {_first_difference(expected.graphdef, got.graphdef)}\n"
        f"  got:      {_first_difference(got.graphdef, expected.graphdef)}\n"
        "Set modes inside model_fn, on the copy it is given: "
        "lambda model, x: nnx.view(model, deterministic=True)(x), or call "
        "estimator.init(module, inputs) again."
    )


def _first_difference(one: nnx.GraphDef[Any], other: nnx.GraphDef[Any]) -> str:
    """Returns the first line of ``one``'s description that ``other``'s lacks."""
    lines = set(repr(other).splitlines())
    found = [line.strip() for line in repr(one).splitlines() if line not in lines]
    return found[0] if found else "an attribute that is equal only to itself"


def pure(state: PyTree) -> PyTree:
    """Returns a state with its variables replaced by their arrays."""
    return jax.tree.map(
        lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x,
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _open_what_users_merge() -> None:
    """Lets capture see the modules that a function of an `nnx.State` merges.

    Such a function makes its module where nothing else can reach it. The replacement
    only adds a look at a thread-local variable while nothing is captured.
    """
    with _LOCK:
        if not hasattr(nnx.merge, "opens_modules"):
            nnx.merge = _opening(nnx.merge)


def _opening(merge: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(merge)
    def merge_and_open(*args: Any, **kwargs: Any) -> Any:
        module = merge(*args, **kwargs)
        open_module(module)
        return module

    merge_and_open.opens_modules = True  # type: ignore[attr-defined]
    return merge_and_open


_LOCK = threading.Lock()
