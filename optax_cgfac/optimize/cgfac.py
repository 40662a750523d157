"""The ready-made optimizer."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.adaptive import (
    CGFACState,
    LossAt,
    StepOptions,
    adaptive_step,
    has_l2,
    scheduled_step,
    settle,
    with_initial_damping,
)
from optax_cgfac.optimize.fallback import Fallback, select
from optax_cgfac.optimize.precondition import precondition
from optax_cgfac.optimize.scale_by import (
    HOW_TO_UPDATE,
    Missing,
    ScalarOrSchedule,
    check_curvature,
    check_dtypes,
    check_limits,
    check_missing,
    check_state,
    check_trained,
    check_trees,
    check_value,
    check_value_fn,
    current,
    gradient_transformation,
)
from optax_cgfac.solve.choose import SolveConfig, Structure, default_damping_form
from optax_cgfac.solve.info import init_info
from optax_cgfac.utils.arrays import tree_is_finite
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    INSIDE_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    check_damping,
    check_function,
    check_number,
    check_number_or_schedule,
    check_positive,
    is_number,
    summarize,
)

# Initial damping and floor of the structures without factors. The exact Fisher of few
# rows has γ alone outside of their span; training of small MNIST models turned up
# without a higher floor. Those of "kronecker" come from the data.
_DAMPING_OF_BLOCKS = (1.0, 0.1)


# With a fixed rate nothing shortens the step that a low damping makes long.
_DAMPING_WITH_RATE = 0.1


def cgfac(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    damping: ScalarOrSchedule | None = None,
    momentum: float | None = None,
    l2: float = 0.0,
    kl_clip: float | None = None,
    fallback: optax.GradientTransformation | None = None,
    where: Callable[[str], bool] | None = None,
    structure: Structure = "kronecker",
    damping_form: Literal["tikhonov", "factored"] | None = None,
    space: Literal["auto", "parameter", "sample"] = "auto",
    solver: Literal["auto", "cg", "cholesky"] = "auto",
    max_steps: int = 10,
    rtol: float = 1e-2,
    warm_start: bool = True,
    preconditioner: Literal["jacobi"] | None = None,
    damping_decay: float = 0.9,
    damping_interval: int | None = None,
    model_interval: int | None = None,
    min_damping: float | None = None,
    max_damping: float | None = None,
    solve_axis: str | None = None,
    certify: bool = False,
    missing: Missing = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""CG-FAC with step size, momentum and damping chosen for you.

    With ``learning_rate=None`` the update is ``δ = α Δ + μ δ₀``, where ``Δ`` solves
    ``(F + λ I) Δ = -∇h`` layer by layer, ``δ₀`` is the previous update, and
    ``α, μ`` minimize the exact Gauss-Newton quadratic model of the loss on
    ``model_examples`` examples. Every ``damping_interval`` updates the
    Levenberg-Marquardt rule compares the predicted with the actual change of the
    loss and adapts ``λ``; a step that raised the loss of its batch is not taken. No
    step promises more than the whole of a loss that is never negative, and a loss that
    is not finite, and was before the last step, takes that step back.

    With a learning rate ``η`` the update is ``δ = -η ν x + momentum δ₀`` with ``x``
    the preconditioned gradient, constant or scheduled damping, and ``ν`` the KL
    clip.

    Args:
      learning_rate: None, a float or a schedule.
      damping: ``λ``: the initial value without a learning rate, otherwise the
        value or its schedule. None for ten times the mean curvature of the first
        update (less for fewer than a thousand parameters), which makes the training
        independent of the scale of the loss, or 0.1 with a learning rate; for 1 where
        the structure has no factors: the exact Fisher of a few examples knows few
        directions.
      momentum: A constant ``μ`` in [0, 1); None lets the quadratic model choose it,
        and is 0 with a learning rate.
      l2: ``η`` of a regularizer ``½ η ‖θ‖²`` that is part of ``h``; the ``value``
        and gradients passed in do not contain it.
      kl_clip: ``κ``, with a learning rate: bounds the step's Fisher norm.
      fallback: An optimizer (with its own learning rate) for the parameters for
        which ``where`` is false. `optax.inject_hyperparams` needs
        ``static_args=("fallback", "where")`` then.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        that CG-FAC updates; usually ``curvature.covers``. Needed with ``fallback``.
      structure: As in `scale_by_cgfac`.
      damping_form: As in `scale_by_cgfac`; None for ``"factored"`` where the
        structure has factors, ``"tikhonov"`` where it has none.
      space: As in `scale_by_cgfac`.
      solver: As in `scale_by_cgfac`.
      max_steps: As in `scale_by_cgfac`.
      rtol: As in `scale_by_cgfac`.
      warm_start: As in `scale_by_cgfac`.
      preconditioner: As in `scale_by_cgfac`.
      damping_decay: ``ω`` per update of the Levenberg-Marquardt rule.
      damping_interval: Updates between two adaptations, each of which evaluates
        ``value_fn`` once. None for the first ten updates and every fifth, or every
        tenth with batches of 512 examples and more.
      model_interval: Updates between two evaluations of the quadratic model, all of the
        first ten aside; step size and momentum stay in between, the size less where a
        step would promise several times what the last fitted one did. None for as many
        as keep its share of the gradient's work below about 12 %, or half of that for
        models of at most 32 outputs; at most 10.
      min_damping: Lower end of the adapted damping. On small batches a good
        reduction ratio rewards fitting the batch, and without a floor the damping
        falls until the loss turns up. None for a hundredth of the initial damping, or
        where the data tell that one for a tenth of the mean curvature; for 0.1 where
        the structure has no factors, or the initial damping if that is less.
      max_damping: Upper end of the adapted damping; None for 1e5 times the initial one.
      solve_axis: As in `scale_by_cgfac`.
      certify: As in `scale_by_cgfac`.
      missing: As in `scale_by_cgfac`.

    Returns:
      A transformation whose ``update`` takes ``curvature``, and without a learning
      rate also ``value`` (the loss of this step) and ``value_fn`` (the loss of the
      same batch as a function of the parameters).

    Raises:
      ValueError: If an option is out of range or two do not go together.
      TypeError: If one is of another type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cgfac
      >>> from flax import linen as nn
      >>> model = nn.Dense(1)
      >>> x = jax.random.normal(jax.random.key(0), (16, 3))
      >>> y = x @ jnp.array([[1.0], [-2.0], [0.5]])
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def model_fn(params, x):
      ...     return model.apply({"params": params}, x)
      >>> def loss_fn(params):
      ...     return jnp.mean(jnp.sum((model_fn(params, x) - y) ** 2, -1))
      >>> estimator = optax_cgfac.fisher_estimator(
      ...     model_fn, "squared_error", examples=8
      ... )
      >>> curvature = estimator.init(params, x)
      >>> tx = optax_cgfac.cgfac(damping=1e-2)
      >>> state = tx.init(params)
      >>> for step in range(10):
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     rng = jax.random.key(step)
      ...     curvature = estimator.update(curvature, params, x, rng=rng)
      ...     updates, state = tx.update(
      ...         grads,
      ...         state,
      ...         params,
      ...         curvature=curvature,
      ...         value=loss,
      ...         value_fn=loss_fn,
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-3)
      True

    References:
      Chen (2021); Martens & Grosse (2015), sections 6 and 7; Ba et al. (2017).
    """
    check_limits(max_steps, rtol, warm_start)
    if damping_form is None:
        damping_form = default_damping_form(structure)
    config = SolveConfig(
        structure=structure,
        damping_form=damping_form,
        space=space,
        solver=solver,
        max_steps=max_steps,
        rtol=rtol,
        preconditioner=preconditioner,
        axis=solve_axis,
        certify=certify,
    )
    if damping is None and learning_rate is not None and structure == "kronecker":
        damping = _DAMPING_WITH_RATE
    if structure != "kronecker":
        default, floor = _DAMPING_OF_BLOCKS
        damping = default if damping is None else damping
        if min_damping is None:
            # An initial value below the floor asks for a lower one.
            min_damping = min(floor, damping if is_number(damping) else default)
    options = StepOptions(
        momentum,
        l2,
        kl_clip,
        damping_decay,
        damping_interval,
        model_interval,
        min_damping,
        max_damping,
    )
    check_missing(missing)
    check_step_options(options, learning_rate, damping, fallback, where)
    rest = Fallback(fallback, where)
    keeps_start = warm_start and config.is_iterative

    def init(params: PyTree) -> CGFACState:
        def scalar(value, dtype=jnp.float32):
            # A copy of an array: the state may be donated, and no buffer twice.
            return jnp.array(value, dtype)

        if missing == "raise":
            check_trained("cgfac", params, rest.keeps)
        zeros = jax.tree.map(jnp.zeros_like, params)
        start = jax.tree.map(jnp.zeros_like, params) if keeps_start else None
        start_damping = 0.0 if callable(damping) or damping is None else damping
        return CGFACState(
            cgfac_count=scalar(0, jnp.int32),
            damping=scalar(start_damping),
            initial_damping=scalar(start_damping),
            step_size=scalar(0.0),
            momentum=scalar(0.0),
            reduction_ratio=scalar(1.0),
            promise=scalar(0.0),
            num_rejected=scalar(0, jnp.int32),
            velocity=zeros,
            warm_start=start,
            info=init_info(params),
            fallback=rest.transformation(params).init(params),
        )

    def update(
        updates: PyTree,
        state: CGFACState,
        params: PyTree | None = None,
        *,
        curvature: Curvature | None = None,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CGFACState]:
        check_state("cgfac", state, CGFACState)
        count = jnp.asarray(optax.safe_increment(state.cgfac_count))
        curvature = check_curvature(curvature, missing)
        if curvature is None:
            return updates, state._replace(cgfac_count=count)
        if params is None:
            raise ValueError(
                "cgfac needs the parameters, got None: pass them as the third argument "
                "of tx.update(grads, opt_state, params, curvature=curvature, ...)."
            )
        num_leaves = state.info.num_steps.shape[-1]
        check_trees("cgfac", updates, params, state.velocity, num_leaves, rest.keeps)
        check_dtypes("cgfac", params, state.velocity)
        rest.check(curvature, updates, whole=learning_rate is None)
        loss_at = _loss_at(value, value_fn, is_needed=learning_rate is None)
        grads = jax.tree.map(_like_parameter, updates, params)
        if has_l2(options):
            grads = jax.tree.map(lambda g, p: g + l2 * p, grads, params)
        grads = rest.split(grads, jax.tree.map(jnp.zeros_like, grads))
        if damping is None:
            state = with_initial_damping(state, curvature)
        if learning_rate is None or damping is None:
            gamma = state.damping
        else:
            gamma = current("damping", damping, state.cgfac_count)
            gamma = jnp.asarray(gamma, jnp.float32)
        solution, info = precondition(
            # The regularizer's own curvature: Martens & Grosse (2015), section 6.
            config,
            curvature,
            grads,
            state.warm_start,
            gamma + l2,
            state.info,
        )
        direction = jax.tree.map(jnp.negative, solution)
        old = state
        if learning_rate is None:
            step, finite, undone, state = adaptive_step(
                options, state, curvature, params, grads, direction, loss_at
            )
        else:
            step, finite, state = scheduled_step(
                options, state, grads, direction, learning_rate, gamma
            )
            # Without the loss as a function there is no telling whose fault it is.
            undone = jnp.array(False) if value is None else ~jnp.isfinite(value)
        if fallback is not None:
            finite &= tree_is_finite(updates)
        delta, state, good = settle(
            options,
            old,
            state,
            params,
            direction,
            step,
            finite,
            undone,
            value,
            curvature,
        )
        state = state._replace(
            cgfac_count=count,
            warm_start=_like(old.warm_start, solution),
            info=info,
        )
        mixed = rest.split(delta, updates)
        mixed, fallback_state = rest.transformation(params).update(
            mixed, state.fallback, params, value=value, **extra_args
        )
        if fallback is None:
            return mixed, state
        # A bad number anywhere rejects the whole step, the fallback's part of it too,
        # and those that the fallback makes itself (Adam's in float16) are left out.
        mixed = rest.split(
            delta,
            jax.tree.map(lambda u: jnp.where(good & jnp.isfinite(u), u, 0), mixed),
        )
        fallback_state = select(good, fallback_state, state.fallback)
        return mixed, state._replace(fallback=fallback_state)

    return gradient_transformation(init, update)


