"""The building blocks: `scale_by_cgfac` and `scale_by_kfac`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cgfac.curvature.curvature import Curvature, check_rows
from optax_cgfac.optimize.precondition import precondition
from optax_cgfac.solve.choose import SolveSpec, Structure
from optax_cgfac.solve.info import SolveInfo, init_info
from optax_cgfac.utils.paths import leaves_by_path, text
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    NOT_NEGATIVE,
    check_alike,
    check_number_or_schedule,
    check_scheduled,
    is_floating,
    summarize,
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
    solver: Literal["auto", "cg", "cholesky"] = "auto",
    space: Literal["auto", "parameter", "sample"] = "auto",
    max_steps: int | None = None,
    rtol: float | None = None,
    warm_start: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients by the inverse of the damped Kronecker-factored Fisher.

    For every layer with gradient ``B`` it solves

    .. math:: (A ⊗ G + γ I)\, X = B, \qquad A = aᵀa/R, \quad G = gᵀg/R,

    by conjugate gradients started from the previous solution, without forming
    ``A``, ``G`` or their product. Rows whose cotangent is zero (padding, dead units)
    count in ``G`` and not in ``A``. The result has the sign of the gradient, as in
    `optax.scale_by_adam`: chain it with `optax.scale_by_learning_rate`.

    Args:
      damping: The system: ``γ``, a float, a schedule of the update count, or a traced
        value from `optax.inject_hyperparams`.
      structure: The system: ``"kronecker"`` (K-FAC); ``"block"``, the exact Fisher
        block of each layer; ``"full"``, the Fisher of all layers together. The last two
        need all positions of an example (``fisher_estimator(..., positions=None)``) and
        are solved in sample space. Outside the span of the few samples the step is that
        of gradient descent with rate ``1/γ``, so ``γ`` must be larger than for
        ``"kronecker"``.
      damping_form: The system: ``"tikhonov"`` as above, or ``"factored"``:
        ``(A + αI) ⊗ (G + βI)`` with ``αβ = γ`` (Martens & Grosse 2015, section
        6.3), the more robust form with few rows.
      solver: The solver: ``"cg"``; ``"cholesky"`` of one ``min(R, n)``-sized matrix per
        side (factored damping) or of one matrix of the samples (``"block"``,
        ``"full"``). ``"auto"`` takes CG, or for factored damping the eigenpairs where
        they are kept and ``"cholesky"`` elsewhere. CG and ``"cholesky"`` solve with the
        rows: ``fisher_estimator(rank=None)`` keeps them in full precision.
      space: Conjugate gradients: ``"parameter"`` iterates on parameters (Algorithm 2 as
        printed), ``"sample"`` does the same iterates in sample space; ``"auto"`` takes
        the cheaper for each layer.
      max_steps: Conjugate gradients: iterations per solve at most (per side if
        factored); 10 by default.
      rtol: Conjugate gradients: they stop at this residual relative to the gradient;
        1e-2 by default.
      warm_start: Conjugate gradients: whether they start from the previous solution,
        where that is better than zero; on by default.

    Returns:
      A transformation whose ``update`` takes the keyword argument ``curvature``.

    Raises:
      ValueError: If an option is unknown, out of range, or contradicts another, such
        as ``max_steps`` where no conjugate gradients run.
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
    spec = SolveSpec(
        structure=structure,
        damping_form=damping_form,
        solver=solver,
        space=space,
        max_steps=max_steps,
        rtol=rtol,
        warm_start=warm_start,
    )
    return _scale_by("scale_by_cgfac", spec, damping)


def scale_by_kfac(
    damping: ScalarOrSchedule,
    *,
    damping_form: Literal["tikhonov", "factored"] = "tikhonov",
) -> optax.GradientTransformationExtraArgs:
    """Like `scale_by_cgfac`, solved exactly by eigendecompositions of the factors.

    Forms ``A`` and ``G`` of every layer: the baseline that CG-FAC replaces
    (Chen 2021, Algorithm 1), cubic in the layer's width.

    Args:
      damping: As in `scale_by_cgfac`.
      damping_form: As in `scale_by_cgfac`.

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
    spec = SolveSpec(damping_form=damping_form, solver="eigendecomposition")
    return _scale_by("scale_by_kfac", spec, damping)


