"""Capture in Flax Linen: inputs of tagged layers and probes on their outputs.

A method interceptor sows the input of every tagged layer into one variable
collection and adds a zero, the *probe*, read from another, to its output. The
gradient with respect to the probe is the output's cotangent, in the same
backward pass. Both collections are put into the root scope when the outermost
module call begins, so the user's model and ``apply`` call stay as they are, and
Flax's lifted transforms carry them like any other variables.

This file alone touches `flax.core.Scope`; ``tests/unit/test_linen.py`` fails with
a clear message where Flax changes what it relies on.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import union_filters

from optax_cgfac._layers import LayerCall
from optax_cgfac._paths import Path, leaves_by_path
from optax_cgfac._types import Array, PyTree

INPUTS = "cgfac_inputs"
PROBES = "cgfac_probes"

_PREFIX = "cgfac"


def capture_axes(axis: int = 0) -> dict[str, int]:
    """Returns the ``variable_axes`` that let `nn.scan` and `nn.vmap` be captured.

    The axes of a user's own `nn.scan` or `nn.vmap` are fixed where it is called,
    so a stacked layer is covered only if the capture's collections are among
    them.

    Args:
      axis: The axis along which rows are stacked; 0, like the parameters.

    Returns:
      A mapping to merge into ``variable_axes``.

    Example:
      >>> from flax import linen as nn
      >>> Blocks = nn.scan(
      ...     nn.Dense,
      ...     variable_axes={"params": 0} | capture_axes(),
      ...     split_rngs={"params": True},
      ...     length=4,
      ... )
    """
    return {INPUTS: axis, PROBES: axis}


class Root(NamedTuple):
    """What was captured below one outermost module call.

    Attributes:
      calls: For every layer path below the root, its calls: the facts, the input
        and, in discovery, the output.
      leaf_ids: The identity of every parameter leaf the root module was given.
    """

    calls: dict[Path, list[tuple[LayerCall, tuple[Array, ...]]]]
    leaf_ids: dict[Path, int]


class Visit(NamedTuple):
    """A module that the trace met, for reports on uncovered parameters."""

    class_name: str
    liftable: bool


class Capture(NamedTuple):
    """The outputs of a captured call and everything tagged on the way."""

    outputs: PyTree
    roots: tuple[Root, ...]
    visits: dict[tuple[int, Path], Visit]


def run_captured(
    function: Callable[..., PyTree],
    args: tuple[Any, ...],
    probes: tuple[PyTree, ...] | None = None,
) -> Capture:
    """Calls ``function(*args)`` with capture on.

    Args:
      function: The user's function; it applies Linen modules.
      args: Its arguments.
      probes: One pytree per outermost module call, from `probes_like`; None to
        discover: outputs of tagged layers are then returned beside the inputs.

    Returns:
      The `Capture`.
    """
    tap = _Tap(probes)
    # Entered last, so inside the interceptors a user may have set.
    with nn.intercept_methods(tap.intercept):
        outputs = function(*args)
    return Capture(outputs, tuple(tap.roots), tap.visits)


def probes_like(roots: Sequence[Mapping[Path, Any]]) -> tuple[PyTree, ...]:
    """Returns zero probes for the outputs found by a discovery run.

    Args:
      roots: ``Root.calls`` of every root of a `run_captured` without probes,
        arrays or shapes.

    Returns:
      What `run_captured` takes as ``probes``.
    """
    probes = []
    for root in roots:
        tree: dict[str, Any] = {}
        for path, calls in root.items():
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            for call, (_, output) in calls:
                # zeros_like and not zeros(shape): under shard_map the latter
                # would not vary over devices and its cotangent would be summed.
                probe = jax.tree.map(jnp.zeros_like, output)
                node[_encode(call)] = (*node.get(_encode(call), ()), probe)
        probes.append(tree)
    return tuple(probes)


def probe_calls(probes: tuple[PyTree, ...]) -> list[dict[Path, list[Array]]]:
    """Returns probes or their cotangents by root and layer path, in call order."""
    roots = []
    for tree in probes:
        found: dict[Path, list[Array]] = {}
        for path, _, values in _entries(tree):
            found.setdefault(path, []).extend(values)
        roots.append(found)
    return roots


class _Tap:
    """The interceptor of one traced call."""

    def __init__(self, probes: tuple[PyTree, ...] | None):
        self.probes = probes
        self.roots: list[Root] = []
        self.visits: dict[tuple[int, Path], Visit] = {}
        self._root_scope = None
        self._opened: tuple[Any, Any] | None = None  # root scope, its own filter

    def intercept(
        self,
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if module.scope is None:
            return next_function(*args, **kwargs)
        if self._root_scope is None:
            self._open(module.scope)
        if context.method_name == "setup":
            # Runs before the outermost call, and makes the children's scopes.
            return next_function(*args, **kwargs)
        if self._root_scope is None:
            return self._outermost(next_function, args, kwargs, context)
        return self._inner(next_function, args, kwargs, context)

    def _open(self, scope) -> tuple[Any, Any]:
        """Makes the inputs' collection mutable; returns the root and its own filter."""
        root = scope.root
        if self._opened is None or self._opened[0] is not root:
            self._opened = (root, root.mutable)
        root.mutable = union_filters(self._opened[1], INPUTS)
        scope.mutable = root.mutable
        return self._opened

    def _outermost(self, next_function, args, kwargs, context):
        """Puts the collections in place for the call, and takes them away again."""
        root, mutable = self._open(context.module.scope)
        if self.probes is not None:
            index = len(self.roots)
            probes = self.probes[index] if index < len(self.probes) else {}
            root.mutable = union_filters(mutable, [INPUTS, PROBES])
            for name, value in probes.items():
                root.put_variable(PROBES, name, value)
            root.mutable = union_filters(mutable, INPUTS)
        self._root_scope = root
        try:
            outputs = self._inner(next_function, args, kwargs, context)
        finally:
            # The user's apply returns the collections that are mutable now.
            root.mutable = mutable
            self._root_scope = self._opened = None
        variables = root.variables()
        calls: dict[Path, list[tuple[LayerCall, tuple[Array, ...]]]] = {}
        for path, call, values in _entries(variables.get(INPUTS, {})):
            calls.setdefault(path, []).extend((call, value) for value in values)
        leaf_ids = {
            path: id(leaf)
            for path, leaf in leaves_by_path(dict(variables.get("params", {}))).items()
        }
        self.roots.append(Root(calls, leaf_ids))
        return outputs

    def _inner(self, next_function, args, kwargs, context):
        scope = context.module.scope
        if scope.root is self._root_scope:
            # Scopes may be older than the call (nn.Module.bind). Inside a lifted
            # transform the transform alone decides: a collection it does not
            # carry would be lost on the way out.
            scope.mutable = union_filters(scope.mutable, INPUTS)
        liftable = scope.is_mutable_collection(INPUTS)
        key = (len(self.roots), tuple(scope.path))
        self.visits.setdefault(key, Visit(type(context.module).__name__, liftable))
        describe = _layer_of(context)
        outputs = next_function(*args, **kwargs)
        if describe is None or not liftable:
            return outputs
        call, a = describe(context.module, *args, **kwargs)
        return self._tap_layer(scope, call, a, outputs)

    def _tap_layer(self, scope, call: LayerCall, a: Array, outputs: Array) -> Array:
        name = _encode(call)
        earlier = scope.get_variable(INPUTS, name, ())
        value = (a, outputs) if self.probes is None else (a,)
        scope.put_variable(INPUTS, name, (*earlier, value))
        probes = scope.get_variable(PROBES, name, ())
        if len(earlier) < len(probes):
            outputs = outputs + probes[len(earlier)].astype(outputs.dtype)
        return outputs


