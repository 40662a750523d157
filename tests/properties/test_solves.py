"""Operators and solves on drawn layers, against dense float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import oracles
from optax_cgfac import (
    BlockFisherOperator,
    DampedOperator,
    KroneckerOperator,
    conjugate_gradient,
)
from optax_cgfac.solve.factored import factored_damping, solve_directly
from optax_cgfac.solve.sample_space import cg_on_rows, solve_among_samples
from strategies import factors, layers, precision, properties


def kronecker(a, g):
    return KroneckerOperator(a, g, 1 / len(a), 1 / len(a))


def block(a, g):
    return BlockFisherOperator(a, g, num_samples=len(a), scale=1 / len(a))


def dense_block(a, g, damping):
    """Of the examples' gradients, one row each."""
    gradients = np.einsum("ri,ro->rio", oracles.float64(a), oracles.float64(g))
    return oracles.moment(gradients.reshape(len(a), -1)) + damping * np.eye(
        a.shape[1] * g.shape[1]
    )


DENSE = oracles.DAMPED | {"block": dense_block}


@jax.jit
def products(a, g, damping, vectors):
    """The damped operators on some vectors."""
    operators = {
        "tikhonov": DampedOperator(kronecker(a, g), damping),
        "factored": factored_damping(kronecker(a, g), damping),
        "block": DampedOperator(block(a, g), damping),
    }
    return {name: [op.matvec(v) for v in vectors] for name, op in operators.items()}


@jax.jit
def solutions(a, g, damping, b, x0):
    """What every way to solve makes of a system; three steps of CG."""
    limits = {"max_steps": 3, "rtol": 0.0}
    on_rows, _ = cg_on_rows(kronecker(a, g), damping, b, x0, **limits)
    [factored] = solve_directly([factored_damping(kronecker(a, g), damping)], [b])
    of_block, _ = solve_among_samples(
        block(a, g), jnp.asarray(damping), b, None, direct=True, **limits
    )
    return {"tikhonov": on_rows, "factored": factored, "block": of_block}


@jax.jit
def in_both_spaces(a, g, damping, b, x0, max_steps):
    limits = {"max_steps": max_steps, "rtol": 0.0}
    operator = kronecker(a, g)
    return {
        "parameter": conjugate_gradient(
            DampedOperator(operator, damping), b, x0, **limits
        ),
        "rows": cg_on_rows(operator, damping, b, x0, **limits),
    }


def assert_same_step(layer, *changed, back=1.0):
    """A changed system has the layer's solutions times ``back``.

    They are compared by what they leave of the layer's system.
    """
    with precision(layer.dtype):
        given = layer.a, layer.g, layer.damping, layer.b, layer.x0
        expected, actual = solutions(*given), solutions(*changed)
    for name, dense in DENSE.items():
        difference = oracles.float64(actual[name]) / back
        difference -= oracles.float64(expected[name])
        matrix = dense(layer.a, layer.g, layer.damping)
        error = np.linalg.norm(oracles.apply(matrix, difference))
        # The inversion lemma divides the rounding of b by γ.
        allowed = 5 * oracles.tolerance(layer.dtype, np.linalg.cond(matrix))
        assert error <= allowed * np.linalg.norm(oracles.float64(layer.b)), name


@properties
@given(layer=layers())
def test_operators_are_symmetric_positive_definite_and_the_dense_ones(layer):
    u, v = layer.rng().normal(size=(2, *layer.b.shape)).astype(layer.dtype)
    with precision(layer.dtype):
        found = products(layer.a, layer.g, layer.damping, [u, v])
    u, v = oracles.float64(u), oracles.float64(v)
    for name, dense in DENSE.items():
        matrix = dense(layer.a, layer.g, layer.damping)
        unit = oracles.tolerance(layer.dtype) * np.linalg.norm(matrix, 2)
        fu, fv = (oracles.float64(x) for x in found[name])
        size = np.linalg.norm(v)
        assert np.linalg.norm(fv - oracles.apply(matrix, v)) <= unit * size
        assert abs(np.sum(u * fv) - np.sum(v * fu)) <= unit * size * np.linalg.norm(u)
        # αβ = γ: no form of damping leaves less than γ.
        assert np.sum(v * fv) >= layer.damping * size**2 - unit * size**2


@properties
@given(layer=layers(), max_steps=st.integers(1, 40))
def test_a_solve_tells_the_truth_and_does_not_raise_the_model(layer, max_steps):
    args = layer.a, layer.g, layer.damping, layer.b, layer.x0
    with precision(layer.dtype):
        found = in_both_spaces(*args, max_steps)
    matrix = oracles.tikhonov(layer.a, layer.g, layer.damping)
    b, x0 = (oracles.float64(x).reshape(-1) for x in (layer.b, layer.x0))
    start, start_size = oracles.quadratic(matrix, -b, x0), np.linalg.norm(matrix @ x0)
    largest, eps = np.linalg.norm(matrix, 2), np.finfo(layer.dtype).eps
    for space, (x, info) in found.items():
        x = oracles.float64(x).reshape(-1)
        truth = np.linalg.norm(b - matrix @ x)
        floor = {
            "rows": 20 * eps**0.5 * (np.linalg.norm(b) + start_size),
            "parameter": 50 * eps * (np.linalg.norm(b) + largest * np.linalg.norm(x)),
        }[space]
        reported = float(info.residual_norm)
        assert reported <= 1.01 * truth + floor
        assert truth <= 1.01 * reported + floor
        # The solution is summed from terms like b/γ, and rounded with them.
        sizes = [np.linalg.norm(v) for v in (x, x0, b / layer.damping)]
        change = 10 * eps * sum(sizes)
        rounding = change * (truth + largest * change)
        assert oracles.quadratic(matrix, -b, x) <= start + rounding


@properties
@given(layer=layers())
def test_the_order_of_the_rows_does_not_matter(layer):
    order = layer.rng().permutation(len(layer.a))
    rest = layer.damping, layer.b, layer.x0
    assert_same_step(layer, layer.a[order], layer.g[order], *rest)


@properties
@given(layer=layers(), scale=factors(0.2, 5), weight=factors(0.1, 10))
def test_a_scaled_loss_scales_the_step_back(layer, scale, weight):
    """Cotangents times c are a curvature times c², and the damping goes with it."""
    a, g, b, x0 = layer[:4]
    scale, weight = np.array([scale, weight], layer.dtype)
    back, damping = weight / scale**2, layer.damping * float(scale) ** 2
    assert_same_step(layer, a, scale * g, damping, weight * b, back * x0, back=back)


@properties
@given(layer=layers(), scale=factors(0.2, 5))
def test_scaled_inputs_scale_the_step_as_the_weights(layer, scale):
    """Inputs times c and weights over c are the same function: so is the step."""
    a, g, b, x0 = layer[:4]
    scale = np.array(scale, layer.dtype)
    damping = layer.damping * float(scale) ** 2
    assert_same_step(
        layer, scale * a, g, damping, scale * b, x0 / scale, back=1 / scale
    )
