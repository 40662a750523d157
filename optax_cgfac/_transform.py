"""The building blocks: `scale_by_cgfac` and `scale_by_kfac`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cgfac._parameter_checks import check_trained
from optax_cgfac._precondition import precondition
from optax_cgfac._update_checks import (
    Missing,
    check_curvature,
    check_state,
    check_trees,
)
from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.solve.choose import SolveConfig, Structure
from optax_cgfac.solve.info import SolveInfo, init_info
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    check_choice,
    check_damping,
    check_number,
    check_positive,
    check_scheduled,
    check_switch,
)

ScalarOrSchedule = float | Array | Callable[[Array], Array]


class ScaleByCGFACState(NamedTuple):
    """State of `scale_by_cgfac`.

    Attributes:
      cgfac_count: Updates so far, int32.
      warm_start: The previous solution, like the parameters; None if unused.
      info: How the last solves went.
    """

    cgfac_count: Array
    warm_start: PyTree | None
    info: SolveInfo


def scale_by_cgfac(
    damping: ScalarOrSchedule,
    *,
    structure: Structure = "kronecker",
    damping_form: Literal["tikhonov", "factored"] = "tikhonov",
    space: Literal["auto", "parameter", "sample"] = "auto",
    solver: Literal["auto", "cg", "cholesky"] = "auto",
    max_steps: int = 10,
    rtol: float = 1e-2,
    warm_start: bool = True,
    preconditioner: Literal["jacobi"] | None = None,
    solve_axis: str | None = None,
    certify: bool = False,
    missing: Missing = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients by the inverse of the damped Kronecker-factored Fisher.

    For every layer with gradient ``B`` it solves

    .. math:: (A ⊗ G + γ I)\, X = B, \qquad A = aᵀa/R, \quad G = gᵀg/R,

    by conjugate gradients started from the previous solution, without forming
    ``A``, ``G`` or their product. Rows whose cotangent is zero (padding, dead units)
    count in ``G`` and not in ``A``. The result has the sign of the gradient, as in
    `optax.scale_by_adam`: chain it with `optax.scale_by_learning_rate`.

    Args:
      damping: ``γ``: a float, a schedule of the update count, or a traced value
        from `optax.inject_hyperparams`.
      structure: ``"kronecker"`` (K-FAC); ``"block"``, the exact Fisher block of each
        layer; ``"full"``, the Fisher of all layers together. The last two need all
        positions of an example (``fisher_estimator(..., positions=None)``), have no
        factors, and are solved among the examples. They are of low rank: outside the
        few gradients they know, the step is that of gradient descent with rate
        ``1/γ``, so ``γ`` must be larger than for ``"kronecker"``.
      damping_form: ``"tikhonov"`` as above, or ``"factored"``:
        ``(A + αI) ⊗ (G + βI)`` with ``αβ = γ`` (Martens & Grosse 2015, section
        6.3), the more robust form with few rows.
      space: ``"parameter"`` iterates on parameters (Algorithm 2 as printed),
        ``"sample"`` does the same iterates on row coefficients; ``"auto"`` takes
        the cheaper for each layer.
      solver: ``"cg"``; for factored damping also ``"cholesky"`` of one
        ``min(R, n)``-sized matrix per side, which ``"auto"`` prefers there.
      max_steps: CG iterations per solve at most (per side if factored).
      rtol: CG stops at this residual relative to the gradient.
      warm_start: Whether CG starts from the previous solution, where that is better
        than zero.
      preconditioner: ``"jacobi"`` for ``space="parameter"``, or None.
      solve_axis: A mesh axis over whose devices the layers' systems are spread, by
        cost, and the solutions gathered; None to solve all of them on every device.
        The axis of the `jax.shard_map` around the update, or under `jax.jit` one of
        the mesh that `jax.set_mesh` has set.
      certify: Whether every solve ends with one more product with the layer's operator
        that tells its true residual (see `diagnostics`). Without it CG reports the
        residual that it recomputes in its own space (among rows accurate to the root
        of the precision), and a solve without iterations none.
      missing: What to do without ``curvature=``: ``"raise"``, or ``"gradient"``
        to pass gradients through.

    Returns:
      A transformation whose ``update`` takes the keyword argument ``curvature``.

    Raises:
      ValueError: If an option is unknown or a number out of range.
      TypeError: If an option is of another type.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> from optax_cgfac import scale_by_cgfac, value_and_grad
      >>> model = nn.Dense(1)
      >>> x = jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params):
      ...     return jnp.mean((model.apply({"params": params}, x) - 1) ** 2)
      >>> tx = optax.chain(scale_by_cgfac(1.0), optax.scale_by_learning_rate(0.1))
      >>> state = tx.init(params)
      >>> value, grads, curvature = value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, curvature=curvature)
      >>> updates["kernel"].shape
      (3, 1)

    References:
      Chen (2021), "An Iterative K-FAC Algorithm for Deep Learning", Algorithm 2.
    """
    check_limits(max_steps, rtol, warm_start)
    config = SolveConfig(
        damping_form=damping_form,
        space=space,
        solver=solver,
        max_steps=max_steps,
        rtol=rtol,
        preconditioner=preconditioner,
        structure=structure,
        axis=solve_axis,
        certify=certify,
    )
    keeps_start = warm_start and config.is_iterative
    return _scale_by("scale_by_cgfac", config, damping, keeps_start, missing)


