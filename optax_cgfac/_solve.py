"""One layer's solve: which space and which method, decided from static shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._cg import (
    UNKNOWN,
    CGInfo,
    conjugate_gradient,
    direct_info,
    with_residual,
)
from optax_cgfac._checks import check_positive, is_number
from optax_cgfac._factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac._fisher_blocks import FullFisherOperator
from optax_cgfac._kfac import solve_by_eigendecomposition
from optax_cgfac._numerics import safe_divide, tree_dot, tree_dtype
from optax_cgfac._operators import (
    DampedOperator,
    jacobi_preconditioner,
)
from optax_cgfac._rows import num_features, num_rows
from optax_cgfac._sample_space import conjugate_gradient_on_rows, solve_on_units
from optax_cgfac._types import Array

DampingForm = Literal["tikhonov", "factored"]
Structure = Literal["kronecker", "block", "full"]

_CHOICES = {
    "damping_form": ("tikhonov", "factored"),
    "space": ("auto", "parameter", "sample"),
    "solver": ("auto", "cg", "cholesky", "eigendecomposition"),
    "preconditioner": (None, "jacobi"),
    "structure": ("kronecker", "block", "full"),
}


@dataclasses.dataclass(frozen=True)
class SolveConfig:
    """The static options of a solve; see `scale_by_cgfac` for their meaning."""

    damping_form: DampingForm = "tikhonov"
    space: Literal["auto", "parameter", "sample"] = "auto"
    solver: Literal["auto", "cg", "cholesky", "eigendecomposition"] = "auto"
    max_steps: int | Array = 10
    rtol: float | Array = 1e-2
    preconditioner: Literal["jacobi"] | None = None
    structure: Structure = "kronecker"
    axis: str | None = None
    certify: bool = False

    def __post_init__(self):
        """Checks every option.

        Raises:
          ValueError: If an option has an unknown value or two do not go together.
          TypeError: If ``axis`` is no name or ``certify`` no bool.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, "
                    f"got {value!r}."
                )
        if self.axis is not None and self.structure == "full":
            raise ValueError(
                "structure='full' is one system for all layers: there is nothing to "
                f"spread over solve_axis={self.axis!r}. Leave it out, or take "
                "structure='block'."
            )
        if not isinstance(self.axis, str | None):
            raise TypeError(
                "solve_axis must be the name of a mesh axis or None, got "
                f"{self.axis!r}."
            )
        if not isinstance(self.certify, bool):
            raise TypeError(f"certify must be True or False, got {self.certify!r}.")
        check_positive("max_steps", self.max_steps, may_be_array=True)
        if is_number(self.rtol) and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must lie in [0, 1), got {self.rtol!r}.")
        if self.structure != "kronecker":
            self._check_structure()
        elif self.solver == "cholesky" and self.damping_form != "factored":
            raise ValueError(
                "solver='cholesky' needs damping_form='factored': the Tikhonov system "
                "does not separate into two sides. Use solver='cg'."
            )
        if self.solver == "cholesky" and self.space == "parameter":
            raise ValueError("solver='cholesky' works in sample space, not parameter.")
        if self.preconditioner is not None and (
            self.space != "parameter" or self.structure != "kronecker"
        ):
            raise ValueError(
                "preconditioner='jacobi' needs space='parameter' and "
                "structure='kronecker': coefficients of rows have no diagonal. Got "
                f"space={self.space!r}, structure={self.structure!r}."
            )

    def _check_structure(self) -> None:
        if self.damping_form == "factored":
            raise ValueError(
                f"structure={self.structure!r} has no factors: damping_form='factored' "
                "needs structure='kronecker'. Use damping_form='tikhonov'."
            )
        if self.solver == "eigendecomposition":
            raise ValueError(
                f"structure={self.structure!r} has no factors to decompose: use "
                "solver='cg' or 'cholesky'."
            )

    @property
    def takes_spectra(self) -> bool:
        """Whether the leading eigenpairs of a layer's factors, if known, are enough."""
        return self.solver == "auto" and _solver(self) == "cholesky"

    @property
    def is_iterative(self) -> bool:
        """Whether a previous solution can start the solve."""
        return _solver(self) == "cg"


def default_damping_form(structure: Structure) -> DampingForm:
    """Returns the robust form of damping where there are factors to damp."""
    return "factored" if structure == "kronecker" else "tikhonov"


def _solver(config: SolveConfig) -> str:
    """Resolves ``"auto"``: a factored system in sample space is solved directly."""
    if config.solver != "auto":
        return config.solver
    separates = config.damping_form == "factored" and config.space != "parameter"
    return "cholesky" if separates else "cg"


class Plan(NamedTuple):
    """Where and how a layer is solved, and what that costs.

    Attributes:
      space: ``"parameter"``, ``"sample"`` or ``"factors"``.
      solver: ``"cg"``, ``"cholesky"``, ``"eigenpairs"`` or ``"eigendecomposition"``.
      flops: Estimated floating-point operations of one solve.
      reason: The comparison behind the choice, for the report.
    """

    space: str
    solver: str
    flops: float
    reason: str


