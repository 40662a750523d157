"""Capture in Flax NNX: inputs of tagged layers and probes on their outputs.

NNX has no interceptors. Capture works on a *copy* of the user's module, which exists
for one traced call: its known layers get a class that sows the input into a variable of
the layer and adds a zero, the *probe*, to the output. NNX's transforms carry the
variable like any other state. No module of the user's and nothing of Flax's changes.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

from flax import errors, nnx

from optax_cgfac.capture.call import Capture, LayerCall, Root, Visit, decode, encode
from optax_cgfac.capture.describe import Describe, mixes_examples
from optax_cgfac.capture.nnx.layers import LAYERS, REPARAMETRIZED, CaptureVariable
from optax_cgfac.capture.nnx.module import ModuleFunction
from optax_cgfac.utils.paths import Path, leaves_by_path
from optax_cgfac.utils.types import Array, PyTree

ROWS, PATH = "cgfac_rows", "cgfac_path"
"""Attributes of the layers of a copy."""


def run_captured(
    function: ModuleFunction,
    args: tuple[Any, ...],
    probes: tuple[PyTree, ...] | None = None,
) -> Capture:
    """Calls ``function(*args)`` with capture on; see `capture.run.run_captured`."""
    if probes is not None:
        tap = _Tap(probes=probes[0])
        return tap.capture(tap.call(function, args))
    # Some transforms refuse modules with one variable more: first every module that
    # may tag itself has one, then only Flax's own layers, then those that work.
    for own in (True, False):
        tap = _Tap(own=own)
        with contextlib.suppress(Exception):
            return tap.capture(tap.call(function, args))
    function(*args)  # an error of the user's own recurs here
    tap = _Tap(excluded=_failing_layers(function, args))
    return tap.capture(tap.call(function, args))


def _failing_layers(function: ModuleFunction, args: tuple[Any, ...]) -> dict[Path, str]:
    """Returns the layers that some transform does not let sow, with the reasons."""

    def failure(excluded: dict[Path, str]) -> dict[Path, str]:
        tap = _Tap(excluded=excluded)
        try:
            tap.call(function, args)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:160]
            reason = _NOT_CARRIED.format(f"{type(error).__name__}: {first}")
            # Transforms check at their end what their bodies have changed: the last
            # layer that sowed is the first to suspect. Where none has, the variables
            # themselves are in the way.
            return dict.fromkeys(tap.sown[-1:] or tap.visits, reason)
        return {}

    excluded: dict[Path, str] = {}
    while more := failure(excluded):
        excluded |= more
    for path in list(excluded) if len(excluded) > 1 else ():
        fewer = {other: why for other, why in excluded.items() if other != path}
        if not failure(fewer):
            excluded = fewer
    return excluded


_NOT_CARRIED = (
    "it runs below a transform that does not carry the capture's variables ({}): in "
    "nnx.vmap or nnx.scan pass the module with in_axes "
    "nnx.StateAxes({{optax_cgfac.CaptureVariable: 0, ...: the axes as before}})"
)

_NO_LAYER = (
    "a parameter of {} itself, which is not a layer of nnx and either not tagged with "
    "optax_cgfac.tag_layer, or below a transform that does not carry the capture's "
    "variables"
)


class _Tap:
    """What one traced call of a module captures."""

    def __init__(
        self,
        *,
        probes: PyTree | None = None,
        excluded: dict[Path, str] | None = None,
        own: bool = False,
    ):
        self.probes = probes
        self.excluded = excluded or {}
        self.own = own  # whether the user's own modules may tag themselves
        self.layers: dict[Path, nnx.Module] = {}
        self.visits: dict[Path, Visit] = {}
        self.sown: list[Path] = []  # the layer of every sown row, in order

    def call(self, function: ModuleFunction, args: tuple[Any, Any]) -> PyTree:
        """Calls the function with a copy of its module that captures."""
        params, inputs = args
        self.module = function.merged(params, inputs)
        self._open()
        token = _CURRENT.set(self)
        try:
            return function.function(self.module, *inputs.args)
        finally:
            _CURRENT.reset(token)

    def _open(self) -> None:
        found = [(tuple(map(str, p)), m) for p, m in nnx.iter_modules(self.module)]
        leaves = leaves_by_path(nnx.state(self.module))
        self.leaf_ids = {path: id(leaf) for path, leaf in leaves.items()}
        replaced = {
            path
            for outer, m in found
            if isinstance(m, REPARAMETRIZED)
            for path, _ in found
            if path != outer and path[: len(outer)] == outer
        }
        for path, m in found:
            held = {n: v for n, v in vars(m).items() if isinstance(v, nnx.Variable)}
            # The second of two layers with one parameter has it by no path of its own.
            for name, value in held.items():
                self.leaf_ids[*path, name] = id(value.get_raw_value())
            is_known, problem = _is_known(type(m)), self.excluded.get(path)
            if path in replaced:
                problem = "it is called with weights that another module computes"
            if not (problem or is_known or self.own or self.probes is not None):
                problem = _NO_LAYER.format(type(m).__name__)
            self.visits[path] = Visit(type(m).__name__, problem)
            if isinstance(m, nnx.RNN):
                # Rows are stacked along time, whatever the cell's own state does.
                axes: Any = nnx.StateAxes({CaptureVariable: 0, **m.state_axes})
                m.state_axes = axes
            has_params = any(isinstance(v, nnx.Param) for v in held.values())
            if problem is None and (is_known or has_params):
                self._attach(path, m)

    def _attach(self, path: Path, module: nnx.Module) -> None:
        value: dict[str, Any] = {"rows": {}}
        if self.probes is not None:
            node: Any = self.probes
            for name in path:
                node = node.get(name, {})
            value["probes"] = {name: x for name, x in node.items() if decode(name)}
            if not value["probes"]:
                return
        self.layers[path] = module
        if _is_known(type(module)):
            cls = _tapped_class(type(module))
            # The layout is the same; modules define their own __setattr__.
            object.__setattr__(module, "__class__", cls)
        setattr(module, ROWS, CaptureVariable(value))
        setattr(module, PATH, path)

    def report(self, path: Path, problem: str) -> None:
        """Records why a layer has no rows, unless a reason is known already."""
        if path in self.visits and self.visits[path].problem is None:
            self.visits[path] = self.visits[path]._replace(problem=problem)

    def capture(self, outputs: PyTree) -> Capture:
        """Returns what was captured, and takes it off the copy."""
        calls = {}
        for path, m in self.layers.items():
            found = self._harvest(path, m)
            if found and self.visits[path].problem is None:
                calls[path] = found
        visits = {(0, path): visit for path, visit in self.visits.items()}
        state = nnx.state(self.module, nnx.Not(nnx.Param))
        return Capture(outputs, (Root(calls, self.leaf_ids),), visits, state)

    def _harvest(
        self, path: Path, module: nnx.Module
    ) -> list[tuple[LayerCall, tuple[Array, ...]]]:
        """Takes a layer's rows off it."""
        rows = getattr(module, ROWS).get_value()["rows"]
        delattr(module, ROWS)
        found: list[Any] = [
            (decode(k.rsplit("#", 2)[0]), rows[k]) for k in sorted(rows)
        ]
        if self.probes is not None:
            return found
        sown = {str(number) for number, own in enumerate(self.sown) if own == path}
        if not sown <= {key.split("#")[-1] for key in rows}:
            # Never some of the calls alone: their sum would be another gradient.
            self.report(
                path,
                "it is called on a copy of the module, below a JAX transform or in a "
                "part that was split and merged, out of which no rows come; use nnx's "
                "own transforms",
            )
        elif not found and _is_known(type(module)):
            self.report(path, "it was not called, or its own method overrides it")
        return found


