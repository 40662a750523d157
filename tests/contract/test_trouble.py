"""Numbers that are not finite, dead layers and extreme scales do no harm."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
import steps
import troubled
from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac
from steps import TRANSFORMS, first, ingredients, problem, update, with_rows
from trees import assert_trees_close, is_finite, is_zero, scaled
from troubled import Trouble, num_counted, sequence, shared_runner, start

every_transform = pytest.mark.parametrize("name", TRANSFORMS)
bad_numbers = pytest.mark.parametrize("bad", [np.nan, np.inf])

# ------------------------------------------------------ every case befalls two steps

# They judge a step by its effect on the loss: some steps of a good run are not taken.
ADAPTIVE = ("cgfac", "cgfac by cg")


def explodes(trouble):
    numbers = trouble.loss, trouble.hidden, trouble.entry
    return any(1 < number < np.inf for number in numbers)


@every_transform
@pytest.mark.parametrize("case", troubled.CASES)
def test_a_run_survives_and_recovers(name, case):
    trouble, run_with = troubled.CASES[case], shared_runner(name)
    (params, _, curvature), run = run_with(start(name), sequence(trouble))
    assert is_finite((run.params, run.rows, params, curvature))
    counted = np.diff(run.counted, prepend=0)
    if case in troubled.POISON or (case in troubled.LOSS and name.startswith("cgfac")):
        assert (counted[troubled.BAD] > 0).all()
    # The next good batches train as if nothing had been, unless a given learning rate
    # took a finite step along a gradient out of all measure.
    if name in ADAPTIVE or not explodes(trouble):
        assert run.losses[-1] < run.losses[0]
    # What the bad steps left behind, such as rows, is gone.
    if name not in ADAPTIVE and not explodes(trouble):
        assert not counted[troubled.BAD.stop :].any()
    # A run of nothing else stays finite.
    always = troubled.steps(*[trouble] * troubled.COUNT)
    (params, _, curvature), run = run_with(start(name), always)
    assert is_finite((params, run.params, run.rows))
    assert is_finite((curvature.layers, curvature.dropped))


@every_transform
@pytest.mark.parametrize("dead", ["hidden", "out", None])
def test_dead_layers_do_no_harm(name, dead):
    """Without ``hidden`` all activations are zero; without ``out`` all cotangents."""
    params, *rest = start(name)
    if dead is not None:
        params = params | {dead: jax.tree.map(jnp.zeros_like, params[dead])}
    (params, *_), run = shared_runner(name)((params, *rest), sequence(Trouble()))
    assert is_finite((run.params, run.rows, params))
    assert run.losses[-1] < run.losses[0]
    assert name in ADAPTIVE or run.counted[-1] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["cgfac", "scale_by_cgfac"])
def test_half_precision_stays_within_its_range(name, dtype):
    """In float16 sums of squares overflow at a norm of 256."""
    p, tx = steps.make_problem(jnp.dtype(dtype)), troubled.transformation(name)
    run = troubled.runner(p, tx)
    for scale in (1e-4, 1.0, 30.0, 1e3):
        for field in ("x", "loss", "hidden"):
            bad = Trouble(**{field: scale})
            _, out = run(p.start(tx), sequence(bad))
            assert is_finite((out.params, out.rows)), (field, scale)
            if name in ADAPTIVE or not explodes(bad):
                assert out.losses[-1] < out.losses[0], (field, scale)


@pytest.mark.parametrize("name", ADAPTIVE)
@bad_numbers
def test_bad_batches_again_and_again_cost_no_more_than_themselves(name, bad):
    """Neither the step before is lost, nor does the damping grow."""
    troubles = [Trouble(x=bad if i % 4 == 3 else 1.0) for i in range(troubled.COUNT)]
    (_, opt_state, _), run = shared_runner(name)(start(name), troubled.steps(*troubles))
    (_, good_state, _), good = shared_runner(name)(start(name), sequence(Trouble()))
    assert np.nanmin(run.losses) < 1.2 * good.losses[troubled.COUNT * 3 // 4 - 2]
    assert float(opt_state.damping) < 3 * float(good_state.damping)


# ------------------------------------------------------------- single updates


@every_transform
@bad_numbers
def test_a_bad_gradient_gives_a_zero_update_is_counted_and_forgotten(name, bad):
    """Neither the warm start nor the velocity is a step for this gradient."""
    tx, grads = TRANSFORMS[name](), scaled(bad, ingredients().grads)
    updates, state = first(tx, grads=grads)
    # The residual of a bad gradient is no number, and is read by nobody.
    assert is_finite(state._replace(info=state.info._replace(residual=())))
    assert is_zero(updates)
    assert num_counted(state) >= 1
    good, state = update(tx, state)
    assert_trees_close(good, first(tx)[0], rtol=1e-3, atol=1e-5)
    bad_again, state = update(tx, state, grads=grads)
    assert is_zero(bad_again)
    good, state = update(tx, state)
    assert is_finite((good, state))
    assert not is_zero(good)


@pytest.mark.parametrize("name", ["cgfac", "cgfac with a learning rate"])
def test_one_bad_layer_stops_the_whole_step(name):
    """Half a step is no descent direction, and momentum would carry it on."""
    grads = ingredients().grads
    bad = scaled(jnp.nan, grads["out"])
    updates, state = first(TRANSFORMS[name](), grads=grads | {"out": bad})
    assert is_zero((updates, state.velocity))
    assert int(state.num_rejected) == 1


@pytest.mark.parametrize("factor", [1.0, np.nan])
def test_a_bad_gradient_does_not_lower_the_damping(factor):
    tx, given = TRANSFORMS["cgfac"](), ingredients()  # adapts at every second update
    _, state = first(tx)
    bad = {"grads": scaled(jnp.nan, given.grads), "value": given.value * factor}
    _, after = update(tx, state, **bad)
    assert float(after.damping) >= float(state.damping)


@every_transform
def test_without_rows_or_gradients(name):
    """The damping alone is the curvature of an empty window."""
    tx = TRANSFORMS[name]()
    updates, _ = first(tx, curvature=problem().curvature())
    assert is_finite(updates)
    assert not is_zero(updates)
    updates, state = first(tx, grads=scaled(0.0, ingredients().grads))
    if name != "cgfac with a learning rate":  # whose l2 pulls at the parameters
        assert is_zero(updates)
    assert is_finite((updates, state))
    assert num_counted(state) == 0


FALLING = {
    "cgfac": lambda damping: cgfac(0.1, damping=damping),
    "cgfac full": lambda damping: cgfac(0.1, damping=damping, structure="full"),
    "scale_by_cgfac": scale_by_cgfac,
    "scale_by_kfac": scale_by_kfac,
    "rate": lambda damping: cgfac(lambda count: jnp.sqrt(damping(count)), momentum=0.9),
}


@pytest.mark.parametrize("name", FALLING)
def test_a_schedule_that_falls_out_of_its_range_takes_no_step(name):
    """With a negative damping steps may ascend; the root makes the rate no number."""
    tx = FALLING[name](lambda count: 0.1 - 10.0 * count)
    updates, state = first(tx)
    assert not is_zero(updates)
    assert num_counted(state) == 0
    updates, state = update(tx, state)
    assert is_zero(updates)
    assert num_counted(state) > 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parameters_do_not_leave_the_range_of_their_precision(dtype):
    """Two finite numbers may have a sum that is none."""
    most = float(jnp.finfo(dtype).max)
    tx = cgfac(1.0, momentum=0.9)
    params, grads = (
        jax.tree.map(lambda x: x.astype(dtype), tree)
        for tree in (ingredients().params, ingredients().grads)
    )
    grads = jax.tree.map(lambda g: jnp.full_like(g, most / 2), grads)
    state = tx.init(params)
    for _ in range(5):
        updates, state = update(tx, state, params=params, grads=grads)
        params = optax.apply_updates(params, updates)
        assert is_finite(params)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(params)) > most / 4


# ------------------------------------------------------- systems in other units
# ``(F + γI) x = b``: rows ``s a`` and ``t g`` have ``s²t² F``, so that with a damping
# of ``s²t² γ`` and a right-hand side ``r b`` the solution is ``x r / s²t²``.

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
every_solver = pytest.mark.parametrize("name", SOLVERS)
DAMPING = 0.3
# Factors of a, g and b: gradients, losses and inputs in other units, balanced rows.
UNITS = [(1.0, 1.0, 10.0**n) for n in (-33, -30, -25, -20, 20, 25, 30)]
UNITS += [(1.0, math.sqrt(c), c) for c in (1e-20, 1e-12, 1e12, 1e20)]
UNITS += [(s, 1.0, s) for s in (1e-10, 1e10)]
UNITS += [(s, 1 / s, 1.0) for s in (1e-8, 1e-4, 1e4, 1e8)]


@functools.cache
def solver(name):
    """``solve(a, g, b, damping, x0)`` for `steps`' network, compiled once."""
    options, given = SOLVERS[name], ingredients()

    @jax.jit
    def solve(a, g, b, damping, x0, layers):
        curvature = with_rows(a, g, layers)
        if options is None:
            tx = scale_by_kfac(damping)
        else:
            tx = scale_by_cgfac(damping, **options)
        state = tx.init(given.params)
        if state.warm_start is not None:
            state = state._replace(warm_start=scaled(x0, given.params))
        return tx.update(scaled(b, given.grads), state, curvature=curvature)

    def run(*numbers, layers=given.curvature.layers):
        return solve(*(jnp.asarray(x, jnp.float32) for x in numbers), layers)

    return run


