"""Read-only views of the optimizer state."""

from typing import Any

import jax

from optax_cgfac._paths import leaves_by_path, text
from optax_cgfac._precondition import SolveInfo
from optax_cgfac._step import CGFACState
from optax_cgfac._transform import ScaleByCGFACState


def diagnostics(opt_state: Any) -> dict[str, Any]:
    """Returns what the optimizer did in its last update, as arrays.

    Works under `jax.jit` and on states nested in `optax.chain` and the like.

    Args:
      opt_state: The state of an optimizer that contains `cgfac`, `scale_by_cgfac`
        or `scale_by_kfac`.

    Returns:
      A dict with ``"layers"``, for every layer its ``"cg_steps"``, its relative
      ``"residual"`` and its ``"num_fallbacks"``; for `cgfac` also ``"damping"``,
      ``"step_size"``, ``"momentum"``, ``"reduction_ratio"`` and
      ``"num_rejected"``.

    Raises:
      ValueError: If the state contains none of them, or several.

    Example:
      >>> import jax.numpy as jnp, optax_cgfac
      >>> tx = optax_cgfac.cgfac()
      >>> state = tx.init({"Dense_0": {"kernel": jnp.ones((2, 3))}})
      >>> print(diagnostics(state)["damping"])
      0.1
    """
    kinds = (CGFACState, ScaleByCGFACState)
    found = [
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
        if isinstance(leaf, kinds)
    ]
    if len(found) != 1:
        raise ValueError(
            f"Expected one CG-FAC state inside opt_state, found {len(found)}. Pass the "
            "state of one optimizer."
        )
    (state,) = found
    result: dict[str, Any] = {"layers": _layers(state.info)}
    if isinstance(state, CGFACState):
        result |= {
            "damping": state.damping,
            "step_size": state.step_size,
            "momentum": state.momentum,
            "reduction_ratio": state.reduction_ratio,
            "num_rejected": state.num_rejected,
        }
    return result


def _layers(info: SolveInfo) -> dict[str, dict[str, Any]]:
    steps, residuals, fallbacks = map(leaves_by_path, info)
    return {
        text(path[:-1]) or ".": {
            "cg_steps": steps[path],
            "residual": residuals[path],
            "num_fallbacks": fallbacks[path],
        }
        for path in steps
    }
