"""The building blocks: `scale_by_cgfac` and `scale_by_kfac`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_cgfac.curvature.curvature import Curvature, check_rows
from optax_cgfac.optimize.precondition import precondition
from optax_cgfac.solve.choose import SolveConfig, Structure
from optax_cgfac.solve.info import SolveInfo, init_info
from optax_cgfac.utils.paths import leaves_by_path, normalize, text
from optax_cgfac.utils.types import Array, PyTree
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    check_choice,
    check_damping,
    check_function,
    check_number,
    check_positive,
    check_scheduled,
    is_real_scalar,
    summarize,
)

Missing = Literal["raise", "gradient"]


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


HOW_TO_UPDATE = """\
  updates, opt_state = tx.update(
      grads, opt_state, params, curvature=curvature,
      value=loss, value_fn=lambda p: loss_fn(p, batch))
or with nnx.Optimizer (see docs/first_loop.md)
  optimizer.update(
      module, grads, curvature=curvature, value=loss,
      value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)))"""


def check_curvature(curvature: Any, missing: Missing) -> Curvature | None:
    """Returns the curvature, or None where gradients are to pass through.

    Raises:
      ValueError: If there is none and ``missing`` is ``"raise"``, or its arrays are
        others than its layers ask for.
      TypeError: If it is something else.
    """
    if curvature is None:
        if missing == "gradient":
            return None
        raise ValueError(
            "update() needs the curvature of this step, got None:\n"
            "  curvature = estimator.update(curvature, params, inputs, rng=rng)\n"
            f"{HOW_TO_UPDATE}\n"
            "where estimator = optax_cgfac.fisher_estimator(model_fn, loss). Pass "
            "missing='gradient' to let gradients through without it."
        )
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "curvature must be an optax_cgfac.Curvature from estimator.init or "
            f"estimator.update, got {summarize(curvature)}. Pass "
            "curvature=estimator.update(curvature, params, inputs, rng=rng)."
        )
    check_rows(curvature)
    return curvature


def check_state(name: str, state: Any, kind: type) -> None:
    """Checks that an optimizer state is the transformation's own.

    Raises:
      TypeError: If it is something else.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{name}: the optimizer state must be the {kind.__name__} of its own init, "
            f"got {summarize(state)}. Call tx.update(grads, opt_state, params, ...) "
            "with opt_state = tx.init(params), and restore checkpoints into the latter."
        )


def check_trees(
    name: str,
    grads: PyTree,
    params: PyTree,
    kept: PyTree,
    num_leaves: int,
    keeps: Callable[[str], bool] = lambda path: True,
) -> None:
    """Checks that gradients, parameters and state belong together.

    Args:
      name: The transformation, for messages.
      grads: The gradients.
      params: The parameters; None not to look at them.
      kept: What the state holds that is like the parameters; None if nothing.
      num_leaves: How many parameters the state was made for.
      keeps: Whether the transformation trains a parameter.

    Raises:
      ValueError: If a structure, a shape or a dtype differs.
      TypeError: If a gradient is no real floating-point array.
    """
    for path, leaf in leaves_by_path(grads).items():
        dtype = dtype_of(leaf)
        real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if not real and keeps(text(path)):
            has = "is no array" if dtype is None else f"has dtype {dtype}"
            raise TypeError(
                f"{name}: gradient {text(path)!r} {has}; expected a real "
                "floating-point array. Pass the gradients of a real loss by real "
                "parameters, jax.grad(loss_fn)(params, batch)."
            )
    if params is not None:
        _check_alike(
            grads,
            params,
            f"{name}: gradients and parameters must be trees of one structure and of "
            "the same shapes",
            "Pass the gradients by these parameters, jax.grad(loss_fn)(params, batch); "
            "convert both by flax.core.unfreeze, or none.",
        )
    again = "Call tx.init(params) again where the parameters have changed."
    if kept is not None:
        _check_alike(
            grads,
            kept,
            f"{name}: the optimizer state must be of the parameters that are trained",
            again,
        )
    elif len(jax.tree.leaves(grads)) != num_leaves:
        raise ValueError(
            f"{name}: the optimizer state must be of the parameters that are trained.\n"
            f"  expected: gradients of {num_leaves} parameters\n"
            f"  got:      gradients of {len(jax.tree.leaves(grads))}\n{again}"
        )


