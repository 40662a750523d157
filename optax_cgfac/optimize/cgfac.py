"""The ready-made optimizer: `cgfac`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.adaptive.damping import Adaptation
from optax_cgfac.optimize.adaptive.step import adaptive_step, with_initial_damping
from optax_cgfac.optimize.fallback import Fallback
from optax_cgfac.optimize.precondition import precondition
from optax_cgfac.optimize.safeguards import Verdict, settle
from optax_cgfac.optimize.scale_by import (
    HOW_TO_UPDATE,
    ScalarOrSchedule,
    check_curvature,
    check_fit,
    check_trained,
    current,
    gradient_transformation,
    like,
)
from optax_cgfac.optimize.scheduled import scheduled_step
from optax_cgfac.optimize.state import CGFACState, Start, Step, StepOptions
from optax_cgfac.solve.choose import SolveSpec, Structure, default_damping_form
from optax_cgfac.solve.info import init_info
from optax_cgfac.utils.arrays import tree_is_finite
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    NOT_NEGATIVE,
    check_alike,
    check_number_or_schedule,
    is_floating,
    is_number,
    is_real_scalar,
    leaf_types,
    summarize,
)

# The default damping starts at this multiple of the mean curvature: 0.1 on CURVES. A
# tenth or ten times of it trains worse. Without curvature it is the second number.
_DAMPING_MULTIPLE, _DAMPING_WITHOUT_DATA = 10.0, 0.1
# Initial damping and floor of the structures without factors. The exact Fisher of a few
# rows has γ alone outside of their span; small MNIST models diverged without a higher
# floor.
_DAMPING_OF_BLOCKS, _FLOOR_OF_BLOCKS = 1.0, 0.1
# With a fixed rate nothing shortens the step that a low damping makes long.
_DAMPING_WITH_RATE = 0.1
_AS_AT_INIT = "cgfac: parameters must be as at tx.init"
_CAST = "Cast the parameters back, or call tx.init(params) again."


def cgfac(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    momentum: float | None = None,
    l2: float = 0.0,
    kl_clip: float | None = None,
    model_interval: int | None = None,
    damping: ScalarOrSchedule | None = None,
    damping_decay: float | None = None,
    damping_interval: int | None = None,
    min_damping: float | None = None,
    max_damping: float | None = None,
    structure: Structure = "kronecker",
    damping_form: Literal["tikhonov", "factored"] | None = None,
    solver: Literal["auto", "cg", "cholesky"] = "auto",
    space: Literal["auto", "parameter", "sample"] = "auto",
    max_steps: int | None = None,
    rtol: float | None = None,
    warm_start: bool | None = None,
    fallback: optax.GradientTransformation | None = None,
    where: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CG-FAC with step size, momentum and damping chosen for you.

    Without a learning rate the update is ``δ = α Δ + μ δ₀``, where ``Δ`` solves
    ``(F + λ I) Δ = -∇h`` layer by layer, ``δ₀`` is the previous update, and
    ``α, μ`` minimize the exact Gauss-Newton quadratic model of the loss on
    ``model_examples`` examples. The Levenberg-Marquardt rule compares the predicted
    with the actual change of the loss and adapts ``λ``. A step that raised the loss of
    its batch is not taken. For nonnegative losses the predicted decrease is capped. If
    the loss becomes non-finite, the previous step is undone.

    With a learning rate ``η`` the update is ``δ = -η ν x + momentum δ₀`` with ``x``
    the preconditioned gradient, constant or scheduled damping, and ``ν`` the KL
    clip. Options of the other mode raise.

    Args:
      learning_rate: None, a float or a schedule.
      momentum: Step: a constant ``μ`` in [0, 1). None lets the quadratic model choose
        it, and is 0 with a learning rate.
      l2: Step: ``η`` of a regularizer ``½ η ‖θ‖²`` that is part of ``h``; the ``value``
        and gradients passed in do not contain it.
      kl_clip: Step, with a learning rate: ``κ`` bounds the step's Fisher norm.
      model_interval: Step, without a learning rate: updates between two fits of the
        quadratic model after the first ten; step size and momentum are kept in between.
        None for an interval that keeps the fits below about 12 % of the gradient's
        work, or 6 % for models of at most 32 outputs; at most 10.
      damping: Damping: ``λ``, the initial value without a learning rate, otherwise the
        value or its schedule. None for ten times the mean curvature of the first
        update (less for fewer than a thousand parameters), which makes training
        independent of the scale of the loss, or 0.1 with a learning rate. None is 1 for
        the structures ``"block"`` and ``"full"``.
      damping_decay: Damping, without a learning rate: ``ω`` per update of the
        Levenberg-Marquardt rule; 0.9 by default.
      damping_interval: Damping, without a learning rate: updates between two
        adaptations, each of which evaluates ``value_fn`` once. None for every update of
        the first ten, then every fifth, or every tenth with batches of 512 and more.
      min_damping: Damping, without a learning rate: the floor, without which small
        batches let the damping fall until the loss diverges. None for a hundredth of
        ``damping``, a tenth of the first mean curvature if that is None, and for
        ``"block"`` and ``"full"`` 0.1 or ``damping`` if that is less.
      max_damping: Damping, without a learning rate: the largest; None for 1e5 times
        ``damping``, or 1e6 times the first mean curvature.
      structure: Solve: as in `scale_by_cgfac`.
      damping_form: Solve: as in `scale_by_cgfac`; None for ``"factored"`` with
        ``structure="kronecker"``, else ``"tikhonov"``.
      solver: Solve: as in `scale_by_cgfac`.
      space: Solve: as in `scale_by_cgfac`.
      max_steps: Solve: as in `scale_by_cgfac`.
      rtol: Solve: as in `scale_by_cgfac`.
      warm_start: Solve: as in `scale_by_cgfac`.
      fallback: Other parameters: an optimizer (with its own learning rate) for those
        for which ``where`` is false. `optax.inject_hyperparams` needs
        ``static_args=("fallback", "where")`` then.
      where: Other parameters: ``where("encoder/Dense_0/kernel") -> bool``, true for
        those that CG-FAC updates; usually ``curvature.covers``. Needed with
        ``fallback``.

    Returns:
      A transformation whose ``update`` takes ``curvature``, and without a learning
      rate also ``value`` (the loss of this step) and ``value_fn`` (the loss of the
      same batch as a function of the parameters).

    Raises:
      ValueError: If an option is out of range or two contradict each other.
      TypeError: If one is of another type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cgfac
      >>> from flax import linen as nn
      >>> model = nn.Dense(1)
      >>> x = jax.random.normal(jax.random.key(0), (32, 3))
      >>> y = x @ jnp.array([[1.0], [-2.0], [0.5]])
      >>> params = model.init(jax.random.key(1), x)
      >>> def loss_fn(params):
      ...     return jnp.mean(jnp.sum((model.apply(params, x) - y) ** 2, -1))
      >>> estimator = optax_cgfac.fisher_estimator(model.apply, "squared_error")
      >>> curvature = estimator.init(params, x)
      >>> tx = optax_cgfac.cgfac(damping=1e-2)
      >>> state = tx.init(params)
      >>> for step in range(10):
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     rng = jax.random.key(step)
      ...     curvature = estimator.update(curvature, params, x, rng=rng)
      ...     given = {"curvature": curvature, "value": loss, "value_fn": loss_fn}
      ...     updates, state = tx.update(grads, state, params, **given)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-3)
      True

    References:
      Chen (2021); Martens & Grosse (2015), sections 6 and 7; Ba et al. (2017).
    """
    if damping_form is None:
        damping_form = default_damping_form(structure)
    spec = SolveSpec(
        structure=structure,
        damping_form=damping_form,
        solver=solver,
        space=space,
        max_steps=max_steps,
        rtol=rtol,
        warm_start=warm_start,
    )
    adaptation = Adaptation(
        damping_decay=damping_decay,
        damping_interval=damping_interval,
        model_interval=model_interval,
        min_damping=min_damping,
        max_damping=max_damping,
    )
    parts = _Parts(spec, StepOptions(momentum, l2, kl_clip), Fallback(fallback, where))
    for name, number in (("learning_rate", learning_rate), ("damping", damping)):
        if number is not None:
            check_number_or_schedule(name, number, NOT_NEGATIVE, 0.1)
    if learning_rate is None:
        return _adaptive(parts, adaptation, damping)
    return _scheduled(parts, adaptation, learning_rate, damping)


