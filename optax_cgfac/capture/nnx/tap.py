"""Capture in Flax NNX: inputs of tagged layers and probes on their outputs.

NNX has no interceptors. Capture works on a *copy* of the user's module, which exists
for one traced call: its known layers get a class that sows the input into a variable of
the layer and adds a zero, the *probe*, to the output. NNX's transforms carry the
variable like any other state; nothing of the user's, and no class of Flax's, changes.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

from flax import errors, nnx
from flax.core.scope import Scope

from optax_cgfac.capture.call import Capture, LayerCall, Root, Visit, decode, encode
from optax_cgfac.capture.describe import mixes_examples
from optax_cgfac.capture.nnx.layers import (
    LAYERS,
    REPARAMETRIZED,
    CaptureVariable,
    Describe,
)
from optax_cgfac.utils.paths import Path, leaves_by_path
from optax_cgfac.utils.types import Array, PyTree

ROWS = "cgfac_rows"


SITE = "cgfac_site"


def run_captured(
    function: Callable[..., PyTree],
    args: tuple[Any, ...],
    probes: tuple[PyTree, ...] | None = None,
) -> Capture:
    """Calls ``function(*args)`` with capture on.

    Args:
      function: A `ModuleFunction`, or the user's function, which merges its module
        from the state by ``nnx.merge``.
      args: Its arguments.
      probes: One pytree per merged module, from `probes_like`; None to discover:
        outputs of tagged layers are then returned beside the inputs.

    Returns:
      The `Capture`.
    """
    if probes is not None:
        tap = _Tap(probes=probes)
        return tap.capture(_called(tap, function, args))
    # Some transforms refuse modules with one variable more: first every module that
    # may tag itself has one, then only Flax's own layers, then those that work.
    for own in (True, False):
        tap = _Tap(own=own)
        with contextlib.suppress(Exception):
            return tap.capture(_called(tap, function, args))
    # An error of the user's own recurs here.
    _called(_Tap(attach=False), function, args)
    tap = _Tap(excluded=_failing_sites(function, args))
    return tap.capture(_called(tap, function, args))


def _called(tap: "_Tap", function: Callable[..., PyTree], args: tuple) -> PyTree:
    with tap:
        return function(*args)


def _failing_sites(
    function: Callable[..., PyTree], args: tuple[Any, ...]
) -> "dict[Site, str]":
    """Finds the layers that some transform does not let sow, with the reason.

    Transforms check at their end what their bodies have changed, so that the last
    layer that sowed is the first to suspect.

    Returns:
      The reasons by site.
    """

    def failure(excluded: dict[Site, str]) -> dict[Site, str]:
        """Returns whom to exclude too, nobody where all is well."""
        tap = _Tap(excluded=excluded)
        try:
            _called(tap, function, args)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:160]
            reason = _NOT_CARRIED.format(f"{type(error).__name__}: {first}")
            last = list(tap.touched)[-1:]
            # Without any layer that sowed, the variables themselves are in the way.
            return dict.fromkeys(last or tap.visits, reason)
        return {}

    excluded: dict[Site, str] = {}
    while more := failure(excluded):
        excluded |= more
    for site in list(excluded) if len(excluded) > 1 else ():
        fewer = {other: why for other, why in excluded.items() if other != site}
        if not failure(fewer):
            excluded = fewer
    return excluded


_NOT_CARRIED = (
    "it runs below a transform that does not carry the capture's variables ({}): in "
    "nnx.vmap or nnx.scan pass the module with in_axes "
    "nnx.StateAxes({{optax_cgfac.CaptureVariable: 0, ...: the axes as before}})"
)


Site = tuple[int, Path]  # the merged module's index, the layer's path below it


class _Tap:
    """What one traced call captures; active in its own thread, inside ``with``."""

    def __init__(
        self,
        *,
        probes: tuple[PyTree, ...] | None = None,
        excluded: dict[Site, str] | None = None,
        attach: bool = True,
        own: bool = False,
    ):
        self.probes = probes
        self.excluded = excluded or {}
        self.attach = attach
        self.own = (
            own  # whether modules that are no layers of Flax's may tag themselves
        )
        self.modules: list[tuple[nnx.Module, dict[Path, Any], dict[Path, int]]] = []
        self.whole: nnx.Module | None = None
        self.visits: dict[Site, Visit] = {}
        self.touched: dict[Site, set[str]] = {}  # in the order of the last touch
        self._level = Scope({}).trace_level
        self._tokens = itertools.count()

    def __enter__(self) -> "_Tap":
        self._outer = getattr(_LOCAL, "tap", None)
        _LOCAL.tap = self
        return self

    def __exit__(self, *exception: object) -> None:
        _LOCAL.tap = self._outer

    def open(self, module: nnx.Module) -> None:
        """Prepares a merged module, which nobody else holds, for its calls."""
        index = len(self.modules)
        found = [(tuple(map(str, path)), m) for path, m in nnx.iter_modules(module)]
        if any(SITE in vars(m) for _, m in found):
            return  # merged again from a part of a module that is open
        hidden = Scope({}).trace_level != self._level
        leaf_ids = {
            path: id(leaf) for path, leaf in leaves_by_path(nnx.state(module)).items()
        }
        replaced = {
            path
            for outer, m in found
            if isinstance(m, REPARAMETRIZED)
            for path, _ in found
            if path != outer and path[: len(outer)] == outer
        }
        layers = {}
        for path, m in found:
            site = (index, path)
            # The second of two layers with one parameter has it by no path of its own.
            for name, value in vars(m).items():
                if isinstance(value, nnx.Variable):
                    leaf_ids[*path, name] = id(value.get_raw_value())
            problem = self.excluded.get(site)
            if path in replaced:
                problem = "it is called with weights that another module computes"
            sows = _is_known(type(m)) or _has_params(m)
            if not (
                problem or _is_known(type(m)) or self.own or self.probes is not None
            ):
                problem = _NO_LAYER.format(type(m).__name__)
            self.visits[site] = Visit(type(m).__name__, True, hidden, problem)
            if isinstance(m, nnx.RNN):
                # Rows are stacked along time, whatever the cell's own state does.
                axes: Any = nnx.StateAxes({CaptureVariable: 0, **m.state_axes})
                m.state_axes = axes
            if not self.attach or hidden or problem or not sows:
                continue  # nobody can or need sow
            probes = self._probes_of(site)
            if self.probes is None or probes:
                layers[path] = m
                _attach(m, site, probes)
        self.modules.append((module, layers, leaf_ids))

    def _probes_of(self, site: Site) -> dict[str, Any] | None:
        index, path = site
        if self.probes is None:
            return None
        node: Any = self.probes[index] if index < len(self.probes) else {}
        for name in path:
            node = node.get(name, {})
        return {name: value for name, value in node.items() if decode(name)}

    def touch(self, site: Site) -> str:
        """Notes that a layer sows; returns a token that must come out with it."""
        tokens = self.touched.pop(site, set())
        token = str(next(self._tokens))
        self.touched[site] = tokens | {token}
        return token

    def report(self, site: Site, problem: str) -> None:
        """Records why a layer has no rows."""
        if site in self.visits and self.visits[site].has_rows:
            self.visits[site] = self.visits[site]._replace(problem=problem)

    def capture(self, outputs: PyTree) -> Capture:
        """Returns what was captured, and takes it off the copies."""
        roots = []
        for index, (module, layers, leaf_ids) in enumerate(self.modules):
            calls = {}
            for path, m in layers.items():
                found, tokens = _harvest(m)
                if self.probes is None:
                    self._check((index, path), m, found, tokens)
                if found and self.visits[index, path].has_rows:
                    calls[path] = found
            roots.append(Root(calls, leaf_ids))
            if not self.attach or self.probes is not None:
                continue
            for path, m in nnx.iter_modules(module):
                site = (index, tuple(map(str, path)))
                if _is_known(type(m)) and site[1] not in layers:
                    self.report(site, "its class overrides what its parent computes")
        state = None
        if self.whole is not None:
            state = nnx.state(self.whole, nnx.Not(nnx.Param))
        return Capture(outputs, tuple(roots), self.visits, state)

    def _check(
        self, site: Site, module: nnx.Module, found: list, tokens: set[str]
    ) -> None:
        traced = self.touched.get(site, set())
        if not traced <= tokens:
            # Never some of the calls alone: their sum would be another gradient.
            self.report(
                site,
                "it is called on a copy of the module, below a JAX transform or in a "
                "part that was split and merged, out of which no rows come; use nnx's "
                "own transforms",
            )
        elif not found and _is_known(type(module)):
            self.report(site, "it was not called, or its own method overrides it")


_LOCAL = threading.local()


_LOCK = threading.Lock()


def _attach(module: nnx.Module, site: Site, probes: dict[str, Any] | None) -> None:
    value: dict[str, Any] = {"rows": {}}
    if probes is not None:
        value["probes"] = probes
    if _is_known(type(module)):
        with _LOCK:
            cls = _tapped_class(type(module))
        # The layout is the same; modules define their own __setattr__.
        object.__setattr__(module, "__class__", cls)
    setattr(module, ROWS, CaptureVariable(value))
    setattr(module, SITE, site)


def _harvest(
    module: nnx.Module,
) -> tuple[list[tuple[LayerCall, tuple[Array, ...]]], set[str]]:
    """Takes a layer's rows off it; returns them and the tokens they came with."""
    rows = getattr(module, ROWS).get_value()["rows"]
    delattr(module, ROWS)
    found, tokens = [], set()
    for key in sorted(rows):
        name, _, token = key.rsplit("#", 2)
        call = decode(name)
        if call is None:
            raise ValueError(
                f"The attribute {ROWS!r} of a module holds {key!r}, which is no "
                "captured call: the name is reserved for optax_cgfac, rename yours."
            )
        found.append((call, rows[key]))
        tokens.add(token)
    return found, tokens