# The facts of a call travel in the name of its variable: Python side effects are
# lost where a lifted transform reuses a cached trace, the pytree's structure is
# not.
def _encode(call: LayerCall) -> str:
    fields = (
        call.kind,
        call.batch_ndim,
        call.contract_ndim,
        call.feature_ndim,
        call.input_ndim,
        int(call.has_bias),
    )
    return ":".join((_PREFIX, *map(str, fields)))


def _decode(name: str) -> LayerCall:
    _, kind, *numbers = name.split(":")
    batch, contract, feature, ndim, bias = map(int, numbers)
    return LayerCall(kind, batch, contract, feature, ndim, bool(bias))


def _entries(tree: Mapping[str, Any], path: Path = ()):
    """Yields ``(layer path, call, values)`` from a collection's nested dict."""
    for name, value in tree.items():
        if name.startswith(_PREFIX + ":"):
            yield path, _decode(name), value
        elif isinstance(value, Mapping):
            yield from _entries(value, (*path, name))


def _describe_dense(module: nn.Dense, inputs: Array) -> tuple[LayerCall, Array]:
    inputs = jnp.asarray(inputs)
    return LayerCall("dense", 0, 1, 1, inputs.ndim, module.use_bias), inputs


def _describe_dense_general(
    module: nn.DenseGeneral, inputs: Array
) -> tuple[LayerCall, Array]:
    inputs = jnp.asarray(inputs)

    def as_tuple(value) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    def normalize(axes) -> tuple[int, ...]:
        return tuple(axis % inputs.ndim for axis in as_tuple(axes))

    axis, batch = normalize(module.axis), normalize(module.batch_dims)
    positions = [i for i in range(inputs.ndim) if i not in axis and i not in batch]
    a = inputs.transpose(*batch, *positions, *axis)
    a = a.reshape(*a.shape[: a.ndim - len(axis)], -1)
    features = len(as_tuple(module.features))
    call = LayerCall(
        "dense_general", len(batch), len(axis), features, a.ndim, module.use_bias
    )
    return call, a


# The function that runs, not the class: a subclass that overrides __call__ is a
# layer of its own, and its super().__call__() is intercepted as this one.
_LAYERS = {
    inspect.unwrap(nn.Dense.__call__): _describe_dense,
    inspect.unwrap(nn.DenseGeneral.__call__): _describe_dense_general,
}


def _layer_of(context: nn.module.InterceptorContext) -> Callable[..., Any] | None:
    function = getattr(context.orig_method, "func", None)
    return _LAYERS.get(inspect.unwrap(function)) if function else None


TAGGED_LAYERS = ("Dense", "DenseGeneral")