class _Parts(NamedTuple):
    """What both modes are composed of."""

    spec: SolveSpec
    options: StepOptions
    fallback: Fallback


_Proposal = tuple[Start, Step, Verdict, CGFACState]


def _adaptive(
    parts: _Parts, adaptation: Adaptation, damping: Any
) -> optax.GradientTransformationExtraArgs:
    """Composes direction, quadratic model and adapted damping."""
    if parts.spec.structure != "kronecker":
        damping = _DAMPING_OF_BLOCKS if damping is None else damping
        if adaptation.min_damping is None:
            # An initial value below the floor asks for a lower one.
            first = damping if is_number(damping) else _DAMPING_OF_BLOCKS
            floor = min(_FLOOR_OF_BLOCKS, first)
            adaptation = dataclasses.replace(adaptation, min_damping=floor)
    _check_adaptive(parts.options, adaptation, damping)

    def propose(state: CGFACState, curvature: Curvature, start: Start) -> _Proposal:
        _check_loss(start)
        parts.fallback.check_whole(curvature, start.grads)
        if damping is None:
            multiple, without = _DAMPING_MULTIPLE, _DAMPING_WITHOUT_DATA
            state = with_initial_damping(state, curvature, multiple, without)
        start, state = _with_direction(parts, state, curvature, start, state.damping)
        return start, *adaptive_step(parts.options, adaptation, state, curvature, start)

    return _compose(parts, propose, damping)