def make_plan(
    config: SolveConfig,
    rows: int,
    n_in: int,
    n_out: int,
    ranks: tuple[int, int] | None = None,
) -> Plan:
    """Chooses the space and the solver of a layer by counting operations.

    Args:
      config: The options; ``space`` and ``solver`` may be ``"auto"``.
      rows: Rows ``R`` that the window holds.
      n_in: Rows of the layer's matrix.
      n_out: Columns of the layer's matrix.
      ranks: Eigenpairs that are kept of its factors, if any are.

    Returns:
      The `Plan`.

    Example:
      >>> make_plan(SolveConfig(), 256, 1000, 1000).space
      'sample'
      >>> make_plan(SolveConfig(), 256, 30, 10).space
      'parameter'
    """
    # A traced number (of inject_hyperparams) is not known here: assume the default.
    steps = config.max_steps if isinstance(config.max_steps, int) else 10
    n = n_in * n_out
    solver = _solver(config)
    if config.structure != "kronecker":
        return _plan_units(config, rows, n_in, n_out, steps)
    if solver == "eigendecomposition":
        # Householder tridiagonalisation, QR and back-transformation: about 9n³
        # (Golub & Van Loan, section 8.3); four rotations.
        flops = 9.0 * (n_in**3 + n_out**3) + 4.0 * n * (n_in + n_out)
        return Plan("factors", "eigendecomposition", flops, "Algorithm 1")
    # A V gᵀ, aᵀ(·)g with the better order of the two-sided products.
    apply = 4.0 * rows * n + 4.0 * rows**2 * min(n_in, n_out)
    parameter = (steps + 1) * (
        apply if config.damping_form == "tikhonov" else 2 * apply
    )
    grams = 2.0 * rows**2 * (n_in + n_out)
    if config.damping_form == "tikhonov":
        outside = 6.0 * rows * n + 6.0 * rows**2 * min(n_in, n_out)
        sample = grams + outside + 4.0 * rows**3 * (steps + 1)
    else:
        sample = _factored_flops(solver, steps, rows, n_in, n_out)
    if ranks is not None and config.takes_spectra:
        flops = 4.0 * n * sum(ranks)
        why = f"eigenpairs {_human(flops)}F, all rows {_human(sample)}F"
        return Plan("factors", "eigenpairs", flops, why)
    space = config.space
    if space == "auto":
        # A factored system separates, and each side is solved where it is smaller.
        separates = config.damping_form == "factored"
        space = "sample" if separates or sample <= parameter else "parameter"
    flops = sample if space == "sample" else parameter
    why = (
        f"sample {_human(sample)}F {'≤' if sample <= parameter else '>'} "
        f"parameter {_human(parameter)}F"
    )
    if config.space != "auto":
        why = f"asked for; {why}"
    return Plan(space, solver, flops, why)


def _plan_units(
    config: SolveConfig, rows: int, n_in: int, n_out: int, steps: int
) -> Plan:
    """The plan of an exact Fisher block; ``rows`` positions each count as one."""
    outside = 2.0 * rows**2 * (n_in + n_out) + 12.0 * rows * n_in * n_out
    inside = rows**3 if config.solver == "cholesky" else 2.0 * rows**2 * (steps + 1)
    parameter = 8.0 * rows * n_in * n_out * (steps + 1)
    in_parameters = config.space == "parameter" and config.solver != "cholesky"
    flops = parameter if in_parameters else outside + inside
    why = f"sample {_human(outside + inside)}F, parameter {_human(parameter)}F"
    space = "parameter" if in_parameters else "sample"
    return Plan(space, _solver(config), flops, why)


def _factored_flops(solver: str, steps: int, rows: int, n_in: int, n_out: int) -> float:
    total = 0.0
    for size, columns in ((n_in, n_out), (n_out, n_in)):
        dim = min(size, rows)
        total += 2.0 * rows * size * dim  # the Gram matrix or the factor
        if solver == "cholesky":
            total += dim**3 + 2.0 * dim**2 * columns
        else:
            total += 2.0 * dim**2 * columns * (steps + 1)
        if dim == rows:
            total += 4.0 * rows * size * columns  # onto the rows and back
    return total


def _human(flops: float) -> str:
    for unit in ("", "k", "M", "G"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:.3g} T"


def damped_operator(operator: Any, damping: Array | float, damping_form: str) -> Any:
    """Returns the operator under either form of damping."""
    if damping_form == "tikhonov":
        return DampedOperator(operator, damping)
    return factored_damping(operator, damping)