def check_dtypes(name: str, params: PyTree, kept: PyTree) -> None:
    """Checks that parameters have the dtypes that they had at ``tx.init``.

    Raises:
      ValueError: If one has another.
    """
    then = leaves_by_path(kept)
    for path, leaf in leaves_by_path(params).items():
        like = then.get(path)
        if like is None or not jnp.issubdtype(like.dtype, jnp.floating):
            continue
        dtype = jnp.result_type(leaf)
        if dtype != like.dtype:
            raise ValueError(
                f"{name}: parameter {text(path)!r} has another dtype than at "
                f"tx.init(params).\n  expected: {like.dtype}\n"
                f"  got:      {dtype}\n"
                "Cast the parameters back, or call tx.init(params) again."
            )


def check_value(value: Any) -> None:
    """Checks the loss.

    Raises:
      ValueError: If it is no scalar.
      TypeError: If it is no real number.
    """
    if is_real_scalar(value):
        return
    shape = getattr(value, "shape", None)
    error = TypeError if shape is None or shape == () else ValueError
    got = summarize(value) if shape is None else f"shape {shape}, {value.dtype}"
    raise error(
        f"value must be the scalar loss of this batch, a real number, got {got}. Pass "
        "value=loss of loss, grads = jax.value_and_grad(loss_fn)(params, batch), "
        "without auxiliary outputs."
    )


def check_value_fn(value_fn: Any) -> None:
    """Checks the loss as a function of the parameters.

    Raises:
      TypeError: If it is no function of one argument.
    """
    check_function("value_fn", value_fn, ["params"], "lambda p: loss_fn(p, batch)")


def check_moved_value(value: Any) -> None:
    """Checks what ``value_fn`` has returned.

    Raises:
      ValueError: If it is no real scalar.
    """
    if not is_real_scalar(value):
        raise ValueError(
            f"value_fn must return the scalar loss, a real number, got "
            f"{summarize(value)}. For a loss with auxiliary outputs pass "
            "lambda p: loss_fn(p, batch)[0]."
        )


def _check_alike(grads: PyTree, other: PyTree, rule: str, way_out: str) -> None:
    pairs, structure = jax.tree_util.tree_flatten_with_path(grads)
    try:
        others = structure.flatten_up_to(other)
    except (TypeError, ValueError):
        got, expected = leaves_by_path(grads).keys(), leaves_by_path(other).keys()
        absent = ", ".join(map(text, sorted(expected - got)))
        new = ", ".join(map(text, sorted(got - expected)))
        if absent or new:
            raise ValueError(
                f"{rule}.\n  absent: {absent or 'none'}\n  new:    {new or 'none'}\n"
                f"{way_out}"
            ) from None
        # The same names, in containers of other types.
        raise ValueError(
            f"{rule}.\n  expected: {_short(other)}\n  got:      {_short(grads)}\n"
            f"{way_out}"
        ) from None
    for (path, leaf), like in zip(pairs, others, strict=True):
        if getattr(like, "shape", None) != jnp.shape(leaf):
            raise ValueError(
                f"{rule}: {text(normalize(path))!r}\n"
                f"  expected: {getattr(like, 'shape', summarize(like))}\n"
                f"  got:      {jnp.shape(leaf)}\n{way_out}"
            )


def _short(tree: PyTree) -> str:
    whole = str(jax.tree.structure(tree))
    return whole if len(whole) < 200 else f"{whole[:200]}..."


def check_trained(
    name: str, params: PyTree, keeps: Callable[[str], bool] = lambda path: True
) -> None:
    """Checks the parameters that ``tx.init`` is given.

    Args:
      name: The transformation, for messages.
      params: Its parameters; masked ones are no leaves.
      keeps: Whether it is the one that trains a parameter.

    Raises:
      TypeError: If they are no tree of real floating-point arrays.
    """
    if params is None or isinstance(params, nnx.Module):
        raise TypeError(
            f"{name}: tx.init must be given the tree of parameters, got "
            f"{summarize(params)}. Call tx.init(params); of an nnx.Module, "
            "nnx.Optimizer(module, tx, wrt=nnx.Param)."
        )
    for path, leaf in leaves_by_path(params).items():
        dtype = dtype_of(leaf)
        real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if not real and keeps(text(path)):
            raise TypeError(
                f"{name}: parameter {text(path)!r} must be a real floating-point "
                f"array, got {summarize(leaf)}. Leave it to another transformation by "
                "optax.partition or optax.masked."
            )


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of an array or a number; None of anything else."""
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    is_number = isinstance(leaf, (bool, int, float, complex, np.generic))
    return jnp.result_type(leaf) if is_number else None