def _scheduled(
    parts: _Parts,
    adaptation: Adaptation,
    learning_rate: ScalarOrSchedule,
    damping: Any,
) -> optax.GradientTransformationExtraArgs:
    """Composes direction and learning rate."""
    unused = [name for name, x in vars(adaptation).items() if x is not None]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} must be left out with a learning_rate, which keeps "
            "the damping as given. Pass a schedule of dampings, or no learning_rate."
        )
    if damping is None:
        has_factors = parts.spec.structure == "kronecker"
        damping = _DAMPING_WITH_RATE if has_factors else _DAMPING_OF_BLOCKS

    def propose(state: CGFACState, curvature: Curvature, start: Start) -> _Proposal:
        gamma = current("damping", damping, state.cgfac_count)
        gamma = jnp.asarray(gamma, jnp.float32)
        start, state = _with_direction(parts, state, curvature, start, gamma)
        rate = current("learning_rate", learning_rate, state.cgfac_count)
        return start, *scheduled_step(parts.options, state, start, rate, gamma)

    return _compose(parts, propose, damping)


def _with_direction(
    parts: _Parts,
    state: CGFACState,
    curvature: Curvature,
    start: Start,
    damping: Array,
) -> tuple[Start, CGFACState]:
    """Returns the start with ``Δ``, and the state with the solve's results."""
    solution, info = precondition(
        parts.spec,
        curvature,
        start.grads,
        state.warm_start,
        # The regularizer's own curvature: Martens & Grosse (2015), section 6.
        damping + parts.options.l2,
        state.info,
    )
    direction = jax.tree.map(jnp.negative, solution)
    kept = like(state.warm_start, solution)
    state = state._replace(warm_start=kept, info=info)
    return start._replace(direction=direction), state


