"""An NNX module as a pure function of its parameters, for estimators to work on."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from optax_cgfac.capture.nnx.tap import open_module
from optax_cgfac.utils.types import ModuleInputs, PyTree

MERGE_STATE = (
    "Merge the module from it: value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, "
    "copy=True)), with graphdef, _, rest = nnx.split(module, nnx.Param, ...)."
)
"""What to do with the state that ``value_fn`` is given of an `nnx.Module`."""


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
        open_module(module, is_whole=True)
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


@contextlib.contextmanager
def explaining_states(name: str, params: PyTree, way_out: str) -> Iterator[None]:
    """Says what went wrong where a function of a module is given the module's state.

    Args:
      name: The function, for the message.
      params: Its first argument.
      way_out: What to do.

    Raises:
      TypeError: If a function fails with a state as one that takes a module does.
      AttributeError: Another one, as it came.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        if not isinstance(params, nnx.State) or "'State' object" not in str(error):
            raise
        raise TypeError(
            f"{name} must take what it is given, got an nnx.State, with which it fails "
            f"({type(error).__name__}: {error}). {way_out}"
        ) from error


def outputs_like(function: Callable[..., Any], params: PyTree, inputs: PyTree) -> Any:
    """Returns the shapes of what ``model_fn`` returns."""
    way_out = (
        "Pass the nnx.Module itself, here and to estimator.update, or merge it inside "
        "model_fn: lambda state, x: nnx.merge(graphdef, state)(x)."
    )
    with explaining_states("model_fn", params, way_out):
        return jax.eval_shape(function, params, inputs)


def update_module(module: Any, state: PyTree) -> None:
    """Hands what a call did to the copy of a module on to the module itself."""
    if isinstance(module, nnx.Module):
        nnx.update(module, state)


def check_same_module(expected: Any, got: Any) -> None:
    """Tells a module that changed from another estimator's curvature.

    Raises:
      ValueError: If both are of one function of a module.
    """
    functions = [getattr(f, "function", f) for f in (expected, got)]
    if functions[0] is None or functions[0] != functions[1]:
        return
    names = [
        "an nnx.Module" if isinstance(f, ModuleFunction) else "a tree of parameters"
        for f in (expected, got)
    ]
    if names[0] != names[1]:
        raise ValueError(
            f"estimator.update must be given what estimator.init was, {names[0]}; got "
            f"{names[1]}. Pass the module, or its parameters, to both."
        )
    if not isinstance(expected, ModuleFunction):
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
