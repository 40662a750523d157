"""The public transformations solve the dense systems of the rows they are given."""

import functools

import jax
import jax.numpy as jnp
import pytest

import oracles
import problems
from optax_cgfac import scale_by_cgfac, scale_by_kfac, value_and_grad

pytestmark = pytest.mark.usefixtures("x64")

DAMPING = 0.1
LAYERS = ["Dense_0", "Dense_1"]
CG = {"max_steps": 500, "rtol": 1e-13}


def auto(damping, damping_form):
    """Factored systems are solved directly."""
    limits = CG if damping_form == "tikhonov" else {}
    return scale_by_cgfac(damping, damping_form=damping_form, **limits)


TRANSFORMS = {
    "kfac": scale_by_kfac,
    "parameter": functools.partial(scale_by_cgfac, **CG, space="parameter"),
    "sample": functools.partial(scale_by_cgfac, **CG, space="sample", solver="cg"),
    "auto": auto,
}


@functools.cache
def gradients_and_curvature(seed):
    model = problems.MLP((4, 3), use_bias=(False, True))
    model_fn, params, inputs = problems.model_problem(model, (6, 5), seed=seed)

    def loss_fn(params):
        return jnp.mean(jnp.sum((model_fn(params, inputs) - 1) ** 2, -1))

    _, grads, curvature = jax.jit(value_and_grad(loss_fn))(params)
    return params, grads, curvature


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_updates_solve_the_dense_systems_from_zero_and_from_a_warm_start(name, form):
    tx = TRANSFORMS[name](DAMPING, damping_form=form)
    update = jax.jit(tx.update)
    state = None
    for seed in (0, 1):
        params, grads, curvature = gradients_and_curvature(seed)
        state = tx.init(params) if state is None else state
        updates, state = update(grads, state, curvature=curvature)
        for layer in LAYERS:
            rows = curvature.layers[layer]
            dense = oracles.DAMPED[form](rows.a, rows.g, DAMPING)
            b = problems.layer_matrix(grads[layer])
            x = problems.layer_matrix(updates[layer])
            assert oracles.relative_error(x, oracles.solve(dense, b)) < 1e-9
