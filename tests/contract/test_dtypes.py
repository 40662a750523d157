"""What the user chose as precision stays, whatever JAX's default is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cgfac
from steps import TRANSFORMS, make_problem


def floating_dtypes(tree):
    return {
        str(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def two_steps(problem, tx):
    step = jax.jit(problem.step(tx))
    state = problem.start(tx)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(2):
        state, loss = step(state, problem.batch, jax.random.key(i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
    assert np.isfinite(loss)
    return state


@pytest.mark.parametrize("name", TRANSFORMS)
def test_float32_stays_float32_with_x64_enabled(name):
    with jax.enable_x64(True):
        problem = make_problem(jnp.float32)
        state = two_steps(problem, TRANSFORMS[name]())
        assert floating_dtypes(state) == {"float32"}
        integers = {
            str(leaf.dtype)
            for leaf in jax.tree.leaves(state)
            if jnp.issubdtype(leaf.dtype, jnp.integer)
        }
        assert integers == {"int32"}


def test_float64_parameters_are_solved_in_float64():
    with jax.enable_x64(True):
        problem = make_problem(jnp.float64)
        params, opt_state, curvature = two_steps(problem, TRANSFORMS["cgfac by cg"]())
        assert floating_dtypes(params) == {"float64"}
        assert floating_dtypes(curvature.layers) == {"float64"}
        assert floating_dtypes(opt_state.warm_start) == {"float64"}


@pytest.mark.parametrize("name", ["cgfac", "scale_by_cgfac"])
def test_bfloat16_parameters_stay_and_their_rows_are_float32(name):
    problem = make_problem(jnp.bfloat16)
    tx = optax.chain(TRANSFORMS[name](), optax.scale(0.1))
    params, _, curvature = two_steps(problem, tx)
    assert floating_dtypes(params) == {"bfloat16"}
    assert floating_dtypes(curvature.layers) == {"float32"}


def test_updates_have_the_dtype_of_the_gradient():
    """Gradients may be narrower than the rows; the update follows them."""
    problem = make_problem(jnp.bfloat16)
    curvature = problem.estimator.init(problem.params, problem.batch["x"])
    tx = optax_cgfac.scale_by_cgfac(0.1)
    updates, _ = jax.eval_shape(
        lambda g, s: tx.update(g, s, curvature=curvature),
        problem.params,
        tx.init(problem.params),
    )
    assert floating_dtypes(updates) == {"bfloat16"}