_CURRENT: contextvars.ContextVar[_Tap | None] = contextvars.ContextVar(
    "cgfac_nnx_tap", default=None
)


def _is_known(cls: type) -> bool:
    return any(issubclass(cls, known) for known in LAYERS)


@functools.cache
def _tapped_class(cls: Any) -> Any:
    """Returns a subclass that sows, right above the known layer it derives from.

    A subclass of the user's that calls ``super().__call__(x)`` reaches it there, so
    that input and output are those of the known layer.
    """
    known = next(base for base in cls.__mro__ if base in LAYERS)
    if cls is not known:
        return type(cls)(cls.__name__, (cls, _tapped_class(known)), {})
    methods = {
        name: _tapped(getattr(known, name), describe)
        for name, describe in LAYERS[known].items()
    }
    return type(cls)(cls.__name__, (known,), methods)


def _tapped(method: Callable[..., Any], describe: Describe) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = method(self, *args, **kwargs)
        tap = _tap_of(self)
        if tap is None:
            return outputs
        path = vars(self)[PATH]
        if isinstance(self, nnx.BatchNorm) and mixes_examples(self, *args, **kwargs):
            tap.visits[path] = tap.visits[path]._replace(mixes=True)
        described = describe(self, *args, **kwargs)
        if isinstance(described, str):
            tap.report(path, described)
            return outputs
        return _sow(tap, self, *described, outputs)

    return call


def _tap_of(module: nnx.Module) -> _Tap | None:
    """Returns the tap that is under way, if the module is one of its layers."""
    is_tapped = isinstance(vars(module).get(ROWS), CaptureVariable)
    return _CURRENT.get() if is_tapped else None


def tag_nnx(module: nnx.Module, call: LayerCall, x: Array, outputs: Array) -> Array:
    """Taps a layer that its own module describes; see `tag_layer`."""
    tap = _tap_of(module)
    return outputs if tap is None else _sow(tap, module, call, x, outputs)


def _sow(
    tap: _Tap, module: nnx.Module, call: LayerCall, x: Array, outputs: Array
) -> Array:
    """Stores the input of a layer in it and adds the probe to its output."""
    variable, path = vars(module)[ROWS], vars(module)[PATH]
    value = variable.get_value()
    name = encode(call)
    earlier = sum(key.startswith(name + "#") for key in value["rows"])
    key = f"{name}#{earlier:04d}#"
    if "probes" in value:
        row = (x,)
    else:
        # Discovery numbers the rows, to see whether all of them come out.
        key += str(len(tap.sown))
        row = (x, outputs)
    tap.sown.append(path)
    try:
        variable.set_value({**value, "rows": {**value["rows"], key: row}})
    except errors.TraceContextError:
        tap.report(
            path,
            "it runs below a JAX transform (jax.jit, checkpoint, cond, vmap, scan) "
            "over a module from outside, out of which no rows can be taken; use "
            "nnx.jit, nnx.remat, nnx.vmap or nnx.scan with the module as argument",
        )
        return outputs
    probes = value.get("probes", {}).get(name, ())
    if earlier < len(probes):
        outputs = outputs + probes[earlier].astype(outputs.dtype)
    return outputs
