"""What is captured and how rows are kept: the static part of a curvature."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from optax_cgfac.curvature.history import WINDOW
from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.problem.objective import Kind
from optax_cgfac.utils.paths import Path, leaves_by_path, text
from optax_cgfac.utils.types import PyTree
from optax_cgfac.utils.validate import check_alike, check_choice, check_positive

# With at most this many outputs half the eigenpairs suffice, and rows may be captured,
# and quadratic models built, half as often.
FEW_OUTPUTS = 32
_COUNTS = "window examples model_examples positions refresh_every capture_every"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSpec:
    """What is captured, and how rows are kept.

    Checks the options of `fisher_estimator`, alone and in pairs. `filled` adds a model
    and replaces ``"auto"`` and None by the numbers that follow from it.

    Attributes:
      objective: An `Objective`; None for a curvature of `value_and_grad`.
      kind: As in `fisher_estimator`, like all options down to ``capture_every``.
      tags: The tagged layers.
      uncovered: Parameters without a tag, by path, with the reason.
      model_fn: The model as a pure function of parameters and inputs; None likewise.
      batched: For every leaf of the inputs, whether it has an axis of examples.
      batch_size: Examples of the user's batch.
      few_outputs: Whether the model has at most 32 outputs.
      asks_for_eigenpairs: Whether the user set ``rank`` or ``refresh_every``.
    """

    objective: Any = None
    kind: Kind = "mc"
    whole_batch: bool = False
    window: int = WINDOW
    examples: int = 32
    model_examples: int | None = None
    weight_sharing: Literal["expand", "reduce"] = "expand"
    positions: int | None = 1
    rows_dtype: str | None = None
    rank: int | Literal["auto"] | None = "auto"
    refresh_every: int | None = None
    capture_every: int | None = None
    tags: tuple[LayerTag, ...] = ()
    uncovered: tuple[tuple[Path, str], ...] = ()
    model_fn: Callable[..., Any] | None = None
    batched: tuple[bool, ...] = ()
    batch_size: int = 1
    few_outputs: bool = False
    asks_for_eigenpairs: bool = False

    def __post_init__(self):
        """Checks every option, and those that exclude each other."""
        check_choice("kind", self.kind, ("mc", "empirical", "exact"))
        check_choice("weight_sharing", self.weight_sharing, ("expand", "reduce"))
        for name in _COUNTS.split():
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.rank not in ("auto", None):
            check_positive("rank", self.rank)
        if self.rank is None and self.refresh_every is not None:
            raise ValueError(
                f"refresh_every={self.refresh_every} needs eigenpairs, got rank=None. "
                "Leave one of the two out."
            )
        if self.whole_batch and self.model_examples is not None:
            raise ValueError(
                "whole_batch=True keeps all examples and takes no model_examples, got "
                f"model_examples={self.model_examples}. Leave one of the two out."
            )
        if self.weight_sharing == "reduce" and self.positions not in (1, None):
            raise ValueError(
                "weight_sharing='reduce' makes one row of all positions, got positions="
                f"{self.positions}. Leave one of the two out."
            )
        dtype = self.rows_dtype
        if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ValueError(
                f"rows_dtype must be a floating-point dtype, got {dtype}. Pass "
                "rows_dtype='float32', say."
            )
        losses = self.objective.losses if self.objective is not None else ()
        lacking = [loss.name for loss in losses if loss.hessian_columns is None]
        if self.kind == "exact" and lacking:
            raise ValueError(
                f"kind='exact' needs Loss.hessian_columns, which {lacking[0]!r} "
                "lacks. Pass one with hessian_columns=..., or use kind='mc'."
            )

    def filled(self, **model: Any) -> "CaptureSpec":
        """Adds a model, ``tags`` to ``few_outputs``, and the numbers it implies."""
        spec = dataclasses.replace(self, **model)
        rank, every = self.rank, self.capture_every
        asked = rank not in ("auto", None) or self.refresh_every is not None
        if rank == "auto":
            # Keeps products with eigenvectors cheap relative to one gradient. Every
            # example adds as many directions to the curvature as there are outputs.
            divisor = 8 if spec.few_outputs else 4
            rank = max(16, min(spec.batch_size // divisor, 64))
        rank = None if rank is None else int(rank)
        refresh = None if rank is None else self.refresh_every or 8
        if every is None:
            # Captures then cost about a sixteenth of the gradients, or half of that.
            # With small batches dispatch dominates, and skipping captures saves little.
            times = 32 if spec.few_outputs else 16
            every = min(-(-times * spec.captured // spec.batch_size), 8)
            every = every if spec.batch_size >= 64 else 1
        return dataclasses.replace(
            spec,
            rank=rank,
            refresh_every=refresh,
            capture_every=every,
            asks_for_eigenpairs=asked,
        )

    def is_from(self, options: "CaptureSpec", model_fn: Callable[..., Any]) -> bool:
        """Whether ``options`` for this model give this record, up to the window."""
        names = ("tags", "uncovered", "batched", "batch_size", "few_outputs")
        model = {name: getattr(self, name) for name in names}
        expected = options.filled(model_fn=model_fn, **model)
        return dataclasses.replace(expected, window=self.window) == self

    def check_parameters(self, params: PyTree) -> None:
        """Checks that parameters are those of ``init`` in name, shape and precision."""
        # Half precision is solved in float32. The other dtypes of a layer are free.
        dtypes = {tag.leaves[0]: tag.dtype for tag in self.tags}
        got = {}
        for path, leaf in leaves_by_path(params).items():
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            got[text(path)] = f"{dtype if path in dtypes else ''} {leaf.shape}"
        expected = {text(p): got.get(text(p), "an array") for p, _ in self.uncovered}
        for tag in self.tags:
            for path, shape in zip(tag.leaves, tag.shapes, strict=True):
                expected[text(path)] = f"{dtypes.get(path, '')} {shape}"
        again = "Call estimator.init(params, inputs) again if the model has changed."
        check_alike("A parameter must be as at estimator.init", expected, got, again)

    @property
    def captured(self) -> int:
        """Examples on which the model runs to capture rows."""
        return self.batch_size if self.whole_batch else self.examples

    @property
    def kept(self) -> int:
        """Examples kept for the quadratic model."""
        if self.whole_batch:
            return self.batch_size
        return min(self.model_examples or 32, self.batch_size)

    def keeps_eigenpairs(self, tag: LayerTag) -> bool:
        """Whether fewer eigenpairs are kept than a layer's factors have."""
        if not isinstance(self.rank, int):
            return False
        is_dense = not any(use.form == "index" or use.sampled for use in tag.uses)
        most = min(max(tag.n_in, tag.n_out), self.window * tag.rows_per_step)
        return is_dense and most > self.rank

    def rows_dtype_of(self, tag: LayerTag) -> str:
        """Returns the dtype in which a layer's rows are kept."""
        if self.rows_dtype is not None:
            return self.rows_dtype
        # The leading eigenpairs of a few sampled rows are far more uncertain than the
        # last digit of bfloat16.
        halves = self.positions == 1 and tag.dtype == "float32"
        return "bfloat16" if halves and self.keeps_eigenpairs(tag) else tag.dtype
