"""Capture in Flax Linen: inputs of tagged layers and probes on their outputs.

A method interceptor sows the input of every tagged layer into one variable collection
and adds a zero, the *probe*, read from another, to its output. The gradient with
respect to the probe is the output's cotangent, in the same backward pass. Both
collections are put into the root scope when the outermost module call begins: the
user's model and ``apply`` call stay as they are, and Flax's lifted transforms carry the
collections like any other.

Flax hardly documents what is used of `flax.core.Scope`; when Flax changes it,
``tests/contract/test_flax_hooks.py`` names the change.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from flax import linen as nn
from flax.core.scope import Scope, subtract_filters, union_filters

from optax_cgfac.capture.call import Capture, LayerCall, Root, Visit, encode, entries
from optax_cgfac.capture.describe import mixes_examples
from optax_cgfac.capture.linen.layers import INPUTS, LAYERS, PROBES
from optax_cgfac.utils.paths import Path, leaves_by_path
from optax_cgfac.utils.types import Array, PyTree


def capture_axes() -> dict[str, int]:
    """Returns the ``variable_axes`` that let `nn.scan` and `nn.vmap` be captured.

    The axes of your own `nn.scan` or `nn.vmap` are fixed where you call it, so a
    stacked layer is covered only if they include the collections of capture. Rows are
    stacked along axis 0, and so must the parameters be.

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
    """Calls ``function(*args)`` with capture on; see `capture.run.run_captured`."""
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
    if tap is None or scope is None or tap.problem_of(scope):
        return outputs
    return tap.tap(scope, call, x, outputs)


_CURRENT: contextvars.ContextVar["_Tap | None"] = contextvars.ContextVar(
    "cgfac_tap", default=None
)

_MAPPED = (
    "its layer computes with a function of it (nn.map_variables, nn.WeightNorm, "
    "nn.SpectralNorm), so that the layer's rows are not those of the parameter"
)

_HIDDEN = (
    "its {} runs below a transform of JAX's own (jax.jit, checkpoint, vmap, cond, "
    "scan), or an outermost nn.jit or nn.remat, inside model_fn, out of which no rows "
    "can be taken; use nn.remat, nn.vmap or nn.scan inside the model, and jit the "
    "whole training step"
)

_UNLIFTED = (
    "its {} runs below a transform that does not carry the capture's variables: add "
    "optax_cgfac.capture_axes() to the variable_axes of nn.scan or nn.vmap; no other "
    "(nn.while_loop, say) can carry them"
)


def _below(root: Scope, path: Path) -> Mapping[str, Any]:
    """Returns the parameters of a module, empty if it has none."""
    # The root scope inside a lifted transform begins at the lifted module's path.
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
            # Entered only now, so inside every interceptor of the user's: layers are
            # tapped where they compute.
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
        key = (len(self.roots), tuple(scope.path))
        problem = self.problem_of(scope)
        function = inspect.unwrap(getattr(context.orig_method, "func", _no_layer))
        describe = LAYERS.get(function)
        is_batch_norm = isinstance(module, nn.BatchNorm) and describe is not None
        mixes = is_batch_norm and mixes_examples(module, *args, **kwargs)
        name = type(module).__name__
        visit = Visit(name, problem and problem.format(name), mixes)
        if key not in self.visits or problem:
            # One use without rows would leave the others' sum incomplete.
            self.visits[key] = visit
        if problem:
            return next_function(*args, **kwargs)
        if function is _OPTIMIZED_LSTM:
            # It multiplies with all its kernels at once, outside of any layer; the
            # plain cell has the same parameters.
            return nn.LSTMCell.__call__(cast(Any, module), *args, **kwargs)
        if describe is None:
            is_rnn = function is _RNN and self.lifted
            with _time_captured(module) if is_rnn else contextlib.nullcontext():
                return next_function(*args, **kwargs)
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
        """Whether the parameters are transformed on their way into a scope."""
        # Root scopes of one trace share their leaves unless `nn.map_variables`, which
        # weight and spectral norm use too, has replaced them, here or further out.
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

    def problem_of(self, scope: Scope) -> str | None:
        """Returns why no rows can be taken from a layer with this scope, if so."""
        if self._is_mapped(scope):
            return _MAPPED
        if self._hidden or scope.trace_level != Scope({}).trace_level:
            return _HIDDEN
        is_lifted = self.lifted or scope.root is self._root_scope
        return None if is_lifted and scope.is_mutable_collection(INPUTS) else _UNLIFTED

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
def _time_captured(rnn: Any) -> Iterator[None]:
    """Makes the scan of an `nn.RNN` carry the collections of capture along time."""
    axes = rnn.variable_axes
    if rnn.cell.scope is not None:  # made before the call, if the RNN is an attribute
        rnn.cell.scope.mutable = union_filters(rnn.cell.scope.mutable, INPUTS)
    # Linen modules are frozen; this one is Flax's bound copy, not the user's module.
    object.__setattr__(rnn, "variable_axes", {**axes, **capture_axes()})
    try:
        yield
    finally:
        object.__setattr__(rnn, "variable_axes", axes)


def _no_layer() -> None: ...


_RNN = inspect.unwrap(nn.RNN.__call__)
_OPTIMIZED_LSTM = inspect.unwrap(nn.OptimizedLSTMCell.__call__)
