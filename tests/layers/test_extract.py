"""From calls to rows: all positions, a few of them, or one row for them together."""

import jax
import numpy as np
import pytest

from models import CASES, LAYER_CASES, NUM_EXAMPLES, by_name
from optax_cgfac.capture.call import probe_calls
from optax_cgfac.capture.discover import discover
from optax_cgfac.capture.linen.tap import run_captured
from optax_cgfac.layers.build import RowOptions, make_tags
from optax_cgfac.layers.extract import Draw, calls_of, example_rows
from optax_cgfac.operators.rows import to_dense

EVERY = CASES | LAYER_CASES


def captured(case):
    """Everything but the choice of rows: a function of the options and the draw."""
    discovery = discover(case.loss, case.params, case.inputs)

    def forward(probes):
        capture = run_captured(case.loss, (case.params, case.inputs), probes)
        return capture.outputs, [root.calls for root in capture.roots]

    loss, backward, calls = jax.vjp(forward, discovery.probes, has_aux=True)
    cotangents = probe_calls(*backward(NUM_EXAMPLES * jax.numpy.ones_like(loss)))

    def rows(draw=None, **options):
        tags, _ = make_tags(
            discovery,
            case.params,
            RowOptions(NUM_EXAMPLES, **options),
            where=None,
            fallback=False,
        )
        (tag,) = tags
        found = calls_of(tag, calls, cotangents)
        a, g = example_rows(tag, found, NUM_EXAMPLES, draw or Draw())
        return tag, np.asarray(to_dense(a), np.float64), np.asarray(g, np.float64)

    return rows


def factors(tag, a, g):
    """``A`` and ``G`` as the operators build them from one update's rows."""
    count = tag.rows_per_step
    return a.mT @ a / count, tag.positions * g.mT @ g / count


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("dense rank 3", 3),
        ("conv strides", 6),
        ("conv grouped", 20),
        ("embed (N, T)", 3),
        ("attend (N, T)", 5),
        ("attend tied", 3),
        ("attend tied, embed twice", 6),
        ("conv shared on two sizes", 8),
    ],
)
def test_the_mean_over_all_draws_is_the_factor_of_all_positions(name, turns, kept):
    rows = captured(EVERY[name]())
    expected = factors(*rows(positions=None))
    drawn = [
        factors(*rows(Draw(turn=np.full(NUM_EXAMPLES, turn)), positions=kept))
        for turn in range(turns)
    ]
    for got, want in zip(zip(*drawn, strict=True), expected, strict=True):
        np.testing.assert_allclose(np.mean(got, 0), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense rank 3", "dense rank 4", "conv strides"])
def test_reduced_rows_are_the_mean_input_and_the_summed_cotangent(name):
    """Eschenhagen et al. (2023), section 3.2; the one of the bias is a mean too."""
    case = EVERY[name]()
    rows = captured(case)
    _, a, g = rows(positions=None)
    tag, mean, total = rows(reduce=True)
    positions = len(a) // NUM_EXAMPLES
    a = a.reshape(NUM_EXAMPLES, positions, -1)
    g = g.reshape(NUM_EXAMPLES, positions, -1)
    assert positions > 1
    assert (tag.positions, tag.rows_per_step) == (1, NUM_EXAMPLES)
    np.testing.assert_allclose(mean, a.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, g.sum(1), rtol=1e-4, atol=1e-5)
    # What every position shares stays exact: the bias's gradient.
    grads = by_name(jax.grad(case.loss)(case.params, case.inputs))
    bias = mean[:, -1] @ total / NUM_EXAMPLES
    np.testing.assert_allclose(bias, grads["bias"], rtol=1e-4, atol=1e-5)


def test_a_row_of_a_long_table_keeps_one_entry_in_proportion_to_its_square(monkeypatch):
    case = EVERY["attend"]()
    rows = captured(case)
    _, whole, queries = rows(Draw(), positions=1)
    monkeypatch.setattr("optax_cgfac.layers.build._LONG", 1)
    draws = 1000
    mean = np.zeros_like(whole)
    for key in jax.random.split(jax.random.key(0), draws):
        tag, kept, g = rows(Draw(entries=key), positions=1)
        assert np.all(np.count_nonzero(kept, axis=-1) == 1)
        np.testing.assert_array_equal(g, queries)
        mean += kept**2 / draws
    assert not tag.uses[0].is_exact
    # Five standard deviations of an entry that is there with probability p.
    norms = np.sum(whole**2, -1, keepdims=True)
    share = whole**2 / norms
    deviation = 5 * np.sqrt(share * (1 - share) / draws)
    assert np.all(np.abs(mean / norms - share) <= deviation + 1e-6)