def solve_layers(
    config: SolveConfig,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    """Solves the damped systems of many layers.

    Args:
      config: The options.
      operators: Rows of shapes ``(*stack, R, n_in)`` and ``(*stack, R, n_out)``: a
        `KroneckerOperator` each, or for the other structures a `BlockFisherOperator`.
      damping: The scalar ``γ``.
      bs: The right-hand sides, shapes ``(*stack, n_in, n_out)``.
      x0s: The warm starts, like ``bs``, or None.

    Returns:
      For each layer the solution, like its ``b``, and a `CGInfo` with entries of
      shape ``stack`` (scalars for direct solves that are not certified).
    """
    if config.structure == "full":
        return _solve_jointly(config, operators, damping, bs, x0s)
    if _solver(config) != "cholesky" or config.structure == "block":
        return [
            _solve_layer(config, operator, jnp.asarray(damping, b.dtype), b, x0)
            for operator, b, x0 in zip(operators, bs, x0s, strict=True)
        ]
    damped = [factored_damping(operator, damping) for operator in operators]
    return [
        (x, checked(config, operator, b, x, direct_info(x.dtype)))
        for x, operator, b in zip(solve_directly(damped, bs), damped, bs, strict=True)
    ]


def _solve_layer(
    config: SolveConfig,
    operator: Any,
    damping: Array,
    b: Array,
    x0: Array | None,
) -> tuple[Array, CGInfo]:
    """One layer's solve, stacked layers side by side."""
    if b.ndim > 2:

        def solve_one(operator, b, x0):
            return _solve_layer(config, operator, damping, b, x0)

        # A scale that all of them share gets the axis that the rows have.
        operator = jax.tree.map(
            lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, b.shape[:1]), operator
        )
        return jax.vmap(solve_one)(operator, b, x0)
    if config.structure == "block":
        return _solve_units(config, operator, damping, b, x0)
    n_in, n_out = num_features(operator.a), num_features(operator.g)
    plan = make_plan(config, num_rows(operator.a), n_in, n_out)
    damped = damped_operator(operator, damping, config.damping_form)
    limits = {"max_steps": config.max_steps, "rtol": config.rtol}
    if plan.space == "parameter":
        jacobi = config.preconditioner == "jacobi"
        return conjugate_gradient(
            damped,
            b,
            x0,
            **limits,
            preconditioner=jacobi_preconditioner(damped) if jacobi else None,
        )
    if plan.solver == "eigendecomposition":
        x, info = solve_by_eigendecomposition(damped, b), direct_info(b.dtype)
    elif config.damping_form == "tikhonov":
        x, info = conjugate_gradient_on_rows(operator, damping, b, x0, **limits)
    else:
        x, info = solve_by_cg(damped, b, x0, **limits)
    return x, checked(config, damped, b, x, info)


def _solve_units(
    config: SolveConfig, operator: Any, damping: Array, b: Any, x0: Any
) -> tuple[Any, CGInfo]:
    """The solve with an exact Fisher, of one layer or of all."""
    limits = {"max_steps": config.max_steps, "rtol": config.rtol}
    direct = config.solver == "cholesky"
    damped = DampedOperator(operator, damping)
    if config.space == "parameter" and not direct:
        return conjugate_gradient(damped, b, x0, **limits)
    x, info = solve_on_units(operator, damping, b, x0, direct=direct, **limits)
    return x, checked(config, damped, b, x, info)


def _solve_jointly(
    config: SolveConfig,
    operators: Sequence[Any],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    b = list(bs)
    x0 = None if any(x is None for x in x0s) else list(x0s)
    damping = jnp.asarray(damping, tree_dtype(b))
    full = FullFisherOperator(tuple(operators))
    xs, info = _solve_units(config, full, damping, b, x0)
    # Every layer reports the residual of the whole system, relative to its gradient.
    relative = relative_residual(info, jnp.sqrt(tree_dot(b, b)))
    norms = [jnp.sqrt(jnp.sum(leaf**2, (-2, -1))) for leaf in b]
    return [
        (x, info._replace(residual_norm=jnp.where(relative < 0, UNKNOWN, relative * n)))
        for x, n in zip(xs, norms, strict=True)
    ]


def relative_residual(info: CGInfo, b_norm: Array) -> Array:
    """Returns the residual relative to the right-hand side, -1 where it is unknown."""
    relative = safe_divide(info.residual_norm, b_norm)
    return jnp.where(info.residual_norm < 0, UNKNOWN, relative)


def checked(config: SolveConfig, damped: Any, b: Any, x: Any, info: CGInfo) -> CGInfo:
    """Computes the residual of ``damped x = b`` with one product, if asked for.

    Args:
      config: The options.
      damped: The damped operator.
      b: The right-hand side, a matrix (or stacked ones), or one for each layer.
      x: The solution, like ``b``.
      info: How the solve went.

    Returns:
      The `CGInfo` with the residual's norm, of shape ``stack``.
    """
    if not config.certify:
        return info

    def norm(v: Any) -> Array:
        squares = tree_dot(v, v) if isinstance(v, list) else jnp.sum(v**2, (-2, -1))
        return jnp.sqrt(squares)

    residual = jax.tree.map(jnp.subtract, b, damped.matvec(x))
    return with_residual(info, norm(residual), config.rtol * norm(b))
