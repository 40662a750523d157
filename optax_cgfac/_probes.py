"""What a capture returns and the probes it takes, the same for Linen and NNX."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._layers import LayerCall, decode, encode
from optax_cgfac.utils.paths import Path
from optax_cgfac.utils.types import Array, PyTree


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
      problem: Why a known layer has no rows as it is used here.
      mixes: Whether what it computes for an example depends on the others.
    """

    class_name: str
    liftable: bool
    hidden: bool
    problem: str | None = None
    mixes: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether rows can be taken from a layer that runs like this."""
        return self.liftable and not self.hidden and self.problem is None


class Capture(NamedTuple):
    """The outputs of a captured call and everything tagged on the way.

    Attributes:
      outputs: What the function returned.
      roots: The outermost module calls.
      visits: The modules that were met, by root and path below it.
      state: The state of the one NNX module as the call left it, without parameters.
    """

    outputs: PyTree
    roots: tuple[Root, ...]
    visits: dict[tuple[int, Path], Visit]
    state: PyTree = None


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
                node[encode(call)] = (*node.get(encode(call), ()), probe)
        probes.append(tree)
    return tuple(probes)


def probe_calls(probes: tuple[PyTree, ...]) -> list[dict[Path, list[Array]]]:
    """Returns probes or their cotangents by root and layer path, in call order."""
    roots = []
    for tree in probes:
        found: dict[Path, list[Array]] = {}
        for path, _, values in entries(tree):
            found.setdefault(path, []).extend(values)
        roots.append(found)
    return roots


def entries(tree: Mapping[str, Any], path: Path = ()):
    """Yields ``(layer path, call, values)`` from a collection's nested dict."""
    # Sorted, as JAX sorts the keys of what passes a transformation: inputs and
    # cotangents must come in one order where a layer is called in several ways.
    for name, value in sorted(tree.items()):
        call = decode(name)
        if call is not None:
            yield path, call, value
        elif isinstance(value, Mapping):
            yield from entries(value, (*path, name))
