"""The ready-made optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cgfac._curvature import Curvature, check_positive
from optax_cgfac._damping import (
    kl_clip_scale,
    levenberg_marquardt,
    reduction_ratio,
)
from optax_cgfac._layers import LEFT_OUT
from optax_cgfac._numerics import tree_dot, tree_is_finite
from optax_cgfac._paths import leaves_by_path, map_with_path, text
from optax_cgfac._precondition import SolveInfo, init_info, precondition
from optax_cgfac._quadratic_model import minimize_in_box, quadratic_model
from optax_cgfac._solve import SolveConfig
from optax_cgfac._transform import (
    Missing,
    ScalarOrSchedule,
    check_damping,
    check_missing,
    has_curvature,
)
from optax_cgfac._types import Array, PyTree


class CGFACState(NamedTuple):
    """State of `cgfac`.

    Attributes:
      cgfac_count: Updates so far, int32.
      damping: The damping ``λ`` of the next update.
      step_size: The last step size ``α``.
      momentum: The last momentum ``μ``.
      reduction_ratio: The last reduction ratio ``ρ``.
      num_rejected: Updates so far that were not finite and became zero, int32.
      velocity: The previous update, like the parameters.
      warm_start: The previous solution, like the parameters; None if unused.
      info: How the last solves went.
      fallback: State of the fallback transformation; empty without one.
    """

    cgfac_count: Array
    damping: Array
    step_size: Array
    momentum: Array
    reduction_ratio: Array
    num_rejected: Array
    velocity: PyTree
    warm_start: PyTree | None
    info: SolveInfo
    fallback: Any


@dataclasses.dataclass(frozen=True)
class _Options:
    config: SolveConfig
    learning_rate: ScalarOrSchedule | None
    damping: ScalarOrSchedule
    momentum: float | None
    l2: float
    kl_clip: float | None
    damping_decay: float
    damping_interval: int
    min_damping: float
    max_damping: float


def cgfac(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    damping: ScalarOrSchedule = 0.1,
    momentum: float | None = None,
    l2: float = 0.0,
    kl_clip: float | None = None,
    fallback: optax.GradientTransformation | None = None,
    where: Callable[[str], bool] | None = None,
    damping_form: Literal["tikhonov", "factored"] = "factored",
    space: Literal["auto", "parameter", "sample"] = "auto",
    solver: Literal["auto", "cg", "cholesky"] = "auto",
    max_steps: int = 10,
    rtol: float = 1e-2,
    warm_start: bool = True,
    damping_decay: float = 0.95,
    damping_interval: int = 5,
    min_damping: float = 1e-8,
    max_damping: float = 1e4,
    missing: Missing = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""CG-FAC with step size, momentum and damping chosen for you.

    With ``learning_rate=None`` the update is ``δ = α Δ + μ δ₀``, where ``Δ`` solves
    ``(F + λ I) Δ = -∇h`` layer by layer, ``δ₀`` is the previous update, and
    ``α, μ`` minimize the exact Gauss-Newton quadratic model of the loss on
    ``model_rows`` examples. Every ``damping_interval`` updates the
    Levenberg-Marquardt rule compares the predicted with the actual change of the
    loss and adapts ``λ``.

    With a learning rate ``η`` the update is ``δ = -η ν x + momentum δ₀`` with ``x``
    the preconditioned gradient, constant or scheduled damping, and ``ν`` the KL
    clip.

    Args:
      learning_rate: None, a float or a schedule.
      damping: ``λ``: the initial value without a learning rate, otherwise the
        value or its schedule.
      momentum: A constant ``μ``; None lets the quadratic model choose it, and is
        0 with a learning rate.
      l2: ``η`` of a regularizer ``½ η ‖θ‖²`` that is part of ``h``; the ``value``
        and gradients passed in do not contain it.
      kl_clip: ``κ``, with a learning rate: bounds the step's Fisher norm.
      fallback: An optimizer (with its own learning rate) for the parameters for
        which ``where`` is false.
      where: ``where("encoder/Dense_0/kernel") -> bool``, true for the parameters
        that CG-FAC updates; usually ``curvature.covers``. Needed with ``fallback``.
      damping_form: As in `scale_by_cgfac`.
      space: As in `scale_by_cgfac`.
      solver: As in `scale_by_cgfac`.
      max_steps: As in `scale_by_cgfac`.
      rtol: As in `scale_by_cgfac`.
      warm_start: As in `scale_by_cgfac`.
      damping_decay: ``ω`` per update of the Levenberg-Marquardt rule.
      damping_interval: Updates between two adaptations, each of which evaluates
        ``value_fn`` once.
      min_damping: Lower end of the adapted damping.
      max_damping: Upper end of the adapted damping.
      missing: As in `scale_by_cgfac`.

    Returns:
      A transformation whose ``update`` takes ``curvature``, and without a learning
      rate also ``value`` (the loss of this step) and ``value_fn`` (the loss of the
      same batch as a function of the parameters).

    Raises:
      ValueError: If an option is out of range or two do not go together.

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
      >>> estimator = optax_cgfac.fisher_estimator(model_fn, "squared_error", rows=8)
      >>> curvature = estimator.init(params, x)
      >>> tx = optax_cgfac.cgfac(damping=1e-4)
      >>> state = tx.init(params)
      >>> for step in range(10):
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     rng = jax.random.key(step)
      ...     curvature = estimator.update(curvature, params, x, rng=rng)
      ...     updates, state = tx.update(
      ...         grads, state, params, curvature=curvature, value=loss, value_fn=loss_fn
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-3)
      True

    References:
      Chen (2021); Martens & Grosse (2015), sections 6 and 7; Ba et al. (2017).
    """
    config = SolveConfig(
        damping_form=damping_form,
        space=space,
        solver=solver,
        max_steps=max_steps,
        rtol=rtol,
    )
    options = _Options(
        config,
        learning_rate,
        damping,
        momentum,
        l2,
        kl_clip,
        damping_decay,
        damping_interval,
        min_damping,
        max_damping,
    )
    _check_options(options, fallback, where)
    check_missing(missing)
    keeps_start = warm_start and config.is_iterative

    def fallback_for(params: PyTree) -> optax.GradientTransformationExtraArgs:
        if fallback is None or where is None:
            return optax.with_extra_args_support(optax.identity())
        mask = map_with_path(lambda path, _: not where(text(path)), params)
        return optax.masked(optax.with_extra_args_support(fallback), mask)

    def init(params: PyTree) -> CGFACState:
        def scalar(value, dtype=jnp.float32):
            return jnp.asarray(value, dtype)

        zeros = jax.tree.map(jnp.zeros_like, params)
        start = jax.tree.map(jnp.zeros_like, params) if keeps_start else None
        return CGFACState(
            cgfac_count=scalar(0, jnp.int32),
            damping=scalar(0.0 if callable(damping) else damping),
            step_size=scalar(0.0),
            momentum=scalar(0.0),
            reduction_ratio=scalar(1.0),
            num_rejected=scalar(0, jnp.int32),
            velocity=zeros,
            warm_start=start,
            info=init_info(params),
            fallback=fallback_for(params).init(params),
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
        count = optax.safe_increment(state.cgfac_count)
        if not has_curvature(curvature, missing):
            return updates, state._replace(cgfac_count=count)
        _check_coverage(curvature, updates, fallback, where)
        if params is None:
            raise ValueError("cgfac needs the parameters: tx.update(grads, state, params).")
        if learning_rate is None:
            _check_adaptive(curvature, value, value_fn)
        grads = jax.tree.map(lambda g, p: g + l2 * p, updates, params) if l2 else updates
        if fallback is not None:
            grads = map_with_path(
                lambda path, g: g if where(text(path)) else jnp.zeros_like(g), grads
            )
        gamma = _current(damping, state) if callable(damping) else state.damping
        solution, info = precondition(
            config, curvature, grads, state.warm_start, gamma, state.info
        )
        direction = jax.tree.map(jnp.negative, solution)
        if learning_rate is None:
            delta, state = _adaptive_step(
                options, state, curvature, params, grads, direction, value, value_fn
            )
        else:
            delta, state = _scheduled_step(options, state, grads, direction, gamma)
        finite = tree_is_finite(delta)
        delta = jax.tree.map(
            lambda d, v: jnp.where(finite, d, 0).astype(v.dtype), delta, state.velocity
        )
        state = state._replace(
            cgfac_count=count,
            num_rejected=state.num_rejected + (~finite).astype(jnp.int32),
            velocity=delta,
            warm_start=solution if keeps_start else None,
            info=info,
        )
        if fallback is None:
            return delta, state
        mixed = map_with_path(
            lambda path, d, g: d if where(text(path)) else g, delta, updates
        )
        mixed, fallback_state = fallback_for(params).update(
            mixed, state.fallback, params, value=value, **extra_args
        )
        return mixed, state._replace(fallback=fallback_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _current(value: ScalarOrSchedule, state: CGFACState) -> Array:
    value = value(state.cgfac_count) if callable(value) else value
    return jnp.asarray(value, jnp.float32)


def _adaptive_step(
    options: _Options,
    state: CGFACState,
    curvature: Curvature,
    params: PyTree,
    grads: PyTree,
    direction: PyTree,
    value: Array,
    value_fn: Callable[[PyTree], Array],
) -> tuple[PyTree, CGFACState]:
    """Step size and momentum from the quadratic model, damping by its success."""
    directions = (direction, state.velocity)
    model = quadratic_model(
        curvature, params, grads, directions, damping=state.damping, l2=options.l2
    )
    fixed = options.momentum
    box = {} if fixed is None else {"min_momentum": fixed, "max_momentum": fixed}
    step = minimize_in_box(model, **box)
    coefficients = jnp.stack(step)
    delta = jax.tree.map(
        lambda d, v: (step.step_size * d + step.momentum * v).astype(v.dtype),
        direction,
        state.velocity,
    )
    # The undamped model: the damping is there to restrict the step, not to
    # predict its effect.
    predicted = model.value(coefficients, damped=False)

    def objective_change() -> Array:
        moved = optax.apply_updates(params, delta)
        change = value_fn(moved) - value
        if options.l2:
            change += options.l2 / 2 * (tree_dot(moved, moved) - tree_dot(params, params))
        return jnp.asarray(change, predicted.dtype)

    def adapt() -> tuple[Array, Array]:
        ratio = reduction_ratio(objective_change(), predicted)
        damping = levenberg_marquardt(
            state.damping,
            ratio,
            decay=options.damping_decay**options.damping_interval,
            minimum=options.min_damping,
            maximum=options.max_damping,
        )
        return damping, ratio.astype(state.reduction_ratio.dtype)

    due = (state.cgfac_count + 1) % options.damping_interval == 0
    damping, ratio = jax.lax.cond(
        due, adapt, lambda: (state.damping, state.reduction_ratio)
    )
    return delta, state._replace(
        damping=damping,
        step_size=step.step_size.astype(jnp.float32),
        momentum=step.momentum.astype(jnp.float32),
        reduction_ratio=ratio,
    )


def _scheduled_step(
    options: _Options,
    state: CGFACState,
    grads: PyTree,
    direction: PyTree,
    gamma: Array,
) -> tuple[PyTree, CGFACState]:
    """A given learning rate, with KL clip and heavy-ball momentum."""
    rate = _current(options.learning_rate, state)
    if options.kl_clip is not None:
        product = -tree_dot(grads, direction)
        rate = rate * kl_clip_scale(product, rate, options.kl_clip)
    momentum = jnp.asarray(options.momentum or 0.0, jnp.float32)
    delta = jax.tree.map(
        lambda d, v: (rate * d + momentum * v).astype(v.dtype),
        direction,
        state.velocity,
    )
    return delta, state._replace(
        damping=jnp.asarray(gamma, jnp.float32),
        step_size=rate.astype(jnp.float32),
        momentum=momentum,
    )


def _check_options(options: _Options, fallback: Any, where: Any) -> None:
    check_damping(options.damping)
    check_positive("damping_interval", options.damping_interval)
    for name in ("l2", "momentum", "kl_clip"):
        number = getattr(options, name)
        if isinstance(number, (int, float)) and number < 0:
            raise ValueError(f"{name} must not be negative, got {number}.")
    if not 0 < options.damping_decay < 1:
        raise ValueError(f"damping_decay must lie in (0, 1), got {options.damping_decay}.")
    if not 0 <= options.min_damping <= options.max_damping:
        raise ValueError(
            "Dampings must satisfy 0 <= min_damping <= max_damping, got "
            f"{options.min_damping} and {options.max_damping}."
        )
    if options.learning_rate is None and options.kl_clip is not None:
        raise ValueError(
            "kl_clip needs a learning_rate; without one the quadratic model sets the "
            "step size."
        )
    if options.learning_rate is None and callable(options.damping):
        raise ValueError(
            "Without a learning_rate the damping adapts itself: pass its initial value, "
            "or a learning_rate to use a schedule of dampings."
        )
    if fallback is not None and where is None:
        raise ValueError(
            "fallback needs where=, true for the parameters that CG-FAC updates; "
            "usually where=curvature.covers."
        )


def _check_coverage(
    curvature: Curvature, grads: PyTree, fallback: Any, where: Any
) -> None:
    paths = [text(path) for path in leaves_by_path(grads)]
    if fallback is not None:
        wrong = [path for path in paths if where(path) and not curvature.covers(path)]
        remedy = "let where be curvature.covers"
    else:
        accepted = {
            text(path)
            for path, reason in curvature.spec.uncovered
            if reason != LEFT_OUT
        }
        wrong = [path for path in paths if path in accepted]
        remedy = "pass cgfac(fallback=optax.adam(1e-3), where=curvature.covers)"
    if wrong:
        raise ValueError(
            f"No curvature and no fallback for: {', '.join(wrong)}. Remedy: {remedy}."
        )


def _check_adaptive(curvature: Curvature, value: Any, value_fn: Any) -> None:
    if curvature.spec.model_fn is None:
        raise ValueError(
            "cgfac() without a learning_rate needs the curvature of fisher_estimator, "
            "which keeps the model for its quadratic model. With value_and_grad pass "
            "cgfac(learning_rate=...)."
        )
    absent = [
        name for name, x in (("value", value), ("value_fn", value_fn)) if x is None
    ]
    if absent:
        raise ValueError(
            f"cgfac() without a learning_rate needs {' and '.join(absent)}:\n"
            "  tx.update(grads, opt_state, params, curvature=curvature,\n"
            "            value=loss, value_fn=lambda p: loss_fn(p, batch))"
        )
