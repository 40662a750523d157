"""How a damped system is solved: the options, and the one place that chooses."""

import dataclasses
from typing import Any, Literal, NamedTuple

from optax_cgfac.solve.cg import MAX_STEPS, RTOL
from optax_cgfac.utils.types import Array
from optax_cgfac.utils.validate import (
    BELOW_ONE,
    check_choice,
    check_number,
    check_positive,
)

DampingForm = Literal["tikhonov", "factored"]
Structure = Literal["kronecker", "block", "full"]
Space = Literal["auto", "parameter", "sample"]
Solver = Literal["auto", "cg", "cholesky", "eigendecomposition"]

_CHOICES = {
    "structure": ("kronecker", "block", "full"),
    "damping_form": ("tikhonov", "factored"),
    "solver": ("auto", "cg", "cholesky", "eigendecomposition"),
    "space": ("auto", "parameter", "sample"),
}


@dataclasses.dataclass(frozen=True)
class SolveSpec:
    """How the layers' systems are solved; see `scale_by_cgfac` for the options.

    Options that contradict each other raise, and so do options of conjugate gradients
    where another solver is chosen: none is ignored.
    """

    structure: Structure = "kronecker"
    damping_form: DampingForm = "tikhonov"
    solver: Solver = "auto"
    space: Space = "auto"
    max_steps: int | Array | None = None
    rtol: float | Array | None = None
    warm_start: bool | None = None

    def __post_init__(self):
        """Validates the options and their combination."""
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.max_steps is not None:
            check_positive("max_steps", self.max_steps, may_be_array=True)
        if self.rtol is not None:
            check_number("rtol", self.rtol, BELOW_ONE, 0.01)
        has_factors = self.structure == "kronecker"
        if not has_factors and self.damping_form == "factored":
            raise ValueError(
                f"structure={self.structure!r} has no factors: damping_form='factored' "
                "needs structure='kronecker'. Use damping_form='tikhonov'."
            )
        if not has_factors and self.solver == "eigendecomposition":
            raise ValueError(
                f"structure={self.structure!r} has no factors to decompose: use "
                "solver='cg' or 'cholesky'."
            )
        if has_factors and (self.solver, self.damping_form) == ("cholesky", "tikhonov"):
            raise ValueError(
                "solver='cholesky' needs damping_form='factored': the Tikhonov system "
                "does not separate into two sides. Use solver='cg'."
            )
        if not self.is_iterative:
            self._check_cg_options()

    def _check_cg_options(self) -> None:
        asked = ("max_steps", "rtol", "warm_start")
        given = [name for name in asked if getattr(self, name) is not None]
        given += ["space"] if self.space != "auto" else []
        if given:
            raise ValueError(
                f"{', '.join(given)} must be left out where no conjugate gradients "
                f"run, got solver={self.solver!r} with structure={self.structure!r} "
                f"and damping_form={self.damping_form!r}, which is solved by "
                f"{self.method!r}. Pass solver='cg' to iterate."
            )

    @property
    def method(self) -> str:
        """The solver; ``"auto"`` takes a direct one for factored damping."""
        if self.solver != "auto":
            return self.solver
        separates = self.damping_form == "factored" and self.space != "parameter"
        return "cholesky" if separates else "cg"

    @property
    def uses_eigenpairs(self) -> bool:
        """Whether a layer is solved with the eigenpairs of its factors, where kept."""
        return self.solver == "auto" and self.method == "cholesky"

    @property
    def is_iterative(self) -> bool:
        """Whether conjugate gradients run."""
        return self.method == "cg"

    @property
    def keeps_start(self) -> bool:
        """Whether the previous solution is kept to start the next solve from."""
        return self.is_iterative and self.warm_start is not False

    @property
    def limits(self) -> dict[str, Any]:
        """The limits of conjugate gradients, as keyword arguments."""
        return {
            "max_steps": MAX_STEPS if self.max_steps is None else self.max_steps,
            "rtol": RTOL if self.rtol is None else self.rtol,
        }


