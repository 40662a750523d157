"""The window of rows: a ring buffer in which only what was seen counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Compact, init, normal
from optax_cgfac import value_and_grad
from optax_cgfac.utils.types import LayerRows
from steps import problem


def empty(window=3):
    """The small problem's curvature: layers "hidden" (6 x 4) and "out" (4 x 3)."""
    return problem().curvature().with_window(window)


def rows_of(value):
    """One update's rows, four of each layer, all entries equal."""
    full = jnp.full
    return {
        "hidden": LayerRows(full((4, 6), value), full((4, 4), value)),
        "out": LayerRows(full((4, 4), value), full((4, 3), value)),
    }


def slots(curvature):
    """The value that each slot of the window holds."""
    return np.asarray(curvature.layers["out"].a)[::4, 0].tolist()


def test_the_oldest_rows_are_dropped():
    curvature = empty(window=3)
    for value, held in [
        (1.0, [1, 0, 0]),
        (2.0, [1, 2, 0]),
        (3.0, [1, 2, 3]),
        (4.0, [4, 2, 3]),
        (5.0, [4, 5, 3]),
    ]:
        curvature = curvature.push_rows(rows_of(value))
        assert slots(curvature) == held
        # Only rows seen so far count.
        assert int(curvature.num_rows("out")) == 4 * np.count_nonzero(held)
    assert int(curvature.num_updates) == 5


def test_a_partly_filled_window_averages_over_what_it_holds():
    """The same rows once or three times are the same curvature."""
    assert not np.any(empty().operator("hidden").to_dense())
    once = empty(window=3).push_rows(rows_of(2.0))
    full = once.push_rows(rows_of(2.0)).push_rows(rows_of(2.0))
    expected = np.full((12, 12), 2.0**4)  # the mean of a aᵀ is 4, that of g gᵀ too
    for curvature in (once, full):
        dense = curvature.operator("out").to_dense()
        np.testing.assert_allclose(dense, expected, rtol=1e-6)


@pytest.mark.parametrize("side", ["a", "g"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_dropped_in_both_factors(side, bad):
    rows = rows_of(1.0)
    poisoned = getattr(rows["hidden"], side).at[2, 1].set(bad)
    rows["hidden"] = rows["hidden"]._replace(**{side: poisoned})
    curvature = empty(window=1).push_rows(rows)
    # The other three stand for it in the mean of g gᵀ; A counts its own rows.
    for held, kept in zip(
        curvature.layers["hidden"], (1.0, (4 / 3) ** 0.5), strict=True
    ):
        np.testing.assert_array_equal(held[2], np.zeros(held.shape[1]))
        np.testing.assert_allclose(np.delete(held, 2, 0), kept, rtol=1e-6)
    np.testing.assert_array_equal(curvature.layers["out"].a, 1.0)
    # In the order of the tags; the other layers lost none.
    assert curvature.dropped.tolist() == [
        tag.name == "hidden" for tag in curvature.tags
    ]
    assert curvature.push_rows(rows).dropped.sum() == 2
    # Those of a single pass were dropped before they were pushed.
    assert empty().push(curvature).dropped.tolist() == curvature.dropped.tolist()


def test_rows_without_cotangents_are_not_counted_as_dropped():
    rows = rows_of(1.0)
    rows["out"] = rows["out"]._replace(g=rows["out"].g.at[2].set(0.0))
    assert not np.any(empty(window=1).push_rows(rows).dropped)


# ---------------------------------------------------------------- push


X = normal(0, 6, 5)
PARAMS = init(Compact(), X)


def one_pass(num_examples=6, **options):
    def loss_fn(params):
        outputs = Compact().apply({"params": params}, X[:num_examples])
        return jnp.mean(jnp.sum(outputs**2, -1))

    return jax.jit(lambda p: value_and_grad(loss_fn, **options)(p)[2])(PARAMS)


def test_push_collects_batches_of_the_single_pass():
    batch = one_pass()
    window = batch.with_window(2)
    assert int(window.num_updates) == 0
    held = window.push(batch).push(batch)
    for name, rows in batch.layers.items():
        np.testing.assert_array_equal(
            held.layers[name].a, np.concatenate([rows.a, rows.a])
        )
    assert int(held.num_rows("Dense_0")) == 12


# ---------------------------------------------------------------- looking inside


def test_covers_names_parameters():
    curvature = empty()
    assert curvature.covers("hidden/kernel")
    assert curvature.covers("hidden/bias")
    assert not curvature.covers("out/bias")
    assert not curvature.covers("hidden")


# ---------------------------------------------------------------- as a pytree


def test_a_curvature_passes_through_jit_scan_and_flattening():
    start = empty()
    leaves, structure = jax.tree.flatten(start)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert again.tags == start.tags

    def body(curvature, value):
        return curvature.push_rows(rows_of(value)), None

    values = jnp.arange(1.0, 5.0)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, values))(start)
    assert slots(scanned) == [4, 2, 3]
    assert jax.tree.structure(scanned) == structure


def test_two_estimators_are_two_structures():
    """Otherwise jit would reuse a trace with the model of the other one."""
    curvature = empty()
    assert jax.tree.structure(curvature) != jax.tree.structure(
        dataclasses.replace(
            curvature, spec=dataclasses.replace(curvature.spec, model_fn=max)
        )
    )
