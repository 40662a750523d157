"""Capture in Flax Linen: inputs of tagged layers and probes on their outputs.

A method interceptor sows the input of every tagged layer into one variable
collection and adds a zero, the *probe*, read from another, to its output. The
gradient with respect to the probe is the output's cotangent, in the same
backward pass. Both collections are put into the root scope when the outermost
module call begins, so the user's model and ``apply`` call stay as they are, and
Flax's lifted transforms carry them like any other variables.

What it relies on in `flax.core.Scope` is hardly documented there:
``tests/contract/test_flax_hooks.py`` says by name what Flax has changed.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn
from flax.core.scope import Scope, subtract_filters, union_filters

from optax_cgfac.capture.call import Capture, LayerCall, Root, Visit, encode, entries
from optax_cgfac.capture.describe import mixes_examples
from optax_cgfac.capture.linen.layers import LAYERS
from optax_cgfac.utils.paths import Path, leaves_by_path
from optax_cgfac.utils.types import Array, PyTree

INPUTS = "cgfac_inputs"


PROBES = "cgfac_probes"


def capture_axes() -> dict[str, int]:
    """Returns the ``variable_axes`` that let `nn.scan` and `nn.vmap` be captured.

    The axes of a user's own `nn.scan` or `nn.vmap` are fixed where it is called,
    so a stacked layer is covered only if the capture's collections are among
    them. Rows are stacked along axis 0, and the parameters must be, too.

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
    return {INPUTS: 0, PROBES: 0}


def run_captured(
    function: Callable[..., PyTree],
    args: tuple[Any, ...],
    probes: tuple[PyTree, ...] | None = None,
    *,
    lifted: bool = True,
) -> Capture:
    """Calls ``function(*args)`` with capture on.

    Args:
      function: The user's function; it applies Linen modules.
      args: Its arguments.
      probes: One pytree per outermost module call, from `probes_like`; None to
        discover: outputs of tagged layers are then returned beside the inputs.
      lifted: Whether to look below lifted transforms too. The branches of an
        `nn.cond` may not leave different collections behind.

    Returns:
      The `Capture`.
    """
    tap = _Tap(probes, lifted)
    token = _CURRENT.set(tap)
    try:
        with nn.intercept_methods(tap.intercept_outermost):
            outputs = function(*args)
    finally:
        _CURRENT.reset(token)
    return Capture(outputs, tuple(tap.roots), tap.visits)


def tag_linen(module: nn.Module, call: LayerCall, x: Array, outputs: Array) -> Array:
    """Taps a layer that its own module describes; see `tag_layer`."""
    tap, scope = _CURRENT.get(), module.scope
    if tap is None or scope is None or not tap.reaches(scope):
        return outputs
    return tap.tap(scope, call, x, outputs)


_CURRENT: contextvars.ContextVar["_Tap | None"] = contextvars.ContextVar(
    "cgfac_tap", default=None
)


_MAPPED = (
    "its layer computes with a function of it (nn.map_variables, nn.WeightNorm, "
    "nn.SpectralNorm), so that the layer's rows are not those of the parameter"
)


def _below(root: Scope, path: Path) -> Mapping[str, Any]:
    """Returns the parameters of a module, empty if it has none.

    The root scope inside a lifted transform begins at the lifted module's path.
    """
    tree: Any = root.variables().get("params", {})
    for name in path[len(root.path) :]:
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree if isinstance(tree, Mapping) else {}


