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
from flax.core.scope import Scope, subtract_filters, union_filters

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
    """A module that the trace met, for reports on uncovered parameters.

    Attributes:
      class_name: Its class.
      liftable: Whether the collections of capture reach it.
      hidden: Whether it runs below a JAX transform inside the user's function.
    """

    class_name: str
    liftable: bool
    hidden: bool


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
    with nn.intercept_methods(tap.intercept_outermost):
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
    """The interceptors of one traced call."""

    def __init__(self, probes: tuple[PyTree, ...] | None):
        self.probes = probes
        self.roots: list[Root] = []
        self.visits: dict[tuple[int, Path], Visit] = {}
        self._level = Scope({}).trace_level
        self._root_scope: Scope | None = None  # of the outermost call under way
        self._hidden = False  # whether that call is below a transform of the user's
        self._opened: tuple[Scope, Any] | None = None  # root scope, its own filter

    def intercept_outermost(
        self,
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Puts the collections in place for a call, and takes them away again."""
        scope = context.module.scope
        if scope is None or self._root_scope is not None:
            return next_function(*args, **kwargs)
        # Values of a trace that began below model_fn (a jit, cond, scan or vmap of
        # the user's own) could not be returned from here: they would leak.
        self._hidden = scope.root.trace_level != self._level
        if not self._hidden:
            self._open(scope)
        if context.method_name == "setup":
            # Runs before the outermost call, and makes the children's scopes.
            return next_function(*args, **kwargs)
        root, mutable = scope.root, scope.root.mutable
        if not self._hidden:
            root, mutable = self._open(scope)
            self._put_probes(root, mutable)
        self._root_scope = root
        try:
            # Entered only now, so inside every interceptor the user has entered:
            # layers are tapped where they compute, as their parameters see it.
            with nn.intercept_methods(self.intercept_layer):
                outputs = self.intercept_layer(next_function, args, kwargs, context)
        finally:
            # The user's apply returns the collections that are mutable now.
            root.mutable = subtract_filters(mutable, [INPUTS, PROBES])
            self._root_scope = self._opened = None
        self._harvest(root)
        return outputs

    def intercept_layer(
        self,
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Taps a layer that rows can be taken from."""
        scope = context.module.scope
        if scope is None or context.method_name == "setup":
            return next_function(*args, **kwargs)
        if scope.root is self._root_scope and not self._hidden:
            # Scopes may be older than the call (nn.Module.bind). Inside a lifted
            # transform the transform alone decides: a collection it does not
            # carry would be lost on the way out.
            scope.mutable = union_filters(scope.mutable, INPUTS)
        liftable = scope.is_mutable_collection(INPUTS)
        key = (len(self.roots), tuple(scope.path))
        class_name = type(context.module).__name__
        self.visits.setdefault(key, Visit(class_name, liftable, self._hidden))
        describe = _layer_of(context)
        outputs = next_function(*args, **kwargs)
        if describe is None or self._hidden or not liftable:
            return outputs
        call, a = describe(context.module, *args, **kwargs)
        return self._tap_layer(scope, call, a, outputs)

    def _open(self, scope: Scope) -> tuple[Scope, Any]:
        """Makes the inputs' collection mutable; returns the root and its own filter."""
        root = scope.root
        if self._opened is None or self._opened[0] is not root:
            self._opened = (root, root.mutable)
        root.mutable = union_filters(self._opened[1], INPUTS)
        scope.mutable = root.mutable
        return self._opened

    def _put_probes(self, root: Scope, mutable: Any) -> None:
        if self.probes is None or len(self.roots) >= len(self.probes):
            return
        opened = root.mutable
        root.mutable = union_filters(mutable, [INPUTS, PROBES])
        for name, value in self.probes[len(self.roots)].items():
            root.put_variable(PROBES, name, value)
        root.mutable = opened

    def _harvest(self, root: Scope) -> None:
        """Records what the outermost call that just ended has left in its scope."""
        variables = root.variables()
        calls: dict[Path, list[tuple[LayerCall, tuple[Array, ...]]]] = {}
        if not self._hidden:
            for path, call, values in _entries(variables.get(INPUTS, {})):
                calls.setdefault(path, []).extend((call, value) for value in values)
        leaves = leaves_by_path(dict(variables.get("params", {})))
        self.roots.append(Root(calls, {path: id(x) for path, x in leaves.items()}))

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
        # Flax sorts the axes, so the kernel's are in this order too.
        return tuple(sorted(axis % inputs.ndim for axis in as_tuple(axes)))

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