def _like_parameter(gradient: Array, parameter: Array) -> Array:
    """Returns a gradient in the dtype of its parameter, if it is one at all."""
    is_real = jnp.issubdtype(jnp.result_type(gradient), jnp.floating)
    return jnp.asarray(gradient, parameter.dtype) if is_real else gradient


def _like(old: PyTree | None, new: PyTree) -> PyTree | None:
    """Returns ``new`` in the dtypes of ``old``; None where nothing is kept."""
    if old is None:
        return None
    return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)


def _loss_at(value: Any, value_fn: Any, *, is_needed: bool) -> LossAt:
    """Returns the loss, which with a learning rate nobody needs."""
    given: dict[str, Any] = {"value": value, "value_fn": value_fn}
    absent = [name for name, x in given.items() if x is None]
    if is_needed and absent:
        raise ValueError(
            f"cgfac() without a learning_rate needs {' and '.join(absent)}, got None:\n"
            f"{HOW_TO_UPDATE}"
        )
    if value is not None:
        check_value(value)
    if value_fn is not None:
        check_value_fn(value_fn)
    return LossAt(**given)


def check_step_options(
    options: StepOptions, learning_rate: Any, damping: Any, fallback: Any, where: Any
) -> None:
    """Checks the options of `cgfac` that are no names.

    Raises:
      ValueError: If one is out of range, or two do not go together.
      TypeError: If one is of another type.
    """
    if damping is not None:
        check_damping(damping)
    if learning_rate is not None:
        check_number_or_schedule("learning_rate", learning_rate, NOT_NEGATIVE, 0.1)
    numbers = {
        "momentum": (BELOW_ONE, 0.9),
        "l2": (NOT_NEGATIVE, 1e-4),
        "kl_clip": (POSITIVE, 1e-2),
        "damping_decay": (INSIDE_ONE, 0.9),
        "min_damping": (NOT_NEGATIVE, 1e-3),
        "max_damping": (Range("be positive", lambda x: x > 0), 1e3),
    }
    for name, (allowed, example) in numbers.items():
        may_be_none = name not in ("l2", "damping_decay")
        value = getattr(options, name)
        if value is not None or not may_be_none:
            check_number(name, value, allowed, example)
    for name in ("damping_interval", "model_interval"):
        if getattr(options, name) is not None:
            check_positive(name, getattr(options, name), may_be_array=True)
    least = options.min_damping if is_number(options.min_damping) else 0.0
    most = options.max_damping if is_number(options.max_damping) else math.inf
    if not least <= most:
        raise ValueError(
            "Dampings must satisfy 0 <= min_damping <= max_damping, got "
            f"{least} and {most}. Lower min_damping or raise max_damping."
        )
    if learning_rate is None:
        _check_adaptive(options, damping, least, most)
    _check_fallback(fallback, where)