class _Tap:
    """The interceptors of one traced call."""

    def __init__(self, probes: tuple[PyTree, ...] | None, lifted: bool):
        self.probes = probes
        self.lifted = lifted
        self.roots: list[Root] = []
        self.visits: dict[tuple[int, Path], Visit] = {}
        self._level = Scope({}).trace_level
        self._root_scope: Scope | None = None  # of the outermost call under way
        self._hidden = False  # whether that call is below a transform of the user's
        self._opened: tuple[Scope, Any] | None = None  # root scope, its own filter
        self._quiet = False  # whether a layer is being described
        self._bases: list[Scope] = []  # the first root scope of every trace
        self._mapped: set[Path] = set()  # modules that see other parameters

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
        self._bases, self._mapped = [root], set()
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
        module, scope = context.module, context.module.scope
        if scope is None or context.method_name == "setup" or self._quiet:
            return next_function(*args, **kwargs)
        if scope.root is self._root_scope and not self._hidden:
            # Scopes may be older than the call (nn.Module.bind). Inside a lifted
            # transform the transform alone decides: a collection it does not
            # carry would be lost on the way out.
            scope.mutable = union_filters(scope.mutable, INPUTS)
        liftable = scope.is_mutable_collection(INPUTS)
        liftable = liftable and (self.lifted or scope.root is self._root_scope)
        hidden = self._is_hidden(scope)
        key = (len(self.roots), tuple(scope.path))
        problem = _MAPPED if self._is_mapped(scope) else None
        describe = _layer_of(context)
        mixes = isinstance(module, nn.BatchNorm) and describe is not None
        mixes = mixes and mixes_examples(module, *args, **kwargs)
        visit = Visit(type(module).__name__, liftable, hidden, problem, mixes)
        if key not in self.visits or not visit.has_rows:
            # One use without rows would leave the others' sum incomplete.
            self.visits[key] = visit
        if not visit.has_rows:
            return next_function(*args, **kwargs)
        if describe is None:
            with _time_captured(context) if self.lifted else contextlib.nullcontext():
                function = _separate_gates(context, next_function)
                return function(*args, **kwargs)
        outputs = next_function(*args, **kwargs)
        self._quiet = True  # describing a norm runs it once more
        try:
            described = describe(module, *args, **kwargs)
        finally:
            self._quiet = False
        if isinstance(described, str):
            self.visits[key] = visit._replace(problem=described)
            return outputs
        call, a = described
        return self.tap(scope, call, a, outputs)

    def _is_mapped(self, scope: Scope) -> bool:
        """Whether the user's parameters are transformed on their way into a scope.

        Root scopes of one trace share their leaves unless `nn.map_variables`, which
        weight and spectral norm use too, has put others into their place.

        Returns:
          Whether other parameters were seen, here or in a module around it.
        """
        path, level = tuple(scope.path), scope.trace_level
        base = next((x for x in self._bases if x.trace_level == level), None)
        if base is None:
            self._bases.append(scope.root)
        elif base is not scope.root:
            own = leaves_by_path(_below(scope.root, path))
            theirs = leaves_by_path(_below(base, path))
            if any(theirs.get(name, leaf) is not leaf for name, leaf in own.items()):
                self._mapped.add(path)
        return any(path[: len(above)] == above for above in self._mapped)

    def reaches(self, scope: Scope) -> bool:
        """Whether rows can be taken from a layer with this scope."""
        if self._is_mapped(scope):
            return False
        liftable = scope.is_mutable_collection(INPUTS)
        liftable = liftable and (self.lifted or scope.root is self._root_scope)
        return liftable and not self._is_hidden(scope)

    def _is_hidden(self, scope: Scope) -> bool:
        """Whether values of the trace could not be returned from here."""
        return self._hidden or scope.trace_level != Scope({}).trace_level

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
            for path, call, values in entries(variables.get(INPUTS, {})):
                calls.setdefault(path, []).extend((call, value) for value in values)
        leaves = leaves_by_path(dict(variables.get("params", {})))
        self.roots.append(Root(calls, {path: id(x) for path, x in leaves.items()}))

    def tap(self, scope: Scope, call: LayerCall, a: Array, outputs: Array) -> Array:
        """Sows the input of a layer and adds the probe to its output."""
        name = encode(call)
        earlier = scope.get_variable(INPUTS, name, ())
        value = (a, outputs) if self.probes is None else (a,)
        scope.put_variable(INPUTS, name, (*earlier, value))
        probes = scope.get_variable(PROBES, name, ())
        if len(earlier) < len(probes):
            outputs = outputs + probes[len(earlier)].astype(outputs.dtype)
        return outputs


@contextlib.contextmanager
def _time_captured(context: nn.module.InterceptorContext) -> Iterator[None]:
    """Lets the scan of an `nn.RNN` carry the collections of capture along time."""
    module = context.module
    if not isinstance(module, nn.RNN) or context.method_name != "__call__":
        yield
        return
    axes = module.variable_axes
    # Linen modules are frozen for their users, who see it as it was.
    object.__setattr__(module, "variable_axes", {**axes, **capture_axes()})
    try:
        yield
    finally:
        object.__setattr__(module, "variable_axes", axes)


def _separate_gates(
    context: nn.module.InterceptorContext, next_function: Callable[..., Any]
) -> Callable[..., Any]:
    """Runs an `nn.OptimizedLSTMCell` as the `nn.LSTMCell` with the same parameters.

    The optimized cell multiplies with all its kernels at once, outside of any layer;
    Flax keeps the parameters of the two compatible.

    Returns:
      The function to call with the layer's arguments.
    """
    function = getattr(context.orig_method, "func", None)
    if function is None or inspect.unwrap(function) is not _OPTIMIZED_LSTM:
        return next_function
    cell: Any = context.module
    return functools.partial(nn.LSTMCell.__call__, cell)


_OPTIMIZED_LSTM = inspect.unwrap(nn.OptimizedLSTMCell.__call__)


def _layer_of(context: nn.module.InterceptorContext) -> Callable[..., Any] | None:
    function = getattr(context.orig_method, "func", None)
    return LAYERS.get(inspect.unwrap(function)) if function else None
