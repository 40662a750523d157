"""One layer's solve: which space and which method, decided from static shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac._cg import CGInfo, conjugate_gradient
from optax_cgfac._checks import check_positive, is_number
from optax_cgfac._factored import factored_damping, solve_by_cg, solve_directly
from optax_cgfac._kfac import solve_by_eigendecomposition
from optax_cgfac._operators import (
    DampedOperator,
    KroneckerOperator,
    jacobi_preconditioner,
)
from optax_cgfac._sample_space import conjugate_gradient_on_rows
from optax_cgfac._types import Array

DampingForm = Literal["tikhonov", "factored"]

_CHOICES = {
    "damping_form": ("tikhonov", "factored"),
    "space": ("auto", "parameter", "sample"),
    "solver": ("auto", "cg", "cholesky", "eigendecomposition"),
    "preconditioner": (None, "jacobi"),
    "structure": ("kronecker",),
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
    structure: str = "kronecker"

    def __post_init__(self):
        """Checks every option.

        Raises:
          ValueError: If an option has an unknown value or two do not go together.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, "
                    f"got {value!r}."
                )
        check_positive("max_steps", self.max_steps)
        if is_number(self.rtol) and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must lie in [0, 1), got {self.rtol!r}.")
        if self.solver == "cholesky" and self.damping_form != "factored":
            raise ValueError(
                "solver='cholesky' needs damping_form='factored': the Tikhonov system "
                "does not separate into two sides. Use solver='cg'."
            )
        if self.solver == "cholesky" and self.space == "parameter":
            raise ValueError("solver='cholesky' works in sample space, not parameter.")
        if self.preconditioner is not None and self.space != "parameter":
            raise ValueError(
                "preconditioner='jacobi' needs space='parameter': coefficients of "
                f"rows have no diagonal. Got space={self.space!r}."
            )

    @property
    def is_iterative(self) -> bool:
        """Whether a previous solution can start the solve."""
        return _solver(self) == "cg"


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
      solver: ``"cg"``, ``"cholesky"`` or ``"eigendecomposition"``.
      flops: Estimated floating-point operations of one solve.
      reason: The comparison behind the choice, for the report.
    """

    space: str
    solver: str
    flops: float
    reason: str


def make_plan(config: SolveConfig, num_rows: int, n_in: int, n_out: int) -> Plan:
    """Chooses the space and the solver of a layer by counting operations.

    Args:
      config: The options; ``space`` and ``solver`` may be ``"auto"``.
      num_rows: Rows ``R`` that the window holds.
      n_in: Rows of the layer's matrix.
      n_out: Columns of the layer's matrix.

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
    if solver == "eigendecomposition":
        # Householder tridiagonalisation, QR and back-transformation: about 9n³
        # (Golub & Van Loan, section 8.3); four rotations.
        flops = 9.0 * (n_in**3 + n_out**3) + 4.0 * n * (n_in + n_out)
        return Plan("factors", "eigendecomposition", flops, "Algorithm 1")
    # A V gᵀ, aᵀ(·)g with the better order of the two-sided products.
    apply = 4.0 * num_rows * n + 4.0 * num_rows**2 * min(n_in, n_out)
    parameter = (steps + 1) * (
        apply if config.damping_form == "tikhonov" else 2 * apply
    )
    grams = 2.0 * num_rows**2 * (n_in + n_out)
    if config.damping_form == "tikhonov":
        outside = 6.0 * num_rows * n + 6.0 * num_rows**2 * min(n_in, n_out)
        sample = grams + outside + 4.0 * num_rows**3 * (steps + 1)
    else:
        sample = _factored_flops(solver, steps, num_rows, n_in, n_out)
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


def _factored_flops(
    solver: str, steps: int, num_rows: int, n_in: int, n_out: int
) -> float:
    total = 0.0
    for size, columns in ((n_in, n_out), (n_out, n_in)):
        dim = min(size, num_rows)
        total += 2.0 * num_rows * size * dim  # the Gram matrix or the factor
        if solver == "cholesky":
            total += dim**3 + 2.0 * dim**2 * columns
        else:
            total += 2.0 * dim**2 * columns * (steps + 1)
        if dim == num_rows:
            total += 4.0 * num_rows * size * columns  # onto the rows and back
    return total


def _human(flops: float) -> str:
    for unit in ("", "k", "M", "G"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:.3g} T"


def damped_operator(
    operator: KroneckerOperator, damping: Array | float, damping_form: str
) -> Any:
    """Returns the operator under either form of damping."""
    if damping_form == "tikhonov":
        return DampedOperator(operator, damping)
    return factored_damping(operator, damping)


def solve_layers(
    config: SolveConfig,
    operators: Sequence[KroneckerOperator],
    damping: Array,
    bs: Sequence[Array],
    x0s: Sequence[Array | None],
) -> list[tuple[Array, CGInfo]]:
    """Solves the damped systems of many layers.

    Args:
      config: The options.
      operators: Rows of shapes ``(*stack, R, n_in)`` and ``(*stack, R, n_out)``.
      damping: The scalar ``γ``.
      bs: The right-hand sides, shapes ``(*stack, n_in, n_out)``.
      x0s: The warm starts, like ``bs``, or None.

    Returns:
      For each layer the solution, like its ``b``, and a `CGInfo` with entries of
      shape ``stack`` (scalars for direct solves).
    """
    if _solver(config) != "cholesky":
        return [
            _solve_layer(config, operator, jnp.asarray(damping, b.dtype), b, x0)
            for operator, b, x0 in zip(operators, bs, x0s, strict=True)
        ]
    damped = [factored_damping(operator, damping) for operator in operators]
    return [(x, _exact(x.dtype)) for x in solve_directly(damped, bs)]


def _solve_layer(
    config: SolveConfig,
    operator: KroneckerOperator,
    damping: Array,
    b: Array,
    x0: Array | None,
) -> tuple[Array, CGInfo]:
    """One layer's solve, stacked layers side by side."""
    if b.ndim > 2:
        scales = operator.a_scale, operator.g_scale

        def solve_one(a, g, b, x0):
            one = KroneckerOperator(a, g, *scales)
            return _solve_layer(config, one, damping, b, x0)

        return jax.vmap(solve_one)(operator.a, operator.g, b, x0)
    num_rows, n_in = operator.a.shape
    plan = make_plan(config, num_rows, n_in, operator.g.shape[1])
    damped = damped_operator(operator, damping, config.damping_form)
    if plan.solver == "eigendecomposition":
        return solve_by_eigendecomposition(damped, b), _exact(b.dtype)
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
    if config.damping_form == "tikhonov":
        return conjugate_gradient_on_rows(operator, damping, b, x0, **limits)
    return solve_by_cg(damped, b, x0, **limits)


def _exact(dtype: jnp.dtype) -> CGInfo:
    """The info of a direct solve."""
    zero = jnp.zeros((), dtype)
    return CGInfo(jnp.zeros((), jnp.int32), zero, jnp.array(True))