def _check_adaptive(
    options: StepOptions, damping: Any, least: float, most: float
) -> None:
    if options.kl_clip is not None:
        raise ValueError(
            f"kl_clip needs a learning_rate, got kl_clip={summarize(options.kl_clip)} "
            "without one: the quadratic model sets the step size. Drop kl_clip, or "
            "pass cgfac(learning_rate=0.1, kl_clip=...)."
        )
    if callable(damping):
        raise ValueError(
            "Without a learning_rate the damping adapts itself, got a schedule: pass "
            "its initial value, or a learning_rate to use a schedule of dampings."
        )
    if not is_number(damping):
        return
    if damping == 0:
        raise ValueError(
            "The initial damping must be positive, got 0: it adapts by factors. Pass "
            "damping=None for one from the data, or min_damping=0 to let it fall."
        )
    if not least <= damping <= most:
        raise ValueError(
            "The initial damping must lie in [min_damping, max_damping] = "
            f"[{least:g}, {most:g}], got {damping:g}. Move the bounds to start there."
        )


def _check_fallback(fallback: Any, where: Any) -> None:
    if fallback is None and where is not None:
        raise ValueError(
            "where= needs fallback=, the optimizer of the other parameters; got None. "
            "Pass fallback=optax.adam(1e-3), or leave parameters as they are by "
            "fisher_estimator(..., where=...)."
        )
    functions = (getattr(fallback, name, None) for name in ("init", "update"))
    if fallback is not None and not all(map(callable, functions)):
        raise TypeError(
            "fallback must be an optax.GradientTransformation, got "
            f"{summarize(fallback)}. Pass fallback=optax.adam(1e-3)."
        )
    if where is not None:
        check_function("where", where, ["path"], "lambda path: 'Dense' in path")