def scale_by_kfac(
    damping: ScalarOrSchedule,
    *,
    damping_form: Literal["tikhonov", "factored"] = "tikhonov",
    solve_axis: str | None = None,
    certify: bool = False,
    missing: Missing = "raise",
) -> optax.GradientTransformationExtraArgs:
    """Like `scale_by_cgfac`, solved exactly by eigendecompositions of the factors.

    Forms ``A`` and ``G`` of every layer: the baseline that CG-FAC replaces
    (Chen 2021, Algorithm 1), cubic in the layer's width.

    Args:
      damping: As in `scale_by_cgfac`.
      damping_form: As in `scale_by_cgfac`.
      solve_axis: As in `scale_by_cgfac`.
      certify: As in `scale_by_cgfac`.
      missing: As in `scale_by_cgfac`.

    Returns:
      A transformation whose ``update`` takes the keyword argument ``curvature``.

    Raises:
      ValueError: If an option is unknown or a number out of range.
      TypeError: If an option is of another type.

    Example:
      >>> tx = scale_by_kfac(1e-3)

    References:
      Martens & Grosse (2015); Chen (2021), Algorithm 1.
    """
    config = SolveConfig(
        damping_form=damping_form,
        solver="eigendecomposition",
        axis=solve_axis,
        certify=certify,
    )
    return _scale_by("scale_by_kfac", config, damping, False, missing)


def _scale_by(
    name: str,
    config: SolveConfig,
    damping: ScalarOrSchedule,
    warm_start: bool,
    missing: Missing,
) -> optax.GradientTransformationExtraArgs:
    check_damping(damping)
    check_missing(missing)

    def init(params: PyTree) -> ScaleByCGFACState:
        if missing == "raise":
            check_trained(name, params)
        start = jax.tree.map(jnp.zeros_like, params) if warm_start else None
        return ScaleByCGFACState(jnp.zeros((), jnp.int32), start, init_info(params))

    def update(
        updates: PyTree,
        state: ScaleByCGFACState,
        params: PyTree | None = None,
        *,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByCGFACState]:
        del params, extra_args
        check_state(name, state, ScaleByCGFACState)
        count = jnp.asarray(optax.safe_increment(state.cgfac_count))
        curvature = check_curvature(curvature, missing)
        if curvature is None:
            return updates, state._replace(cgfac_count=count)
        num_leaves = state.info.num_steps.shape[-1]
        check_trees(name, updates, None, state.warm_start, num_leaves)
        gamma = jnp.asarray(current("damping", damping, state.cgfac_count))
        solution, info = precondition(
            config, curvature, updates, state.warm_start, gamma, state.info
        )
        start = None
        if state.warm_start is not None:
            start = jax.tree.map(
                lambda x, old: x.astype(old.dtype), solution, state.warm_start
            )
        return solution, ScaleByCGFACState(count, start, info)

    return gradient_transformation(init, update)


def gradient_transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Returns the pair as Optax's type, whose own aliases admit no NamedTuple state."""
    return optax.GradientTransformationExtraArgs(init, update)


def current(name: str, value: ScalarOrSchedule, count: Array) -> Any:
    """Returns an option's value at a count of updates, a schedule's or its own.

    Raises:
      ValueError: If a schedule returns several numbers.
      TypeError: If it returns no number.
    """
    if not callable(value):
        return value
    value = value(count)
    check_scheduled(name, value)
    return value


def check_missing(missing: Any) -> None:
    """Checks the option ``missing``.

    Raises:
      ValueError: If it is unknown.
    """
    check_choice("missing", missing, ("raise", "gradient"))


def check_limits(max_steps: Any, rtol: Any, warm_start: Any) -> None:
    """Checks the options of an iterative solve, as far as they are no names.

    Raises:
      ValueError: If one is out of range.
      TypeError: If one is of another type.
    """
    check_positive("max_steps", max_steps, may_be_array=True)
    check_number("rtol", rtol, BELOW_ONE, 1e-2)
    check_switch("warm_start", warm_start)