def _compose(
    parts: _Parts,
    propose: Callable[[CGFACState, Curvature, Start], _Proposal],
    damping: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that takes what ``propose`` proposes."""
    options, fallback = parts.options, parts.fallback

    def init(params: PyTree) -> CGFACState:
        check_trained("cgfac", params, fallback.keeps)
        is_known = damping is not None and not callable(damping)
        return _initial_state(parts, params, damping if is_known else 0.0)

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
        curvature = check_curvature(curvature)
        if params is None:
            raise ValueError(
                "cgfac needs the parameters, got None. Pass them as third argument, "
                "tx.update(grads, opt_state, params, curvature=curvature, ...)."
            )
        check_fit("cgfac", updates, params, fallback.keeps)
        check_alike(_AS_AT_INIT, leaf_types(state.velocity), leaf_types(params), _CAST)
        fallback.check(curvature, updates)
        _check_value(value)
        grads = jax.tree.map(_cast, updates, params)
        if options.has_l2:
            grads = jax.tree.map(lambda g, p: g + options.l2 * p, grads, params)
        grads = fallback.split(grads, jax.tree.map(jnp.zeros_like, grads))
        finite = True if fallback.fallback is None else tree_is_finite(updates)
        start = Start(params, grads, None, value, value_fn, finite)
        start, step, verdict, new = propose(state, curvature, start)
        delta, new = settle(state, new, start, step, verdict)
        given = {"params": params, "value": value, **extra_args}
        update, other = fallback.apply(
            delta, updates, state.fallback, verdict.finite, **given
        )
        count = jnp.asarray(optax.safe_increment(state.cgfac_count))
        return update, new._replace(cgfac_count=count, fallback=other)

    return gradient_transformation(init, update)


def _initial_state(parts: _Parts, params: PyTree, damping: Any) -> CGFACState:
    def scalar(value: Any, dtype: Any = jnp.float32) -> Array:
        # A copy of an array: the state may be donated, and no buffer twice.
        return jnp.array(value, dtype)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like, params)
    return CGFACState(
        cgfac_count=scalar(0, jnp.int32),
        damping=scalar(damping),
        initial_damping=scalar(damping),
        step_size=scalar(0.0),
        momentum=scalar(0.0),
        reduction_ratio=scalar(1.0),
        promise=scalar(0.0),
        num_rejected=scalar(0, jnp.int32),
        velocity=zeros(),
        warm_start=zeros() if parts.spec.keeps_start else None,
        info=init_info(params),
        fallback=parts.fallback.transformation(params).init(params),
    )


def _cast(gradient: Array, parameter: Array) -> Array:
    """Returns a gradient in the dtype of its parameter, if it is a real one."""
    return jnp.asarray(gradient, parameter.dtype) if is_floating(gradient) else gradient


def _check_adaptive(options: StepOptions, adaptation: Adaptation, damping: Any) -> None:
    """Checks what only an adapted damping excludes."""
    if options.kl_clip is not None or callable(damping):
        given = "kl_clip" if options.kl_clip is not None else "a schedule of dampings"
        raise ValueError(
            f"{given} needs a learning_rate, got None. Pass cgfac(learning_rate=0.1)."
        )
    least, most = adaptation.min_damping, adaptation.max_damping
    least = least if is_number(least) else 0.0
    most = most if is_number(most) else math.inf
    first = damping if is_number(damping) else max(least, 1e-30)
    # It adapts by factors: zero would stay zero.
    if not (least <= first <= most and first > 0):
        raise ValueError(
            "Dampings must satisfy min_damping <= damping <= max_damping and be "
            f"positive, got {least:g}, {first:g} and {most:g}. Move the bounds."
        )


def _check_value(value: Any) -> None:
    if value is not None and not is_real_scalar(value):
        raise ValueError(
            "value must be the scalar loss of this batch, without auxiliary outputs, "
            f"got {summarize(value)}. Pass value=loss."
        )


def _check_loss(start: Start) -> None:
    """Checks that the adaptive step has the loss."""
    given = {"value": start.value, "value_fn": start.value_fn}
    absent = [name for name, x in given.items() if x is None]
    if absent:
        raise ValueError(
            f"cgfac() needs {' and '.join(absent)}, got None. Call\n{HOW_TO_UPDATE}"
        )
