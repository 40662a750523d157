"""Read-only views of the optimizer state."""

from typing import Any

import jax
from flax import nnx

from optax_cgfac.optimize.scale_by import ScaleByCGFACState
from optax_cgfac.optimize.state import CGFACState
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import summarize


def diagnostics(
    opt_state: Any, params: PyTree = None, *, flat: bool = False
) -> dict[str, Any]:
    """Returns what the optimizer did in its last update, as arrays.

    Works under `jax.jit` and on states nested in `optax.chain` and the like. Nothing
    waits for the device until the arrays are read.

    Args:
      opt_state: The state of an optimizer that contains `cgfac`, `scale_by_cgfac`
        or `scale_by_kfac`; of an `nnx.Optimizer` its ``opt_state``.
      params: The parameters, for the layers' names where the solves are direct and the
        state holds none.
      flat: Whether to return one flat dict for loggers, with names such as
        ``"cgfac/damping"`` and ``"cgfac/layers/encoder/Dense_0/residual"``.

    Returns:
      A dict. ``"layers"`` has for every layer (numbered where no names are known):

      - ``"cg_steps"``, and the true relative ``"residual"``, -1 for direct solves;
      - ``"stop_reason"``: why the solve ended, a `StopReason` as int32;
      - ``"num_replaced"``: solves so far whose result was not finite and was replaced;
      - ``"num_dropped"``: captured rows so far that were not finite and were left out.

      With `cgfac` it also has ``"damping"``, ``"step_size"``, ``"momentum"``,
      ``"reduction_ratio"`` and ``"num_rejected"``.

    Raises:
      ValueError: If the state contains none of them, or several.

    Example:
      >>> import jax.numpy as jnp, optax_cgfac
      >>> tx = optax_cgfac.cgfac(damping=0.1)
      >>> state = tx.init({"Dense_0": {"kernel": jnp.ones((2, 3))}})
      >>> print(diagnostics(state)["damping"])
      0.1
      >>> for name, value in sorted(diagnostics(state, flat=True).items())[:2]:
      ...     print(name, value)
      cgfac/damping 0.1
      cgfac/layers/Dense_0/cg_steps 0
    """
    kinds = (CGFACState, ScaleByCGFACState)
    opt_state = _without_variables(opt_state)
    found = [
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
        if isinstance(leaf, kinds)
    ]
    if len(found) != 1:
        raise ValueError(
            f"Expected one CG-FAC state inside opt_state, found {len(found)} (in "
            f"{summarize(opt_state)}). Pass the state of one optimizer that contains "
            "cgfac, scale_by_cgfac or scale_by_kfac."
        )
    (state,) = found
    result: dict[str, Any] = {"layers": _layers(state, params)}
    if isinstance(state, CGFACState):
        result |= {
            "damping": state.damping,
            "step_size": state.step_size,
            "momentum": state.momentum,
            "reduction_ratio": state.reduction_ratio,
            "num_rejected": state.num_rejected,
        }
    if not flat:
        return result
    layers = result.pop("layers")
    flattened = {f"cgfac/{name}": value for name, value in result.items()}
    for layer, values in layers.items():
        flattened |= {f"cgfac/layers/{layer}/{k}": v for k, v in values.items()}
    return flattened


def _without_variables(opt_state: Any) -> Any:
    """Returns the arrays of a state that `nnx.Optimizer` has wrapped one by one."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: x[...] if is_variable(x) else x, opt_state, is_leaf=is_variable
    )


def _layers(
    state: CGFACState | ScaleByCGFACState, params: PyTree
) -> dict[str, dict[str, Any]]:
    tree = state.velocity if isinstance(state, CGFACState) else state.warm_start
    tree = params if tree is None else tree
    # A direct solve keeps nothing that is shaped like the parameters.
    count = state.info.num_steps.shape[-1]
    paths = list(leaves_by_path(tree)) if tree is not None else []
    if len(paths) != count:  # no names, or those of parameters that a mask leaves out
        paths = [_numbered(index) for index in range(count)]
    return {
        text(path[:-1]) or ".": {
            "cg_steps": state.info.num_steps[..., index],
            "residual": state.info.residual[..., index],
            "num_replaced": state.info.num_replaced[..., index],
            "stop_reason": state.info.reason[..., index],
            "num_dropped": state.info.num_dropped[..., index],
        }
        for index, path in enumerate(paths)
    }


def _numbered(index: int) -> tuple[str, str]:
    return f"leaf_{index}", ""
