"""Every case of `troubled` befalls two steps of a run, with every transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steps import TRANSFORMS, make_problem, problem
from troubled import (
    CASES,
    LOSS,
    POISON,
    Trouble,
    is_finite,
    runner,
    shared_runner,
    steps,
    transformation,
)

BEFORE, BAD, AFTER = 3, 2, 15
# They judge a step by its effect on the loss: some steps of a good run are not taken.
ADAPTIVE = ("cgfac", "cgfac by cg")


def sequence(trouble):
    good = Trouble()
    return steps(*[good] * BEFORE, *[trouble] * BAD, *[good] * AFTER)


def explodes(trouble):
    numbers = trouble.loss, trouble.hidden, trouble.entry
    return any(1 < number < np.inf for number in numbers)


def start(name):
    return problem().start(transformation(name))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_survives_and_recovers(name, case):
    (params, _, curvature), run = shared_runner(name)(
        start(name), sequence(CASES[case])
    )
    assert is_finite(run.params)
    assert is_finite(run.rows)
    assert is_finite(params)
    assert is_finite(curvature)
    counted = np.diff(run.counted, prepend=0)
    if case in POISON or (case in LOSS and name.startswith("cgfac")):
        assert (counted[BEFORE : BEFORE + BAD] > 0).all()
    # The next good batches train as if nothing had been, unless a given learning rate
    # took a finite step along a gradient out of all measure.
    if name in ADAPTIVE or not explodes(CASES[case]):
        assert run.losses[-1] < run.losses[0]
    # What the bad steps left behind, such as rows, is gone.
    if name not in ADAPTIVE and not explodes(CASES[case]):
        assert not counted[BEFORE + BAD :].any()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_of_nothing_else_stays_finite(name, case):
    trouble = CASES[case]
    (params, _, curvature), run = shared_runner(name)(
        start(name), steps(*[trouble] * (BEFORE + BAD + AFTER))
    )
    assert is_finite((params, run.params, run.rows))
    assert is_finite((curvature.layers, curvature.dropped))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_good_run_counts_nothing(name):
    _, run = shared_runner(name)(start(name), sequence(Trouble()))
    assert run.losses[-1] < run.losses[0]
    if name not in ADAPTIVE:
        assert run.counted[-1] == 0


@pytest.mark.parametrize("dead", ["hidden", "out"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_dead_layers_do_no_harm(name, dead):
    """Without ``hidden`` all activations are zero; without ``out`` all cotangents."""
    params, opt_state, curvature = start(name)
    params = params | {dead: jax.tree.map(jnp.zeros_like, params[dead])}
    state = params, opt_state, curvature
    state, run = shared_runner(name)(state, sequence(Trouble()))
    assert is_finite((run.params, run.rows, state[0]))
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["cgfac", "scale_by_cgfac"])
def test_half_precision_stays_within_its_range(name, dtype):
    """In float16 sums of squares overflow at a norm of 256."""
    p, tx = make_problem(jnp.dtype(dtype)), transformation(name)
    run = runner(p, tx)
    for scale in (1e-4, 1.0, 30.0, 1e3):
        for field in ("x", "loss", "hidden"):
            bad = Trouble(**{field: scale})
            _, out = run(p.start(tx), sequence(bad))
            assert is_finite((out.params, out.rows)), (field, scale)
            if name in ADAPTIVE or not explodes(bad):
                assert out.losses[-1] < out.losses[0], (field, scale)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_batches_again_and_again_cost_no_more_than_themselves(name, bad):
    """Neither the step before is lost, nor does the damping grow."""
    period, count = 4, BEFORE + BAD + AFTER
    troubles = [Trouble(x=bad if i % period == 3 else 1.0) for i in range(count)]
    (_, opt_state, _), run = shared_runner(name)(start(name), steps(*troubles))
    (_, good_state, _), good = shared_runner(name)(start(name), sequence(Trouble()))
    of_good = count - count // period
    assert np.nanmin(run.losses) < 1.2 * good.losses[of_good - 2]
    assert float(opt_state.damping) < 3 * float(good_state.damping)
