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


@pytest.mark.parametrize(("window", "num_updates"), [(4, 1), (4, 3), (2, 3)])
def test_only_the_last_rows_seen_count(window, num_updates):
    curvature, update, batches = setup(window)
    for batch in batches[:num_updates]:
        curvature = update(curvature, batch)
    held = batches[:num_updates][-window:]
    assert curvature.num_rows("Dense_0") == len(held) * NUM_EXAMPLES * 3
    # Of one linear layer: the second moment of (x, 1), and 2 I.
    expected = oracles.moment(with_one(jnp.concatenate(held)))
    dense = curvature.operator("Dense_0").to_dense()
    error = oracles.relative_error(dense, np.kron(expected, 2 * np.eye(3)))
    assert error < oracles.tolerance("float64")


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_damping_of_a_part_filled_window_sees_only_its_rows(form):
    curvature, update, batches = setup(window=4)
    curvature = update(curvature, batches[0])
    damped = curvature.operator("Dense_0", damping=0.1, damping_form=form)
    g = np.sqrt(2) * np.sqrt(3) * np.eye(3)  # second moment 2 I
    expected = oracles.DAMPED[form](with_one(batches[0]), g, 0.1)
    error = oracles.relative_error(damped.to_dense(), expected)
    assert error < oracles.tolerance("float64")