def solve_in(name, units, x0=0.0):
    a, g, b = units
    curvature = (a * g) ** 2
    solution, state = solver(name)(a, g, b, DAMPING * curvature, x0 * b / curvature)
    assert num_counted(state) == 0, units
    return jax.tree.map(lambda x: oracles.float64(x) * curvature / b, solution)


@pytest.mark.parametrize("x0", [0.0, 1.0], ids=["cold", "warm"])
@every_solver
def test_solutions_have_the_units_of_their_systems(name, x0):
    expected = solve_in(name, (1.0, 1.0, 1.0), x0)
    for units in UNITS:
        errors = jax.tree.map(
            oracles.relative_error, solve_in(name, units, x0), expected
        )
        assert max(jax.tree.leaves(errors)) < 1e-3, units


@every_solver
def test_a_bad_start_does_not_become_the_solution(name):
    """Neither one from an explosion, nor any start for a gradient of zero."""
    expected = solve_in(name, (1.0, 1.0, 1.0))
    for scale in (1e22, 1e30, 1e37):
        actual, _ = solver(name)(1.0, 1.0, 1.0, DAMPING, scale)
        for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            assert np.max(np.abs(x)) < 1e3 * np.max(np.abs(y))
    solution, state = solver(name)(1.0, 1.0, 0.0, DAMPING, 1.0)
    assert is_zero((solution, state.info.num_replaced))


@pytest.mark.parametrize("rows", ["none", "one direction", "full"])
@every_solver
def test_without_damping_no_step_is_out_of_measure(name, rows):
    """Where the rows span little, rounding makes the operator indefinite."""
    layers = ingredients().curvature.layers
    if rows == "one direction":
        layers = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), layers)
    for x0 in (0.0, 1.0):
        factor = 0.0 if rows == "none" else 1.0
        solution, _ = solver(name)(factor, 1.0, 1.0, 0.0, x0, layers=layers)
        assert is_finite(solution)
        if rows == "none":
            assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(solution)) < 1e3