def _scale_by(
    name: str, spec: SolveSpec, damping: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    check_number_or_schedule("damping", damping, NOT_NEGATIVE, 0.1)

    def init(params: PyTree) -> ScaleByCGFACState:
        check_trained(name, params)
        start = jax.tree.map(jnp.zeros_like, params) if spec.keeps_start else None
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
        curvature = check_curvature(curvature)
        kept = updates if state.warm_start is None else state.warm_start
        check_fit(name, updates, kept)
        gamma = jnp.asarray(current("damping", damping, state.cgfac_count))
        solution, info = precondition(
            spec, curvature, updates, state.warm_start, gamma, state.info
        )
        count = jnp.asarray(optax.safe_increment(state.cgfac_count))
        start = like(state.warm_start, solution)
        return solution, ScaleByCGFACState(count, start, info)

    return gradient_transformation(init, update)


def gradient_transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Returns the pair as Optax's type, whose own aliases admit no NamedTuple state."""
    return optax.GradientTransformationExtraArgs(init, update)


def current(name: str, value: ScalarOrSchedule, count: Array) -> Any:
    """Returns an option's value at a count of updates, a schedule's or its own."""
    if not callable(value):
        return value
    value = value(count)
    check_scheduled(name, value)
    return value


def like(old: PyTree | None, new: PyTree) -> PyTree | None:
    """Returns ``new`` in the dtypes of ``old``; None where nothing is kept."""
    if old is None:
        return None
    return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)


HOW_TO_UPDATE = """\
  updates, opt_state = tx.update(
      grads, opt_state, params, curvature=curvature,
      value=loss, value_fn=lambda p: loss_fn(p, batch))
or with nnx.Optimizer (see docs/first_loop.md)
  optimizer.update(
      module, grads, curvature=curvature, value=loss,
      value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)))"""


def check_curvature(curvature: Any) -> Curvature:
    """Returns the curvature of a step, checked."""
    if curvature is None:
        raise ValueError(
            "update() needs the curvature of this step, got None. Call\n"
            "  curvature = estimator.update(curvature, params, inputs, rng=rng)\n"
            f"{HOW_TO_UPDATE}"
        )
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"curvature must be an optax_cgfac.Curvature, got {summarize(curvature)}. "
            "Pass curvature=estimator.update(curvature, params, inputs, rng=rng)."
        )
    check_rows(curvature)
    return curvature


def check_fit(
    name: str,
    grads: PyTree,
    like: PyTree,
    keeps: Callable[[str], bool] = lambda path: True,
) -> None:
    """Checks that gradients are of the parameters that a tree like them belongs to."""
    for path, leaf in leaves_by_path(grads).items():
        if not is_floating(leaf) and keeps(text(path)):
            raise TypeError(
                f"{name}: gradient {text(path)!r} must be a real floating-point array, "
                f"got {summarize(leaf)}. Pass the gradients of a real loss by real "
                "parameters, jax.grad(loss_fn)(params, batch)."
            )
    expected, got = (
        {text(path): str(jnp.shape(x)) for path, x in leaves_by_path(tree).items()}
        for tree in (like, grads)
    )
    rule = f"{name}: gradients, parameters and state must be of the same parameters"
    check_alike(rule, expected, got, "Pass grads by params and tx.init(params).")


def check_trained(
    name: str, params: PyTree, keeps: Callable[[str], bool] = lambda path: True
) -> None:
    """Checks that ``tx.init`` is given real floating-point arrays to train."""
    for path, leaf in leaves_by_path(params).items():
        if not is_floating(leaf) and keeps(text(path)):
            raise TypeError(
                f"{name}: tx.init takes real floating-point parameters, got "
                f"{summarize(leaf)} as {text(path)!r}. Leave it to another "
                "transformation by optax.partition."
            )
