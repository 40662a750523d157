"""Step sizes that `cgfac` keeps between two fits of the quadratic model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cgfac import cgfac
from steps import ingredients, update

# A loss so large that a step never promises the whole of it, which shortens it too.
LOSS = 100.0
TIMES = {True: 4.0, False: 2.0}  # what a kept step may promise, by few_outputs


def kept(larger=1.0, value=1.0, few_outputs=False, **spec):
    """One fitted update and, at the eleventh, one that is not.

    Args:
      larger: Factor of the second gradient.
      value: The second loss, in units of the first.
      few_outputs: Whether the model has few outputs.
      **spec: Changes of the curvature.

    Returns:
      The two step sizes, and the state after.
    """
    given = ingredients()
    spec = dataclasses.replace(given.curvature.spec, few_outputs=few_outputs, **spec)
    curvature = dataclasses.replace(given.curvature, spec=spec)
    tx = cgfac(damping=0.1, damping_interval=1000, model_interval=1000)
    _, state = update(
        tx, tx.init(given.params), curvature=curvature, value=jnp.float32(LOSS)
    )
    state = state._replace(cgfac_count=jnp.int32(11))
    grads = jax.tree.map(lambda g: larger * g, given.grads)
    loss = jnp.float32(value * LOSS)
    _, after = update(tx, state, curvature=curvature, grads=grads, value=loss)
    return float(state.step_size), float(after.step_size), after


def test_a_step_that_promises_no_more_keeps_its_size():
    for larger in (0.5, 1.0, 1.2):
        fitted, size, _ = kept(larger)
        assert size == fitted > 0


@pytest.mark.parametrize("few_outputs", [False, True])
def test_a_step_that_promises_much_more_is_shortened(few_outputs):
    """A gradient k times as large has a direction k times as large, and promises k²."""
    fitted, size, after = kept(10.0, few_outputs=few_outputs)
    assert size == pytest.approx(fitted * TIMES[few_outputs] / 100, rel=1e-4)
    # What the next one is measured by is the fitted step still.
    assert float(after.promise) == float(kept()[2].promise) > 0


def test_what_it_may_promise_grows_with_the_loss():
    fitted, size, _ = kept(10.0, value=5.0)
    assert size == pytest.approx(fitted * 5 * TIMES[False] / 100, rel=1e-4)


@pytest.mark.parametrize("value", [5.0, -1.0])
def test_a_loss_that_may_be_negative_is_no_measure(value):
    objective = ingredients().curvature.spec.objective
    losses = tuple(
        dataclasses.replace(loss, lower_bound=None) for loss in objective.losses
    )
    objective = dataclasses.replace(objective, losses=losses)
    assert not objective.is_nonnegative
    fitted, size, _ = kept(10.0, value=value, objective=objective)
    assert size == pytest.approx(fitted * TIMES[False] / 100, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_fit_that_fails_leaves_no_promise(bad):
    given = ingredients()
    tx = cgfac(damping=0.1)
    _, state = update(tx, tx.init(given.params))
    promise = float(state.promise)
    grads = jax.tree.map(lambda g: bad * g, given.grads)
    _, after = update(tx, state, grads=grads)
    assert float(after.promise) == promise > 0
