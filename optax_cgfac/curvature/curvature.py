"""The curvature: a pytree of the tagged layers and the last captured rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_cgfac.curvature.history import empty_rows, pushed
from optax_cgfac.curvature.report import format_report
from optax_cgfac.curvature.spec import CaptureSpec
from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.operators.exact_fisher import BlockFisherOperator, FullFisherOperator
from optax_cgfac.operators.kronecker import KroneckerOperator
from optax_cgfac.operators.rows import as_dtype, num_bytes, num_rows
from optax_cgfac.solve.choose import (
    DampingForm,
    SolveSpec,
    Structure,
    default_damping_form,
)
from optax_cgfac.solve.eigenpairs import LayerEigenpairs, empty_eigenpairs, refresh
from optax_cgfac.solve.solver import damped_operator
from optax_cgfac.utils.paths import text
from optax_cgfac.utils.types import Array, LayerRows, PyTree
from optax_cgfac.utils.validate import (
    NOT_NEGATIVE,
    check_alike,
    check_number,
    leaf_types,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curvature:
    """Captured rows of every tagged layer, a ring buffer over the last updates.

    A pytree with a static ``spec``: pass it through `jax.jit`, `jax.lax.scan` and
    checkpoints like any other state.

    Attributes:
      spec: What is captured, and how rows are kept.
      layers: Rows by layer name, all slots of the window one after the other.
      num_updates: How often rows were added, int32.
      num_calls: How often the estimator was called, int32.
      dropped: Rows left out so far as not finite, int32 in the order of ``tags``.
      model_inputs: A slice of the last inputs, for Gauss-Newton products.
      eigenpairs: Leading eigenpairs of the factors kept, by layer name.
    """

    spec: CaptureSpec = dataclasses.field(metadata={"static": True})
    layers: dict[str, LayerRows]
    num_updates: Array
    num_calls: Array
    dropped: Array
    model_inputs: PyTree = None
    eigenpairs: dict[str, LayerEigenpairs] = dataclasses.field(default_factory=dict)

    @property
    def tags(self) -> tuple[LayerTag, ...]:
        """The tagged layers."""
        return self.spec.tags

    def covers(self, path: str) -> bool:
        """Whether a parameter, such as ``"encoder/Dense_0/kernel"``, is tagged."""
        return path in {text(leaf) for tag in self.tags for leaf in tag.leaves}

    def num_rows(self, name: str) -> Array:
        """Returns the number of a layer's rows in the window so far."""
        seen = jnp.minimum(self.num_updates, self.spec.window)
        return seen * self._tag(name).rows_per_step

    def operator(
        self,
        path: str | None,
        damping: Array | float | None = None,
        structure: Structure = "kronecker",
        damping_form: DampingForm | None = None,
    ) -> Any:
        """Returns the curvature of one layer as a linear operator.

        Args:
          path: The layer's name, as in the report; None for all, with
            ``structure="full"``.
          damping: The scalar ``γ``; None for the undamped operator.
          structure: ``"kronecker"``, ``"block"`` (the layer's exact Fisher block) or
            ``"full"`` (all layers, with the blocks between them).
          damping_form: ``"tikhonov"``, the default, or for ``"kronecker"`` also
            ``"factored"``.

        Returns:
          An operator on matrices of shape ``(*stack, n_in, n_out)``; for ``"full"``
          on a list of them in the order of ``tags``.

        Raises:
          ValueError: If options are unknown or exclude each other.
        """
        form = damping_form or "tikhonov"
        SolveSpec(structure=structure, damping_form=form)
        if damping is not None:
            check_number("damping", damping, NOT_NEGATIVE, 0.1)
        elif damping_form is not None:
            raise ValueError(
                f"damping_form={damping_form!r} needs a damping, got None. Pass "
                "damping=0.1, say."
            )
        if (path is None) != (structure == "full"):
            raise ValueError(
                "structure='full' takes path=None, the others take one layer; got "
                f"path={path!r}, structure={structure!r}. Pass operator('hidden'), say."
            )
        if path is None:
            blocks = (self.block_operator(t, self.layers[t.name]) for t in self.tags)
            operator = FullFisherOperator(tuple(blocks))
            check_samples_match(operator.blocks, self.tags)
        else:
            tag = self._tag(path)
            operator = self.layer_operator(tag, self.layers[tag.name], structure)
        return operator if damping is None else damped_operator(operator, damping, form)

    def layer_operator(
        self, tag: LayerTag, rows: LayerRows, structure: Structure
    ) -> KroneckerOperator | BlockFisherOperator:
        """Returns the layer's own part of a structure over ``rows``."""
        if structure == "kronecker":
            return self.kronecker_operator(tag, rows)
        return self.block_operator(tag, rows)

    def block_operator(self, tag: LayerTag, rows: LayerRows) -> BlockFisherOperator:
        """Returns the exact Fisher block over ``rows`` of the layer ``tag``."""
        if any(not use.is_exact for use in tag.uses):
            raise ValueError(
                f"Layer {tag.name!r} keeps some of an example's positions, or their "
                "mean, but an exact Fisher block needs all. Pass fisher_estimator(..., "
                "positions=None, weight_sharing='expand')."
            )
        per_sample = sum(use.kept for use in tag.uses)
        num_samples = num_rows(rows.a) // per_sample
        rows = LayerRows(as_dtype(rows.a, tag.dtype), rows.g.astype(tag.dtype))
        seen = jnp.maximum(self.num_rows(tag.name) // (per_sample * tag.columns), 1)
        return BlockFisherOperator(*rows, num_samples, 1 / seen.astype(tag.dtype))

    def kronecker_operator(self, tag: LayerTag, rows: LayerRows) -> KroneckerOperator:
        """Returns ``A ⊗ G`` over ``rows`` of the layer ``tag``, a mean of the seen."""
        rows = LayerRows(as_dtype(rows.a, tag.dtype), rows.g.astype(tag.dtype))
        # Before the first update every row is zero, and so is the operator.
        count = jnp.maximum(self.num_rows(tag.name), 1).astype(tag.dtype)
        # Inputs whose cotangent is zero (padding, dead units) do not count in A.
        active = jnp.sum(jnp.any(rows.g != 0, -1), -1)
        active = jnp.maximum(active, 1).astype(tag.dtype)
        # The rows of an example with T positions and C columns sum to its gradient:
        # the mean of g gᵀ over rows is 1/(TC) of the mean over examples.
        g_scale = tag.positions * tag.columns / count
        return KroneckerOperator(*rows, 1 / active, g_scale)

    def push(self, other: "Curvature") -> "Curvature":
        """Adds the rows of ``other``, a curvature of one update, dropping the oldest.

        Args:
          other: With the same layers and a window of 1, as of `value_and_grad`.

        Returns:
          The curvature with the rows added.

        Raises:
          ValueError: If the layers or their numbers of rows differ.
        """
        if other.tags != self.tags or other.spec.window != 1:
            raise ValueError(
                "push() takes a curvature of the same layers with window 1; got window "
                f"{other.spec.window}, {', '.join(tag.name for tag in other.tags)}. "
                "Start with curvature.with_window(8) of a first curvature."
            )
        more = self.push_rows(other.layers)
        return dataclasses.replace(more, dropped=more.dropped + other.dropped)

    def push_rows(self, rows: dict[str, LayerRows]) -> "Curvature":
        """Adds one update's rows by layer name, dropping the oldest ones."""
        slot = self.num_updates % self.spec.window
        # In the order of the tags: JAX sorts the keys of a dict.
        ordered = {tag.name: self.layers[tag.name] for tag in self.tags}
        layers, dropped = pushed(ordered, rows, slot)
        curvature = dataclasses.replace(
            self,
            layers=layers,
            num_updates=self.num_updates + 1,
            dropped=self.dropped + dropped.astype(self.dropped.dtype),
        )
        if not self.eigenpairs:
            return curvature
        # While the window fills, refresh whenever it holds twice as much as before.
        count = curvature.num_updates
        due = (count & (count - 1) == 0) | (count == self.spec.window)
        due &= count <= self.spec.window
        due |= count % (self.spec.refresh_every or 1) == 0
        new = jax.lax.cond(due, curvature._new_eigenpairs, lambda: self.eigenpairs)
        return dataclasses.replace(curvature, eigenpairs=new)

    def _new_eigenpairs(self) -> dict[str, LayerEigenpairs]:
        tags = [tag for tag in self.tags if tag.name in self.eigenpairs]
        operators = [self.kronecker_operator(t, self.layers[t.name]) for t in tags]
        eigenpairs = refresh(operators, [self.eigenpairs[tag.name] for tag in tags])
        return {tag.name: x for tag, x in zip(tags, eigenpairs, strict=True)}

    def with_window(self, window: int) -> "Curvature":
        """Returns a curvature without rows that keeps ``window`` updates."""
        spec = dataclasses.replace(self.spec, window=window)
        return empty_curvature(spec, self.model_inputs)

    def partition_specs(self, axis_name: str) -> "Curvature":
        """Returns the specs with which `jax.shard_map` takes and returns a curvature.

        Args:
          axis_name: The axis over which the batch is split.

        Returns:
          A curvature of `jax.sharding.PartitionSpec`: all is replicated but the
          examples of the quadratic model, of which every device has its own.
        """
        specs = jax.tree.map(lambda _: PartitionSpec(), self)
        structure = jax.tree.structure(self.model_inputs)
        of_inputs = [
            PartitionSpec(axis_name) if b else PartitionSpec()
            for b in self.spec.batched
        ]
        model_inputs = jax.tree.unflatten(structure, of_inputs)
        return dataclasses.replace(specs, model_inputs=model_inputs)

    def report(
        self,
        structure: Structure = "kronecker",
        damping_form: DampingForm | None = None,
        **options: Any,
    ) -> str:
        """Returns a table of what is preconditioned, how, and what is not.

        Args:
          structure: As in `cgfac`.
          damping_form: As in `cgfac`; None for its default.
          **options: Further options of the solve, as in `scale_by_cgfac`.

        Returns:
          A text to print.
        """
        form = damping_form or default_damping_form(structure)
        solve_spec = SolveSpec(structure=structure, damping_form=form, **options)
        ranks = {name: x.ranks for name, x in self.eigenpairs.items()}
        kept = num_bytes(self.model_inputs)
        return format_report(self.spec, self.layers, solve_spec, kept, ranks)

    def _tag(self, name: str) -> LayerTag:
        for tag in self.tags:
            if tag.name == name:
                return tag
        raise ValueError(
            f"No tagged layer {name!r}. Tagged layers: "
            f"{', '.join(tag.name for tag in self.tags) or 'none'}. Pass one of them."
        )


def empty_curvature(spec: CaptureSpec, model_inputs: PyTree = None) -> Curvature:
    """Returns a curvature whose window holds no rows yet."""
    layers, eigenpairs = {}, {}
    for tag in spec.tags:
        layers[tag.name] = empty_rows(tag, spec.window, spec.rows_dtype_of(tag))
        if isinstance(spec.rank, int) and spec.keeps_eigenpairs(tag):
            count = spec.window * tag.rows_per_step
            a, g = (
                empty_eigenpairs(tag.stack, count, n, spec.rank, tag.dtype)
                for n in (tag.n_in, tag.n_out)
            )
            eigenpairs[tag.name] = LayerEigenpairs(a, g)
    # Two arrays, so that the curvature can be donated.
    num_updates, num_calls = (jnp.array(0, jnp.int32) for _ in range(2))
    dropped = jnp.zeros(len(spec.tags), jnp.int32)
    return Curvature(
        spec, layers, num_updates, num_calls, dropped, model_inputs, eigenpairs
    )


def check_rows(curvature: Curvature) -> None:
    """Checks shapes and dtypes of rows and eigenpairs."""
    # A restored or stacked curvature would otherwise fail deep inside a solve, or not
    # at all.
    like = jax.eval_shape(lambda: empty_curvature(curvature.spec))
    check_alike(
        "An array of the curvature does not fit its layers",
        leaf_types({"layers": like.layers, "eigenpairs": like.eigenpairs}),
        leaf_types({"layers": curvature.layers, "eigenpairs": curvature.eigenpairs}),
        "Pass what estimator.init or estimator.update returned, restore checkpoints "
        "into the former, and stack curvatures inside jax.vmap.",
    )


def check_samples_match(
    blocks: Sequence[BlockFisherOperator], tags: Sequence[LayerTag]
) -> None:
    """Checks that the layers have gradients of the same examples."""
    for tag, block in zip(tags, blocks, strict=True):
        if tag.sharing > 1 or block.num_samples != blocks[0].num_samples:
            raise ValueError(
                f"Layer {tag.name!r} has one input for all examples, and no gradients "
                "of single examples. Leave it out of the structure 'full' by "
                "fisher_estimator(..., where=...)."
            )
