"""The curvature: a pytree of tagged layers and a window of their rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_cgfac._checks import check_positive
from optax_cgfac._layers import LayerTag
from optax_cgfac._losses import Loss
from optax_cgfac._operators import (
    DampedOperator,
    FactoredDampedOperator,
    KroneckerOperator,
)
from optax_cgfac._paths import Path, text
from optax_cgfac._report import format_report
from optax_cgfac._solve import DampingForm, SolveConfig, damped_operator
from optax_cgfac._types import Array, LayerRows, PyTree


@dataclasses.dataclass(frozen=True)
class CurvatureSpec:
    """The static part of a curvature.

    Attributes:
      tags: The tagged layers.
      uncovered: Parameters without a tag, by path, with the reason.
      window: Number of updates whose rows are kept.
      model_fn: The user's model, for Gauss-Newton products; None for a curvature
        of `value_and_grad`.
      loss: The loss, for its Hessian; None likewise.
      options: The options of the estimator that fills the window.
      batched: For every leaf of the inputs, whether it has an axis of examples.
    """

    tags: tuple[LayerTag, ...]
    uncovered: tuple[tuple[Path, str], ...]
    window: int
    model_fn: Callable[..., Any] | None = None
    loss: Loss | None = None
    options: tuple[Any, ...] = ()
    batched: tuple[bool, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curvature:
    """Captured rows of every tagged layer, a ring buffer over the last updates.

    A pytree: the tags are static, the rows are arrays. Pass it through `jax.jit`,
    `jax.lax.scan` and checkpoints like any other state.

    Attributes:
      spec: The static part.
      layers: Rows by layer name, all slots of the window one after the other.
      num_updates: How often rows were added, int32.
      model_inputs: A slice of the last inputs, for Gauss-Newton products.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> model = nn.Dense(2)
      >>> x = jnp.ones((8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = optax_cgfac.fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x), "squared_error", rows=4
      ... )
      >>> curvature = estimator.init(params, x)
      >>> curvature = estimator.update(curvature, params, x, rng=jax.random.key(1))
      >>> int(curvature.num_rows("."))
      4
    """

    spec: CurvatureSpec = dataclasses.field(metadata={"static": True})
    layers: dict[str, LayerRows]
    num_updates: Array
    model_inputs: PyTree = None

    @property
    def tags(self) -> tuple[LayerTag, ...]:
        """The tagged layers."""
        return self.spec.tags

    def covers(self, path: str) -> bool:
        """Whether a parameter, such as ``"encoder/Dense_0/kernel"``, is tagged."""
        return path in {text(leaf) for tag in self.tags for leaf in tag.leaves}

    def num_rows(self, name: str) -> Array:
        """Returns the rows of a layer that count: those seen, at most the window's."""
        seen = jnp.minimum(self.num_updates, self.spec.window)
        return seen * self._tag(name).rows_per_step

    def operator(
        self,
        path: str,
        damping: Array | float | None = None,
        structure: str = "kronecker",
        damping_form: DampingForm = "tikhonov",
    ) -> KroneckerOperator | DampedOperator | FactoredDampedOperator:
        """Returns the curvature of one layer as a linear operator.

        Args:
          path: The layer's name, as in the report.
          damping: The scalar ``γ``; None for the undamped operator.
          structure: ``"kronecker"``.
          damping_form: ``"tikhonov"`` or ``"factored"``.

        Returns:
          An operator on matrices of shape ``(*stack, n_in, n_out)``.

        Raises:
          ValueError: If the layer or an option is unknown.
        """
        SolveConfig(structure=structure, damping_form=damping_form)
        operator = self.kronecker_operator(self._tag(path), self.layers[path])
        if damping is None:
            return operator
        return damped_operator(operator, damping, damping_form)

    def kronecker_operator(self, tag: LayerTag, rows: LayerRows) -> KroneckerOperator:
        """Returns ``A ⊗ G`` over ``rows`` of the layer ``tag``, seen ones averaged."""
        # Before the first update every row is zero, and so is the operator.
        count = jnp.maximum(self.num_rows(tag.name), 1).astype(rows.a.dtype)
        # Rows of an example with T positions sum to its gradient, so that the
        # mean of g gᵀ over rows is 1/T of the mean over examples; so do the rows
        # of the C columns of kind="exact".
        return KroneckerOperator(*rows, 1 / count, tag.positions * tag.columns / count)

    def push(self, other: "Curvature") -> "Curvature":
        """Adds the rows of ``other``, one update's worth, dropping the oldest.

        Args:
          other: A curvature with a window of 1 and the same layers, as
            `value_and_grad` returns it.

        Returns:
          The curvature with the rows added.

        Raises:
          ValueError: If the layers or their numbers of rows differ.
        """
        if other.tags != self.tags or other.spec.window != 1:
            raise ValueError(
                "push() takes a curvature of the same layers with window 1.\n"
                f"  expected: {_describe(self)}, window 1\n"
                f"  got:      {_describe(other)}, window {other.spec.window}"
            )
        return self.push_rows(other.layers)

    def push_rows(
        self, rows: dict[str, LayerRows], model_inputs: PyTree = None
    ) -> "Curvature":
        """Adds one update's rows by layer name, dropping the oldest ones."""
        slot = self.num_updates % self.spec.window
        layers = {}
        for tag in self.tags:
            new, old = rows[tag.name], self.layers[tag.name]
            # A row with a NaN or an infinity would poison the layer for a whole
            # window: it is dropped, in both factors.
            finite = _finite_rows(new.a) & _finite_rows(new.g)
            layers[tag.name] = LayerRows(
                *(
                    jax.lax.dynamic_update_slice_in_dim(
                        o,
                        jnp.where(finite, n, 0).astype(o.dtype),
                        slot * tag.rows_per_step,
                        axis=-2,
                    )
                    for n, o in zip(new, old, strict=True)
                )
            )
        if model_inputs is None:
            model_inputs = self.model_inputs
        return dataclasses.replace(
            self,
            layers=layers,
            num_updates=self.num_updates + 1,
            model_inputs=model_inputs,
        )

    def with_window(self, window: int) -> "Curvature":
        """Returns an empty curvature of the same layers with another window.

        Args:
          window: Number of updates to keep.

        Returns:
          A curvature without rows, to `push` others onto.

        Raises:
          ValueError: If ``window`` is not positive.
        """
        check_positive("window", window)
        spec = dataclasses.replace(self.spec, window=window)
        return empty_curvature(spec, self.model_inputs)

    def report(self, damping_form: DampingForm = "factored", **options: Any) -> str:
        """Returns a table of what is preconditioned, how, and what is not.

        Args:
          damping_form: The damping form of the transformation that will use this
            curvature; `cgfac` defaults to ``"factored"``.
          **options: Further options of the solve, as in `scale_by_cgfac`.

        Returns:
          A text to print.
        """
        config = SolveConfig(damping_form=damping_form, **options)
        spec = self.spec
        return format_report(
            spec.tags, spec.uncovered, spec.window, self.layers, config
        )

    def _tag(self, name: str) -> LayerTag:
        for tag in self.tags:
            if tag.name == name:
                return tag
        raise ValueError(
            f"No tagged layer {name!r}. Tagged layers: "
            f"{', '.join(tag.name for tag in self.tags) or 'none'}."
        )


def empty_curvature(spec: CurvatureSpec, model_inputs: PyTree = None) -> Curvature:
    """Returns a curvature whose window holds no rows yet."""
    layers = {}
    for tag in spec.tags:
        num_rows = spec.window * tag.rows_per_step
        a = jnp.zeros((*tag.stack, num_rows, tag.n_in), tag.dtype)
        g = jnp.zeros((*tag.stack, num_rows, tag.n_out), tag.dtype)
        layers[tag.name] = LayerRows(a, g)
    return Curvature(spec, layers, jnp.zeros((), jnp.int32), model_inputs)


def _finite_rows(rows: Array) -> Array:
    return jnp.all(jnp.isfinite(rows), -1, keepdims=True)


def _describe(curvature: Curvature) -> str:
    return ", ".join(f"{tag.name} ({tag.rows_per_step} rows)" for tag in curvature.tags)
