"""The options of a solve, and which space and method follow from static shapes."""

import dataclasses
from typing import Literal, NamedTuple

from optax_cgfac.utils.types import Array
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    check_choice,
    check_number,
    check_positive,
    summarize,
)

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
            check_choice(name, getattr(self, name), choices)
        if self.axis is not None and self.structure == "full":
            raise ValueError(
                "structure='full' is one system for all layers: there is nothing to "
                f"spread over solve_axis={self.axis!r}. Leave it out, or take "
                "structure='block'."
            )
        if not isinstance(self.axis, str | None):
            raise TypeError(
                "solve_axis must be the name of a mesh axis or None, got "
                f"{summarize(self.axis)}. Pass the name, solve_axis='layers', say."
            )
        check_positive("max_steps", self.max_steps, may_be_array=True)
        check_number("rtol", self.rtol, BELOW_ONE, 0.01)
        if self.structure != "kronecker":
            self._check_structure()
        elif self.solver == "cholesky" and self.damping_form != "factored":
            raise ValueError(
                "solver='cholesky' needs damping_form='factored': the Tikhonov system "
                "does not separate into two sides. Use solver='cg'."
            )
        if self.solver == "cholesky" and self.space == "parameter":
            raise ValueError(
                "solver='cholesky' works in sample space, got space='parameter'. Leave "
                "space out, or use solver='cg'."
            )
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
    def method(self) -> str:
        """The solver; for ``"auto"`` direct for a factored system in sample space."""
        if self.solver != "auto":
            return self.solver
        separates = self.damping_form == "factored" and self.space != "parameter"
        return "cholesky" if separates else "cg"

    @property
    def uses_eigenpairs(self) -> bool:
        """Whether the leading eigenpairs of a layer's factors, if known, are enough."""
        return self.solver == "auto" and self.method == "cholesky"

    @property
    def is_iterative(self) -> bool:
        """Whether a previous solution can start the solve."""
        return self.method == "cg"


def default_damping_form(structure: Structure) -> DampingForm:
    """Returns the robust form of damping where there are factors to damp."""
    return "factored" if structure == "kronecker" else "tikhonov"


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
    solver = config.method
    if config.structure != "kronecker":
        return _plan_samples(config, rows, n_in, n_out, steps)
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
    if ranks is not None and config.uses_eigenpairs:
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


def _plan_samples(
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
    return Plan(space, config.method, flops, why)


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
