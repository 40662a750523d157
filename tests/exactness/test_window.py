"""The window averages the rows seen in its last updates, and only those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import fisher_estimator

pytestmark = pytest.mark.usefixtures("x64")

NUM_EXAMPLES = 6


def setup(window):
    model = problems.MLP((3,))
    model_fn, params, inputs = problems.model_problem(model, (4 * NUM_EXAMPLES, 4))
    estimator = fisher_estimator(
        model_fn, "squared_error", kind="exact", window=window, examples=NUM_EXAMPLES
    )
    batches = jnp.split(inputs, 4)
    curvature = estimator.init(params, batches[0])
    update = jax.jit(estimator.update)
    return curvature, lambda c, batch: update(c, params, batch), batches


def with_one(x):
    return np.concatenate([oracles.float64(x), np.ones((len(x), 1))], -1)


def fisher(batches):
    """Of one linear layer: the second moment of ``(x, 1)``, and 2 I."""
    return np.kron(oracles.moment(with_one(jnp.concatenate(batches))), 2 * np.eye(3))


def error(curvature, batches):
    dense = curvature.operator("Dense_0").to_dense()
    return oracles.relative_error(dense, fisher(batches))


@pytest.mark.parametrize("num_updates", [1, 3, 4])
def test_only_rows_seen_count(num_updates):
    curvature, update, batches = setup(window=4)
    for batch in batches[:num_updates]:
        curvature = update(curvature, batch)
    assert curvature.num_rows("Dense_0") == num_updates * NUM_EXAMPLES * 3
    assert error(curvature, batches[:num_updates]) < oracles.tolerance("float64")


def test_the_oldest_update_is_dropped():
    curvature, update, batches = setup(window=2)
    for batch in batches[:3]:
        curvature = update(curvature, batch)
    assert error(curvature, batches[1:3]) < oracles.tolerance("float64")
    assert error(curvature, batches[:3]) > 1e-3


def test_before_the_first_update_the_curvature_is_zero():
    curvature, _, _ = setup(window=3)
    assert curvature.num_rows("Dense_0") == 0
    assert not np.any(curvature.operator("Dense_0").to_dense())


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_damping_of_a_part_filled_window_sees_only_its_rows(form):
    curvature, update, batches = setup(window=4)
    curvature = update(curvature, batches[0])
    damped = curvature.operator("Dense_0", damping=0.1, damping_form=form)
    g = np.sqrt(2) * np.sqrt(3) * np.eye(3)  # second moment 2 I
    expected = oracles.DAMPED[form](with_one(batches[0]), g, 0.1)
    error = oracles.relative_error(damped.to_dense(), expected)
    assert error < oracles.tolerance("float64")
