"""Capture in either framework, told apart by what holds the parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from optax_cgfac.capture.call import Capture
from optax_cgfac.capture.linen import tap as _linen
from optax_cgfac.capture.nnx import tap as _nnx
from optax_cgfac.utils.types import PyTree


def run_captured(
    function: Callable[..., PyTree],
    args: tuple[Any, ...],
    probes: tuple[PyTree, ...] | None = None,
    *,
    lifted: bool = True,
) -> Capture:
    """Calls ``function(*args)`` with capture on.

    Args:
      function: The user's function; it applies Linen modules, or, where the first
        argument is an `nnx.State`, an NNX module.
      args: Its arguments, the parameters first.
      probes: One pytree per outermost module call, from `probes_like`; None to
        discover: outputs of tagged layers are then returned beside the inputs.
      lifted: Whether to look below Linen's lifted transforms too.

    Returns:
      The `Capture`.
    """
    if isinstance(args[0], nnx.State):
        return _nnx.run_captured(function, args, probes)
    return _linen.run_captured(function, args, probes, lifted=lifted)
