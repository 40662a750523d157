"""Systems in other units have the same solutions in other units, whatever the units.

``(F + γI) x = b``: rows ``s a`` and ``t g`` have ``s²t² F``, so that with a damping of
``s²t² γ`` and a right-hand side ``r b`` the solution is ``x r / s²t²``.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_cgfac
import oracles
from steps import ingredients, problem

EXACT = {"rtol": 1e-6, "max_steps": 60}
SOLVERS = {
    "tikhonov on rows": EXACT | {"space": "sample"},
    "tikhonov on parameters": EXACT | {"space": "parameter"},
    "factored by cg": EXACT | {"damping_form": "factored", "solver": "cg"},
    "factored": {"damping_form": "factored"},
    "block": EXACT | {"structure": "block"},
    "full": EXACT | {"structure": "full"},
    "kfac": None,
}
DAMPING = 0.3


class Units:
    """Factors of rows and right-hand side."""

    def __init__(self, a=1.0, g=1.0, b=1.0):
        self.a, self.g, self.b = a, g, b

    @property
    def curvature(self):
        return (self.a * self.g) ** 2


GRADIENTS = [Units(b=10.0**n) for n in (-33, -30, -25, -20, 20, 25, 30)]
LOSSES = [Units(g=math.sqrt(c), b=c) for c in (1e-20, 1e-12, 1e12, 1e20)]
INPUTS = [Units(a=s, b=s) for s in (1e-10, 1e10)]
BALANCED = [Units(a=s, g=1 / s) for s in (1e-8, 1e-4, 1e4, 1e8)]


@functools.cache
def solver(name):
    """``solve(a, g, b, damping, x0, layers)`` for `steps`' network, compiled once."""
    options, given = SOLVERS[name], ingredients()

    @jax.jit
    def solve(a, g, b, damping, x0, layers):
        layers = {
            k: rows._replace(a=a * rows.a, g=g * rows.g) for k, rows in layers.items()
        }
        curvature = dataclasses.replace(given.curvature, layers=layers)
        if options is None:
            tx = optax_cgfac.scale_by_kfac(damping)
        else:
            tx = optax_cgfac.scale_by_cgfac(damping, **options)
        grads = jax.tree.map(lambda x: b * x, given.grads)
        state = tx.init(given.params)
        if state.warm_start is not None:
            start = jax.tree.map(lambda x: x0 * x, given.params)
            state = state._replace(warm_start=start)
        return tx.update(grads, state, curvature=curvature)

    def run(*numbers, layers=given.curvature.layers):
        return solve(*(jnp.asarray(x, jnp.float32) for x in numbers), layers)

    return run


def solve_in(name, units, x0=0.0):
    back = units.b / units.curvature
    solution, state = solver(name)(
        units.a, units.g, units.b, DAMPING * units.curvature, x0 * back
    )
    diagnosed = optax_cgfac.diagnostics(state, ingredients().params)
    counts = [int(x["num_replaced"]) for x in diagnosed["layers"].values()]
    assert counts == [0, 0], vars(units)
    return jax.tree.map(lambda x: oracles.float64(x) / back, solution)


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["cold", "warm"])
@pytest.mark.parametrize("name", SOLVERS)
def test_solutions_have_the_units_of_their_systems(name, start):
    expected = solve_in(name, Units(), start)
    for units in GRADIENTS + LOSSES + INPUTS + BALANCED:
        jax.tree.map(
            lambda x, y, u=units: np.testing.assert_allclose(
                oracles.relative_error(x, y), 0, atol=1e-3, err_msg=str(vars(u))
            ),
            solve_in(name, units, start),
            expected,
        )


@pytest.mark.parametrize("name", ["tikhonov on rows", "tikhonov on parameters"])
def test_the_solution_is_that_of_the_dense_system(name):
    """Not only the same in all units."""
    a, g = ingredients().curvature.layers["out"]
    b = ingredients().grads["out"]["kernel"]
    expected = oracles.solve(oracles.tikhonov(a, g, DAMPING), b)
    for units in (Units(), Units(b=1e-25), Units(b=1e25)):
        actual = solve_in(name, units)["out"]["kernel"]
        assert oracles.relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("scale", [1e22, 1e30, 1e37])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_from_an_explosion_does_not_become_the_solution(name, scale):
    actual, _ = solver(name)(1.0, 1.0, 1.0, DAMPING, scale)
    expected = solve_in(name, Units())
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert np.max(np.abs(x)) < 1e3 * np.max(np.abs(y))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solution_for_zero_is_zero_whatever_the_start(name):
    solution, state = solver(name)(1.0, 1.0, 0.0, DAMPING, 1.0)
    assert not any(np.any(x) for x in jax.tree.leaves(solution))
    assert not np.any(state.info.num_replaced)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_the_first_damping_is_finite_and_waits_for_one(scale):
    p = problem()
    tx = optax_cgfac.cgfac()
    given = ingredients()
    layers = {
        k: rows._replace(g=rows.g * scale) for k, rows in given.curvature.layers.items()
    }
    curvature = dataclasses.replace(given.curvature, layers=layers)
    state = tx.init(given.params)
    update = jax.jit(
        lambda state, curvature: tx.update(
            given.grads,
            state,
            given.params,
            curvature=curvature,
            value=given.value,
            value_fn=lambda params: p.loss(params, p.batch),
        )[1]
    )
    state = update(state, curvature)
    assert np.isfinite(state.damping)
    assert state.damping > 0
    state = update(state, given.curvature)
    fresh = update(tx.init(given.params), given.curvature)
    # The square of 1e-30 or 1e30 is no number in float32: the first good one counts.
    # That of 1e-15 is one, and far outgrown by the next.
    waits = scale in (1e-30, 1e-15, 1e30)
    assert waits == (float(state.initial_damping) == float(fresh.initial_damping))


@pytest.mark.parametrize("rows", ["none", "one direction", "full"])
@pytest.mark.parametrize("name", SOLVERS)
def test_without_damping_no_step_is_out_of_measure(name, rows):
    """Where the rows span little, rounding makes the operator indefinite."""
    given = ingredients()
    layers = given.curvature.layers
    if rows == "one direction":
        layers = {
            k: x._replace(
                a=jnp.broadcast_to(x.a[:1], x.a.shape),
                g=jnp.broadcast_to(x.g[:1], x.g.shape),
            )
            for k, x in layers.items()
        }
    factor = 0.0 if rows == "none" else 1.0
    for start in (0.0, 1.0):
        solution, _ = solver(name)(factor, 1.0, 1.0, 0.0, start, layers=layers)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(solution))
        if rows == "none":
            largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(solution))
            assert largest < 1e3
