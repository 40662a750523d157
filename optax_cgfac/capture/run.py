"""Capture in either framework."""

from collections.abc import Callable
from typing import Any

from optax_cgfac.capture.call import Capture
from optax_cgfac.capture.linen import tap as _linen
from optax_cgfac.capture.nnx import tap as _nnx
from optax_cgfac.capture.nnx.module import ModuleFunction
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
      function: A `ModuleFunction`, or the user's function, which applies Linen modules.
      args: Its arguments, the parameters first.
      probes: One pytree per outermost module call, from `probes_like`; None to
        discover: the capture then holds outputs of tagged layers besides the inputs.
      lifted: Whether to look below Linen's lifted transforms too.
    """
    if isinstance(function, ModuleFunction):
        return _nnx.run_captured(function, args, probes)
    return _linen.run_captured(function, args, probes, lifted=lifted)
