"""Finding layers: one abstract run of the model, matched to the parameter tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optax_cgfac.capture.call import CallSite, Capture, LayerCall, Visit, probes_like
from optax_cgfac.capture.run import run_captured
from optax_cgfac.utils.paths import Path, leaves_by_path, text
from optax_cgfac.utils.types import PyTree


class FoundCalls(NamedTuple):
    """What discovery finds at a call site: facts and input shape of every call."""

    site: CallSite
    calls: tuple[tuple[LayerCall, tuple[int, ...]], ...]


class Layer(NamedTuple):
    """A layer that an abstract run found."""

    params: dict[str, Path]  # in the parameter tree, by role: kernel, scale or bias
    found: list[FoundCalls]
    clashes: dict[str, Path]  # of uses that share only some of the parameters

    @property
    def calls(self) -> list[tuple[LayerCall, tuple[int, ...]]]:
        """Facts and input shapes of the calls at all sites."""
        return [call for found in self.found for call in found.calls]

    @property
    def call(self) -> LayerCall:
        """The facts of its first call."""
        return self.calls[0][0]

    @property
    def axes(self) -> list[int | None]:
        """The axis of examples in the input of every call."""
        return [axis for found in self.found for axis in found.site.axes]


class Discovery(NamedTuple):
    """What an abstract run of the user's function found."""

    outputs: PyTree  # shapes
    layers: dict[Path, Layer]  # by the path of their first parameter
    visits: dict[Path, Visit]  # by path in the parameter tree
    probes: tuple[PyTree, ...]  # zeros, for a captured run on such arguments
    lifted: bool  # whether layers below lifted transforms can be captured
    mixing: tuple[str, ...]  # layers whose output for an example depends on the others


def discover(function: Callable[..., PyTree], params: PyTree, *args: Any) -> Discovery:
    """Runs ``function(params, *args)`` on shapes only and finds its layers."""
    try:
        return _discover(function, params, *args, lifted=True)
    except TypeError:
        # The branches of an nn.cond or nn.switch, or the carry of an nn.while_loop,
        # may not differ in what they capture. An error of the user's own recurs.
        return _discover(function, params, *args, lifted=False)


def _discover(
    function: Callable[..., PyTree], params: PyTree, *args: Any, lifted: bool
) -> Discovery:
    links: list[dict[Path, Path]] = []
    visits: dict[tuple[int, Path], Visit] = {}

    def traced(params, *args):
        capture = run_captured(function, (params, *args), lifted=lifted)
        # Tracers keep their identity from here into the outermost module call.
        links[:] = _link(params, capture)
        visits.update(capture.visits)
        return capture.outputs, [root.calls for root in capture.roots]

    outputs, roots = jax.eval_shape(traced, params, *args)
    layers: dict[Path, Layer] = {}
    for index, calls in enumerate(roots):
        for path, captured in calls.items():
            # A module may tag several parameters of its own, a norm may have none.
            for name in dict.fromkeys(c.params[0] for c, _ in captured if c.params):
                own = [entry for entry in captured if entry[0].params[:1] == (name,)]
                roles = _params_by_role(own[0][0], path, links[index])
                if not roles:
                    continue
                layer = layers.setdefault(
                    next(iter(roles.values())), Layer(roles, [], {})
                )
                if roles != layer.params:
                    layer.clashes.update(layer.params | roles)
                site = CallSite(index, path, name, (None,) * len(own))
                shapes = tuple((call, values[0].shape) for call, values in own)
                layer.found.append(FoundCalls(site, shapes))
    probes = probes_like(roots)
    mixing = {text(path) or "." for (_, path), visit in visits.items() if visit.mixes}
    by_path = _by_path(visits, links)
    return Discovery(outputs, layers, by_path, probes, lifted, tuple(sorted(mixing)))


def with_example_axes(
    found: Discovery, function: Callable[..., PyTree], params: PyTree, *args: Any
) -> Discovery:
    """Adds the axes of examples, found by a run on ``args`` with more examples."""
    try:
        wider = discover(function, params, *args)
    except Exception:  # the function takes no other batch
        return found
    few, many = (
        {
            anchor: [[shape for _, shape in found.calls] for found in layer.found]
            for anchor, layer in discovery.layers.items()
        }
        for discovery in (found, wider)
    )
    # The function may not see the difference, or make other calls then.
    if jax.tree.structure(few) != jax.tree.structure(many) or few == many:
        return found

    def with_axes(own: FoundCalls, few: list, many: list) -> FoundCalls:
        axes = tuple(map(_first_difference, few, many))
        return own._replace(site=own.site._replace(axes=axes))

    layers = {
        anchor: layer._replace(
            found=list(map(with_axes, layer.found, few[anchor], many[anchor]))
        )
        for anchor, layer in found.layers.items()
    }
    return found._replace(layers=layers)


def _first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    sizes = enumerate(zip(one, other, strict=True))
    return next((axis for axis, (a, b) in sizes if a != b), -1)


def _params_by_role(
    call: LayerCall, path: Path, link: dict[Path, Path]
) -> dict[str, Path]:
    """Returns where a layer's parameters are in the user's tree."""
    names = {"kernel": call.kernel, "scale": call.scale, "bias": call.bias}
    return {
        role: link[*path, name]
        for role, name in names.items()
        if name is not None and (*path, name) in link
    }


def _link(params: PyTree, capture: Capture) -> list[dict[Path, Path]]:
    """Maps each root's parameter paths to paths in the user's tree."""
    leaves = leaves_by_path(params)
    by_id = {id(leaf): path for path, leaf in leaves.items()}
    links = []
    for root in capture.roots:
        link = {}
        for path, leaf_id in root.leaf_ids.items():
            if leaf_id in by_id:
                link[path] = by_id[leaf_id]
                continue
            # The user cast or rebuilt the leaf on its way: match by name.
            same = [full for full in leaves if full[-len(path) :] == path]
            if len(same) == 1:
                link[path] = same[0]
        links.append(link)
    return links


def _by_path(
    visits: dict[tuple[int, Path], Visit], links: list[dict[Path, Path]]
) -> dict[Path, Visit]:
    found = {}
    for (index, path), visit in visits.items():
        if index >= len(links):
            continue
        for inner, full in links[index].items():
            if inner[: len(path)] == path:
                prefix = full[: len(full) - len(inner) + len(path)]
                if prefix not in found or visit.problem is not None:
                    found[prefix] = visit
                break
    return found
