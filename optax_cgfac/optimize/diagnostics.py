"""Read-only views of the optimizer state."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from optax_cgfac.optimize.adaptive import CGFACState
from optax_cgfac.optimize.scale_by import ScaleByCGFACState
from optax_cgfac.solve.info import StopReason
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import summarize


def diagnostics(opt_state: Any, params: PyTree = None) -> dict[str, Any]:
    """Returns what the optimizer did in its last update, as arrays.

    Works under `jax.jit` and on states nested in `optax.chain` and the like.

    Args:
      opt_state: The state of an optimizer that contains `cgfac`, `scale_by_cgfac`
        or `scale_by_kfac`; of an `nnx.Optimizer` its ``opt_state``.
      params: The parameters, for their names where the solves are direct and the
        state holds none.

    Returns:
      A dict with ``"layers"``, for every layer its ``"cg_steps"``, its true relative
      ``"residual"`` (-1 where it was not computed), how often so far its solve was
      replaced, ``"num_replaced"``, and a captured row left out, ``"num_dropped"``, for
      a number that was not finite, and the ``"stop_reason"`` of its solve, a
      `StopReason` as int32 (by the number of the parameter where the solves are direct
      and the state holds no names); for `cgfac` also
      ``"damping"``, ``"step_size"``, ``"momentum"``, ``"reduction_ratio"`` and
      ``"num_rejected"``.

    Raises:
      ValueError: If the state contains none of them, or several.

    Example:
      >>> import jax.numpy as jnp, optax_cgfac
      >>> tx = optax_cgfac.cgfac(damping=0.1)
      >>> state = tx.init({"Dense_0": {"kernel": jnp.ones((2, 3))}})
      >>> print(diagnostics(state)["damping"])
      0.1
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
    return result


def scalars(
    opt_state: Any, params: PyTree = None, *, prefix: str = "cgfac"
) -> dict[str, Array]:
    """Returns `diagnostics` as a flat dict, as loggers take it.

    The values are arrays on the device: nothing waits for them until the logger, such
    as those of ``clu.metric_writers`` or TensorBoard, reads them. Return them from the
    compiled step and hand them on.

    Args:
      opt_state: As in `diagnostics`.
      params: As in `diagnostics`.
      prefix: The beginning of every name.

    Returns:
      Scalars by name, such as ``"cgfac/damping"`` and
      ``"cgfac/layers/encoder/Dense_0/residual"``.

    Raises:
      ValueError: As `diagnostics`.
      TypeError: If ``prefix`` is no text.

    Example:
      >>> import jax.numpy as jnp, optax_cgfac
      >>> tx = optax_cgfac.cgfac(damping=0.1)
      >>> state = tx.init({"Dense_0": {"kernel": jnp.ones((2, 3))}})
      >>> for name, value in sorted(scalars(state).items())[:3]:
      ...     print(name, value)
      cgfac/damping 0.1
      cgfac/layers/Dense_0/cg_steps 0
      cgfac/layers/Dense_0/num_dropped 0
    """
    if not isinstance(prefix, str):
        raise TypeError(
            f"prefix must be a text, got {summarize(prefix)}. Pass prefix='cgfac', say."
        )
    result = diagnostics(opt_state, params)
    layers = result.pop("layers")
    flat = {f"{prefix}/{name}": value for name, value in result.items()}
    for layer, values in layers.items():
        flat |= {f"{prefix}/layers/{layer}/{k}": v for k, v in values.items()}
    return flat


def stop_reasons(opt_state: Any, params: PyTree = None) -> dict[str, str]:
    """Returns why the last solve of every layer ended, by name.

    For people to read: it waits for the device, and is not for use under `jax.jit`,
    where `diagnostics` has the same as numbers.

    Args:
      opt_state: As in `diagnostics`.
      params: As in `diagnostics`.

    Returns:
      Names of `StopReason` by layer; of several states side by side, the worst.

    Raises:
      ValueError: As `diagnostics`.
      TypeError: If the state is traced.

    Example:
      >>> import jax.numpy as jnp, optax_cgfac
      >>> tx = optax_cgfac.cgfac(damping=0.1)
      >>> state = tx.init({"Dense_0": {"kernel": jnp.ones((2, 3))}})
      >>> stop_reasons(state)
      {'Dense_0': 'UNSOLVED'}
    """
    layers = diagnostics(opt_state, params)["layers"]
    try:
        return {
            name: StopReason(int(np.max(values["stop_reason"]))).name
            for name, values in layers.items()
        }
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
    ):
        raise TypeError(
            "stop_reasons must be given arrays, got traced ones: its result is a text. "
            "Call it outside jax.jit, and diagnostics inside."
        ) from None


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
