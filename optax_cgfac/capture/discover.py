"""Finding layers: one abstract run of the model, matched to the parameter tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optax_cgfac.capture.call import Capture, LayerCall, Visit, probes_like
from optax_cgfac.capture.run import run_captured
from optax_cgfac.utils.paths import Path, leaves_by_path, text
from optax_cgfac.utils.types import PyTree


class Source(NamedTuple):
    """The calls of one layer below one outermost module call.

    Attributes:
      root: The index of the outermost call.
      path: The module's path below it.
      name: The layer's first parameter in the module.
      calls: Facts and input shape of every call.
    """

    root: int
    path: Path
    name: str
    calls: tuple[tuple[LayerCall, tuple[int, ...]], ...]


class Layer(NamedTuple):
    """A layer that an abstract run found.

    Attributes:
      params: Paths of its parameters in the parameter tree by their role, ``kernel``,
        ``scale`` or ``bias``.
      sources: Its calls.
      clashes: All parameters, by role, of uses that share only some of them.
    """

    params: dict[str, Path]
    sources: list[Source]
    clashes: dict[str, Path]

    @property
    def call(self) -> LayerCall:
        """The facts of its first call."""
        return self.sources[0].calls[0][0]


class Discovery(NamedTuple):
    """What an abstract run of the user's function found.

    Attributes:
      outputs: Shapes of the outputs.
      layers: Captured layers by the path of their first parameter.
      visits: The modules that were met, by path in the parameter tree.
      probes: Zero probes for a captured run on arguments of these shapes.
      lifted: Whether layers below lifted transforms can be captured.
      mixing: Layers whose output for an example depends on the others, by name.
    """

    outputs: PyTree
    layers: dict[Path, Layer]
    visits: dict[Path, Visit]
    probes: tuple[PyTree, ...]
    lifted: bool = True
    mixing: tuple[str, ...] = ()


def discover(function: Callable[..., PyTree], params: PyTree, *args: Any) -> Discovery:
    """Runs ``function(params, *args)`` on shapes only and finds its layers.

    Args:
      function: Applies Linen modules.
      params: Its first argument, the parameters.
      *args: Its other arguments.

    Returns:
      The `Discovery`.
    """
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
        for path, found in calls.items():
            # A module may tag several parameters of its own.
            # A norm may have none at all.
            for name in dict.fromkeys(c.params[0] for c, _ in found if c.params):
                own = [entry for entry in found if entry[0].params[:1] == (name,)]
                params = _params_by_role(own[0][0], path, links[index])
                anchor = next(iter(params.values()), None)
                if anchor is None:
                    continue
                shapes = tuple((call, values[0].shape) for call, values in own)
                layer = layers.setdefault(anchor, Layer(params, [], {}))
                if params != layer.params:
                    layer.clashes.update(layer.params | params)
                layer.sources.append(Source(index, path, name, shapes))
    probes = probes_like(roots)
    mixing = {text(path) or "." for (_, path), visit in visits.items() if visit.mixes}
    by_path = _by_path(visits, links)
    return Discovery(outputs, layers, by_path, probes, lifted, tuple(sorted(mixing)))


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
                if prefix not in found or not visit.has_rows:
                    found[prefix] = visit
                break
    return found


def discover_wider(
    function: Callable[..., PyTree], params: PyTree, *args: Any, found: Discovery
) -> Discovery | None:
    """Runs on a batch of another size, which tells the axes of examples apart.

    Args:
      function: As in `discover`.
      params: As in `discover`.
      *args: Shapes of the other arguments, with more examples.
      found: What `discover` found with fewer.

    Returns:
      The `Discovery`; None where the function takes no other batch, or does not see
      the difference, or makes other calls then.
    """
    try:
        wider = discover(function, params, *args)
    except Exception:
        return None

    def calls(discovery: Discovery) -> dict[Path, list[list[tuple[int, ...]]]]:
        return {
            anchor: [[shape for _, shape in source.calls] for source in layer.sources]
            for anchor, layer in discovery.layers.items()
        }

    few, many = calls(found), calls(wider)

    def ranks(sources: list[list[tuple[int, ...]]]) -> list[list[int]]:
        return [[len(shape) for shape in shapes] for shapes in sources]

    comparable = few.keys() == many.keys() and all(
        ranks(few[anchor]) == ranks(many[anchor]) for anchor in few
    )
    return wider if comparable and few != many else None