_NO_LAYER = (
    "a parameter of {} itself, which is no layer of nnx and either not tagged with "
    "optax_cgfac.tag_layer, or below a transform that does not carry the capture's "
    "variables"
)


def _has_params(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def open_module(module: nnx.Module, *, is_whole: bool = False) -> None:
    """Prepares a module that was merged for this call alone, where capture is on.

    Args:
      module: The module; anything else is left alone.
      is_whole: Whether it is a copy of the user's module, which hears of its changes.
    """
    tap = getattr(_LOCAL, "tap", None)
    if tap is not None and isinstance(module, nnx.Module):
        tap.open(module)
        tap.whole = module if is_whole else tap.whole


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
        tap = getattr(_LOCAL, "tap", None)
        if tap is None or not isinstance(vars(self).get(ROWS), CaptureVariable):
            return outputs
        if isinstance(self, nnx.BatchNorm) and mixes_examples(self, *args, **kwargs):
            site = vars(self)[SITE]
            tap.visits[site] = tap.visits[site]._replace(mixes=True)
        described = describe(self, *args, **kwargs)
        if isinstance(described, str):
            tap.report(vars(self)[SITE], described)
            return outputs
        return _sow(tap, self, *described, outputs)

    return call


def tag_nnx(module: nnx.Module, call: LayerCall, x: Array, outputs: Array) -> Array:
    """Taps a layer that its own module describes; see `tag_layer`."""
    tap = getattr(_LOCAL, "tap", None)
    if tap is None or not isinstance(vars(module).get(ROWS), CaptureVariable):
        return outputs
    return _sow(tap, module, call, x, outputs)


def _sow(
    tap: _Tap, module: nnx.Module, call: LayerCall, x: Array, outputs: Array
) -> Array:
    """Stores the input of a layer in it and adds the probe to its output."""
    variable, site = vars(module)[ROWS], vars(module)[SITE]
    value = variable.get_value()
    name = encode(call)
    earlier = sum(key.startswith(name + "#") for key in value["rows"])
    token = tap.touch(site)
    discovers = "probes" not in value
    row = (x, outputs) if discovers else (x,)
    key = f"{name}#{earlier:04d}#{token if discovers else ''}"
    try:
        variable.set_value({**value, "rows": {**value["rows"], key: row}})
    except errors.TraceContextError:
        tap.report(
            site,
            "it runs below a JAX transform (jax.jit, checkpoint, cond, vmap, scan) "
            "over a module from outside, out of which no rows can be taken; use "
            "nnx.jit, nnx.remat, nnx.vmap or nnx.scan with the module as argument",
        )
        return outputs
    probes = value.get("probes", {}).get(name, ())
    if earlier < len(probes):
        outputs = outputs + probes[earlier].astype(outputs.dtype)
    return outputs