def default_damping_form(structure: Structure) -> DampingForm:
    """Returns the damping form of `cgfac` for a structure."""
    return "factored" if structure == "kronecker" else "tikhonov"


class Plan(NamedTuple):
    """How one layer is solved."""

    space: str  # "parameter", "sample", or "factors" for their eigenbases
    solver: str  # "cg", "cholesky", "eigenpairs" or "eigendecomposition"
    flops: float  # estimated operations
    reason: str  # the estimates that were compared


def make_plan(
    spec: SolveSpec,
    rows: int,
    n_in: int,
    n_out: int,
    ranks: tuple[int, int] | None = None,
) -> Plan:
    """Chooses the space and the solver of a layer by counting operations.

    Args:
      spec: The options.
      rows: Rows ``R`` that the window holds.
      n_in: Rows of the layer's matrix.
      n_out: Columns of the layer's matrix.
      ranks: Number of eigenpairs kept of each factor, if any.

    Returns:
      The `Plan`.
    """
    # inject_hyperparams traces the number: assume the default.
    max_steps = spec.limits["max_steps"]
    steps = max_steps if isinstance(max_steps, int) else MAX_STEPS
    if spec.structure != "kronecker":
        return _plan_samples(spec, rows, n_in, n_out, steps)
    n = n_in * n_out
    if spec.method == "eigendecomposition":
        # Householder tridiagonalisation, QR and back-transformation: about 9n³
        # (Golub & Van Loan, section 8.3); four rotations.
        flops = 9.0 * (n_in**3 + n_out**3) + 4.0 * n * (n_in + n_out)
        return Plan("factors", "eigendecomposition", flops, "Algorithm 1")
    # A V gᵀ, aᵀ(·)g with the better order of the two-sided products.
    apply = 4.0 * rows * n + 4.0 * rows**2 * min(n_in, n_out)
    separates = spec.damping_form == "factored"
    parameter = (steps + 1) * (2 * apply if separates else apply)
    if separates:
        sample = _factored_flops(spec.method, steps, rows, n_in, n_out)
    else:
        grams = 2.0 * rows**2 * (n_in + n_out)
        outside = 6.0 * rows * n + 6.0 * rows**2 * min(n_in, n_out)
        sample = grams + outside + 4.0 * rows**3 * (steps + 1)
    if ranks is not None and spec.uses_eigenpairs:
        flops = 4.0 * n * sum(ranks)
        reason = f"eigenpairs {_human(flops)}F, all rows {_human(sample)}F"
        return Plan("factors", "eigenpairs", flops, reason)
    space = spec.space
    if space == "auto":
        # A factored system separates, and each side is solved where it is smaller.
        space = "sample" if separates or sample <= parameter else "parameter"
    reason = (
        f"sample {_human(sample)}F {'≤' if sample <= parameter else '>'} "
        f"parameter {_human(parameter)}F"
    )
    if spec.space != "auto":
        reason = f"asked for; {reason}"
    flops = sample if space == "sample" else parameter
    return Plan(space, spec.method, flops, reason)


def _plan_samples(
    spec: SolveSpec, rows: int, n_in: int, n_out: int, steps: int
) -> Plan:
    """The plan of an exact Fisher; every row counts as one sample."""
    outside = 2.0 * rows**2 * (n_in + n_out) + 12.0 * rows * n_in * n_out
    inside = 2.0 * rows**2 * (steps + 1) if spec.is_iterative else rows**3
    parameter = 8.0 * rows * n_in * n_out * (steps + 1)
    reason = f"sample {_human(outside + inside)}F, parameter {_human(parameter)}F"
    if spec.space == "parameter":
        return Plan("parameter", spec.method, parameter, reason)
    return Plan("sample", spec.method, outside + inside, reason)


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
