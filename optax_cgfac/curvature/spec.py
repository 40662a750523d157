"""The static part of a curvature: its layers, its model, what is kept how."""

import dataclasses
from collections.abc import Callable
from typing import Any

from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.problem.objective import Objective
from optax_cgfac.utils.paths import Path


@dataclasses.dataclass(frozen=True)
class CurvatureSpec:
    """The static part of a curvature.

    Attributes:
      tags: The tagged layers.
      uncovered: Parameters without a tag, by path, with the reason.
      window: Number of updates whose rows are kept.
      model_fn: The user's model, for Gauss-Newton products; None for a curvature
        of `value_and_grad`.
      objective: The losses, for their Hessians; None likewise.
      options: The options of the estimator that fills the window.
      batched: For every leaf of the inputs, whether it has an axis of examples.
      factor: Of the Fisher beside a mean over examples: their number for a sum.
      num_examples: Examples of an update.
      rank: Eigenpairs kept of each factor; None for none.
      refresh_every: Captures between two computations of eigenpairs.
      batch_size: Examples of the user's batch.
      capture_every: Updates between two that capture rows.
      few_outputs: Whether the model's outputs are so few that the curvature changes
        slowly: what is known of it may be a little older.
      rows_dtype: The dtype in which rows are kept, if the user said it.
      halves_rows: Whether rows are kept in bfloat16 where only eigenpairs need them.
    """

    tags: tuple[LayerTag, ...]
    uncovered: tuple[tuple[Path, str], ...]
    window: int
    model_fn: Callable[..., Any] | None = None
    objective: Objective | None = None
    options: tuple[Any, ...] = ()
    batched: tuple[bool, ...] = ()
    factor: int = 1
    num_examples: int = 1
    rank: int | None = None
    refresh_every: int = 8
    batch_size: int = 1
    capture_every: int = 1
    few_outputs: bool = False
    rows_dtype: str | None = None
    halves_rows: bool = False

    def rows_dtype_of(self, tag: LayerTag) -> str:
        """Returns the dtype in which a layer's rows are kept."""
        if self.rows_dtype is not None:
            return self.rows_dtype
        # The leading eigenpairs of a few sampled rows are far more uncertain than an
        # eighth binary digit (benchmarks/LOG.md, 16).
        halves = (
            self.halves_rows and tag.dtype == "float32" and self.keeps_eigenpairs(tag)
        )
        return "bfloat16" if halves else tag.dtype

    def keeps_eigenpairs(self, tag: LayerTag) -> bool:
        """Whether fewer eigenpairs are kept than a layer's factors have."""
        if self.rank is None:
            return False
        is_dense = not any(use.form == "index" or use.sampled for use in tag.uses)
        most = min(max(tag.n_in, tag.n_out), self.window * tag.rows_per_step)
        return is_dense and most > self.rank


# Models of at most so many outputs need half the eigenpairs, and rows and quadratic
# models half as often (benchmarks/LOG.md, 10 and 17).
FEW_OUTPUTS = 32


def default_rank(num_examples: int, few_outputs: bool) -> int:
    """Eigenpairs whose products are a part of a gradient of so many examples.

    Every example adds as many directions to the curvature as there are outputs:
    classifiers of few classes need less (benchmarks/LOG.md).

    Returns:
      Their number.
    """
    share = 8 if few_outputs else 4
    return max(16, min(num_examples // share, 64))


def default_capture_every(captured: int, num_examples: int, few_outputs: bool) -> int:
    """Updates between captures such that they cost about a sixteenth of the gradient.

    A 32nd part of it where the outputs are few.
    Batches of less than 64 examples are not worth it: their steps take the time that
    it takes to start them.

    Returns:
      Their number.
    """
    if num_examples < 64:
        return 1
    return min(-(-(32 if few_outputs else 16) * captured // num_examples), 8)
