"""Pictures: what is drawn is what was measured, and reads without colours."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_cgfac
import oracles
from models import NUM_EXAMPLES, Scanned, init, normal
from steps import ingredients, model_fn, problem

pyplot = pytest.importorskip("matplotlib.pyplot")
plot = importlib.import_module("optax_cgfac.plot")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def widths_of(ax):
    return [bar.get_width() for bar in ax.containers[0]]


def title_of(ax):
    return ax.get_title(loc="left")


def stacked(params, x):
    return Scanned().apply({"params": params}, x)


# ---------------------------------------------------------------- coverage and cost


def test_coverage_counts_every_parameter_and_hatches_those_without_curvature():
    p = problem()
    estimator = optax_cgfac.fisher_estimator(
        model_fn, "squared_error", examples=4, where=lambda path: "hidden" not in path
    )
    ax = plot.coverage(estimator.init(p.params, p.batch["x"]), p.params)
    assert names_of(ax) == ["out", "hidden/bias", "hidden/kernel"]
    assert widths_of(ax) == [12, 4, 20]
    assert [bar.get_hatch() is not None for bar in ax.patches] == [False, True, True]
    assert title_of(ax) == "12 of 36 parameters preconditioned (33.3 %)"
    assert "hatched" in ax.get_xlabel()
    labels = [text.get_text() for text in ax.texts]
    assert labels == ["12", "4, no curvature", "20, no curvature"]


def test_coverage_takes_an_nnx_module_and_draws_where_it_is_told():
    module, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((8, 3))
    estimator = optax_cgfac.fisher_estimator(
        lambda m, x: m(x), "squared_error", examples=4
    )
    given = pyplot.figure().subplots()
    assert plot.coverage(estimator.init(module, x), module, ax=given) is given
    assert widths_of(given) == [8]
    assert given.get_xlabel() == "parameters"
    assert len(pyplot.get_fignums()) == 1


def operations(num_rows, n_in, n_out):
    """Of CG on parameters: eleven products with A ⊗ G, counted by hand."""
    product = 4 * num_rows * n_in * n_out + 4 * num_rows**2 * min(n_in, n_out)
    return 11 * product


def test_costs_are_the_operations_of_a_solve():
    curvature = problem().curvature()
    ax = plot.cost(curvature, damping_form="tikhonov", space="parameter")
    assert names_of(ax) == ["hidden", "out"]
    expected = [operations(8, 6, 4), operations(8, 4, 3)]
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), expected)
    assert title_of(ax) == f"{sum(expected):.3g} operations for all layers"
    (beside,) = ax.child_axes
    # Eight rows of 6 + 4 and of 4 + 3 numbers, four bytes each.
    assert names_of(beside) == ["cg, rows 320 B", "cg, rows 224 B"]
    with pytest.raises(ValueError, match="space must be one of"):
        plot.cost(curvature, space="nowhere")


# ---------------------------------------------------------------- histories


def entries(num=30, **changes):
    rng = np.random.default_rng(0)
    return [
        {
            "layers": {
                f"layer_{j}": {"residual": np.exp(-j - i / 10), "cg_steps": 5}
                for j in range(4)
            },
            "damping": rng.uniform(0.1, 1),
            "step_size": rng.uniform(),
            "momentum": rng.uniform(),
            "num_rejected": int(i >= 3) + int(i >= 7),
        }
        | changes
        for i in range(num)
    ]


def looks(line):
    return line.get_linestyle(), line.get_marker()


def test_residuals_are_those_of_the_history_in_lines_that_differ_without_colour():
    history = entries()
    history[4]["layers"]["layer_1"]["residual"] = -1.0  # not computed
    ax = plot.residuals(history)
    lines = ax.get_lines()
    assert [line.get_label() for line in lines] == [f"layer_{j}" for j in range(4)]
    assert {line.get_color() for line in lines} == {"black"}
    assert len({line.get_linestyle() for line in lines}) == 4
    assert len({line.get_marker() for line in lines}) == 4
    assert ax.get_yscale() == "log"
    np.testing.assert_array_equal(lines[0].get_xdata(), np.arange(1, 31))
    for j, line in enumerate(lines):
        expected = [entry["layers"][f"layer_{j}"]["residual"] for entry in history]
        expected = [np.nan if x < 0 else x for x in expected]
        np.testing.assert_array_equal(line.get_ydata(), expected)


def test_a_stacked_history_is_drawn_as_a_list_of_its_entries():
    options = {"layers": ["layer_2"]}
    of_scan = jax.tree.map(lambda *xs: jnp.stack(xs), *entries(5))
    (one,), (other,) = (
        plot.residuals(history, **options).get_lines()
        for history in (entries(5), of_scan)
    )
    np.testing.assert_allclose(one.get_xydata(), other.get_xydata(), rtol=1e-6)
    np.testing.assert_array_equal(one.get_xdata(), [1, 2, 3, 4, 5])


def test_damping_step_size_and_momentum_over_time():
    history = entries()
    left = plot.damping(history)
    right = left.figure.axes[-1]
    drawn = [*left.get_lines(), *right.get_lines()]
    by_label = {line.get_label().split(" (")[0]: line for line in drawn}
    for name in ("damping", "step size", "momentum"):
        expected = [entry[name.replace(" ", "_")] for entry in history]
        np.testing.assert_allclose(by_label[name].get_ydata(), expected)
    np.testing.assert_array_equal(by_label["not taken"].get_xdata(), [4, 8])
    assert len({looks(line) for line in drawn}) == 4
    assert left.get_yscale() == "log"
    assert len(left.get_legend().get_texts()) == 4
    # Nothing is crossed where every update was taken.
    all_taken = plot.damping(entries(num_rejected=0))
    assert len(all_taken.get_legend().get_texts()) == 3


# ---------------------------------------------------------------- eigenpairs


def test_a_layer_that_is_not_there_is_refused_with_words():
    with pytest.raises(ValueError, match="No tagged layer 'nobody'"):
        plot.spectrum(problem().curvature(), "nobody")
    assert pyplot.get_fignums() == []


def assert_spectrum(ax, dense, rtol, rest):
    """What is drawn are the largest eigenvalues; returns how many."""
    expected = np.sort(np.linalg.eigvalsh(dense).ravel())[::-1]
    values = ax.get_lines()[0].get_ydata()
    shown, hidden = np.split(expected, [len(values)])
    np.testing.assert_allclose(values, shown, rtol=rtol, atol=1e-9 * expected[0])
    assert np.all(hidden < rest * expected[0])
    return len(values)


def test_the_spectrum_of_a_layer_is_that_of_the_dense_matrix():
    curvature = ingredients().curvature
    ax = plot.spectrum(curvature, "hidden", damping=0.25)
    dense = oracles.kronecker(*curvature.layers["hidden"])
    count = assert_spectrum(ax, dense, 1e-5, 1e-6)
    line = ax.get_lines()[1]
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert looks(line) != looks(ax.get_lines()[0])
    assert title_of(ax) == f"hidden: {count} of 24 eigenvalues above rounding"


def test_the_spectrum_of_an_exact_block():
    """Eight rows of eight examples: eight eigenvalues of 12 at most."""
    p = problem()
    run = optax_cgfac.value_and_grad(lambda params: p.loss(params, p.batch))
    curvature = run(p.params)[2]
    a, g = (oracles.float64(x) for x in curvature.layers["out"])
    dense = oracles.moment(np.einsum("ri,ro->rio", a, g).reshape(len(a), -1))
    ax = plot.spectrum(curvature, "out", structure="block")
    assert assert_spectrum(ax, dense, 1e-3, 1e-5) <= 8


def test_the_spectrum_of_a_stack_is_that_of_all_its_layers():
    x = normal(0, NUM_EXAMPLES, 5)
    run = optax_cgfac.value_and_grad(lambda params: jnp.mean(stacked(params, x) ** 2))
    curvature = run(init(Scanned(), x))[2]
    rows = zip(*curvature.layers["blocks/Dense_0"], strict=True)
    dense = np.stack([oracles.kronecker(a, g) for a, g in rows])
    ax = plot.spectrum(curvature, "blocks/Dense_0")
    assert_spectrum(ax, dense, 1e-4, 1e-5)
    assert f"of {dense.shape[0] * dense.shape[1]} eigenvalues" in title_of(ax)


# ---------------------------------------------------------------- without matplotlib


def test_without_matplotlib_the_module_is_there_and_names_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "optax_cgfac.plot")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(optax_cgfac, "plot", plot)  # back to it afterwards
    fresh = importlib.import_module("optax_cgfac.plot")
    assert fresh is not plot
    with pytest.raises(ImportError, match="matplotlib"):
        fresh.residuals(entries())
