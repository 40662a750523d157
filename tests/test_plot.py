"""Pictures: what is drawn is what was measured, and reads without colours."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_cgfac
from models import NUM_EXAMPLES, Scanned, init, normal
from steps import TRANSFORMS, ingredients, model_fn, problem, update

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
    assert ax.get_title(loc="left") == "12 of 36 parameters preconditioned (33.3 %)"
    assert "hatched" in ax.get_xlabel()
    labels = [text.get_text() for text in ax.texts]
    assert labels == ["12", "4, no curvature", "20, no curvature"]


def test_coverage_takes_an_nnx_module_and_draws_where_it_is_told():
    module, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((8, 3))
    estimator = optax_cgfac.fisher_estimator(
        lambda m, x: m(x), "squared_error", examples=4
    )
    given = pyplot.figure().subplots()
    ax = plot.coverage(estimator.init(module, x), module, ax=given)
    assert ax is given
    assert widths_of(ax) == [8]
    assert ax.get_xlabel() == "parameters"
    assert len(pyplot.get_fignums()) == 1


def test_coverage_refuses_the_parameters_of_another_model():
    with pytest.raises(ValueError, match=r"belongs to.*\n.*hidden/bias.*\n.*other"):
        plot.coverage(problem().curvature(), {"other": jnp.ones(3)})


def test_costs_are_the_operations_of_a_solve():
    """CG on parameters: eleven products with A ⊗ G, counted here by hand."""
    curvature = problem().curvature()
    ax = plot.cost(curvature, damping_form="tikhonov", space="parameter")
    assert names_of(ax) == ["hidden", "out"]
    rows = 8
    expected = [
        11 * (4 * rows * n_in * n_out + 4 * rows**2 * min(n_in, n_out))
        for n_in, n_out in ((6, 4), (4, 3))
    ]
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), expected)
    assert ax.get_title(loc="left") == f"{sum(expected):.3g} operations for all layers"
    (beside,) = ax.child_axes
    # Eight rows of 6 + 4 and of 4 + 3 numbers, four bytes each.
    assert names_of(beside) == ["cg, rows 320 B", "cg, rows 224 B"]
    with pytest.raises(ValueError, match="space must be one of"):
        plot.cost(curvature, space="nowhere")


def test_the_layers_of_a_stack_cost_together():
    x = normal(0, NUM_EXAMPLES, 5)
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: Scanned().apply({"params": p}, x), "squared_error", examples=4
    )
    curvature = estimator.init(init(Scanned(), x), x)
    ax = plot.cost(curvature, damping_form="tikhonov", space="parameter")
    found = dict(zip(names_of(ax), ax.get_lines()[0].get_xdata(), strict=True))
    rows = 32  # eight captures of four
    of_one = 11 * (4 * rows * 5 * 4 + 4 * rows**2 * 4)
    assert found["blocks/Dense_0"] == pytest.approx(3 * of_one)


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


def test_many_lines_have_looks_of_their_own():
    layers = {f"layer_{j}": {"residual": 0.5} for j in range(20)}
    ax = plot.residuals(entries(3, layers=layers))
    assert len({looks(line) for line in ax.get_lines()}) == 20


def test_a_stacked_history_is_drawn_as_a_list_of_its_entries():
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *entries(5))
    listed = plot.residuals(entries(5), layers=["layer_2"], steps=[1, 5, 10, 15, 20])
    of_scan = plot.residuals(stacked, layers=["layer_2"], steps=[1, 5, 10, 15, 20])
    (one,), (other,) = listed.get_lines(), of_scan.get_lines()
    np.testing.assert_allclose(one.get_xydata(), other.get_xydata(), rtol=1e-6)
    np.testing.assert_array_equal(one.get_xdata(), [1, 5, 10, 15, 20])


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


def test_nothing_is_crossed_where_every_update_was_taken():
    left = plot.damping(entries(num_rejected=0))
    assert len(left.get_legend().get_texts()) == 3


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: plot.residuals([]), ValueError, "history is empty"),
        (lambda: plot.damping([1.0]), TypeError, "must hold what.*got float"),
        (lambda: plot.residuals(entries(), steps=[1]), ValueError, "each of the 30"),
        (
            lambda: plot.residuals(entries(), layers=["nobody"]),
            ValueError,
            "No layer 'nobody'.*layer_0, layer_1",
        ),
        (
            lambda: plot.residuals(entries(layers={"dense": {"residual": -1.0}})),
            ValueError,
            r"No residual was computed.*certify=True",
        ),
        (lambda: plot.damping([{"layers": {}}]), ValueError, "no damping"),
        (
            lambda: plot.damping(entries(damping=np.ones(2))),
            ValueError,
            "one scalar an update",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_words(call, error, match):
    with pytest.raises(error, match=match):
        call()
    assert pyplot.get_fignums() == []


def test_the_diagnostics_of_a_training_are_a_history():
    p, tx = problem(), TRANSFORMS["cgfac by cg"]()
    state, history = tx.init(p.params), []
    for _ in range(2):
        _, state = update(tx, state)
        history.append(optax_cgfac.diagnostics(state))
    ax = plot.residuals(history)
    assert [line.get_label() for line in ax.get_lines()] == ["hidden", "out"]
    left = plot.damping(history)
    expected = [float(entry["damping"]) for entry in history]
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), expected)


# ---------------------------------------------------------------- eigenpairs


def descending_eigenvalues(dense):
    return np.sort(np.linalg.eigvalsh(dense))[::-1]


def test_the_spectrum_of_a_layer_is_that_of_the_dense_matrix():
    curvature = ingredients().curvature
    a, g = (np.asarray(x, np.float64) for x in curvature.layers["hidden"])
    dense = np.kron(a.T @ a / len(a), g.T @ g / len(g))
    ax = plot.spectrum(curvature, "hidden", damping=0.25)
    values = ax.get_lines()[0].get_ydata()
    expected = descending_eigenvalues(dense)
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-5, atol=1e-12)
    assert np.all(expected[len(values) :] < 1e-6 * expected[0])
    line = ax.get_lines()[1]
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert looks(line) != looks(ax.get_lines()[0])
    title = f"hidden: {len(values)} of 24 eigenvalues above rounding"
    assert ax.get_title(loc="left") == title


def test_the_spectrum_of_an_exact_block():
    """Eight rows of eight examples: eight eigenvalues of 12 at most."""
    p = problem()

    def loss_fn(params):
        return p.loss(params, p.batch)

    _, _, curvature = optax_cgfac.value_and_grad(loss_fn)(p.params)
    a, g = (np.asarray(x, np.float64) for x in curvature.layers["out"])
    gradients = np.einsum("ri,ro->rio", a, g).reshape(len(a), -1)
    expected = descending_eigenvalues(gradients.T @ gradients / len(a))
    ax = plot.spectrum(curvature, "out", structure="block")
    values = ax.get_lines()[0].get_ydata()
    assert len(values) <= 8
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-3)
    assert np.all(expected[len(values) :] < 1e-5 * expected[0])


def test_the_spectrum_of_a_stack_is_that_of_all_its_layers():
    x = normal(0, NUM_EXAMPLES, 5)
    params = init(Scanned(), x)

    def loss_fn(params):
        return jnp.mean(Scanned().apply({"params": params}, x) ** 2)

    _, _, curvature = optax_cgfac.value_and_grad(loss_fn)(params)
    a, g = (np.asarray(x, np.float64) for x in curvature.layers["blocks/Dense_0"])
    expected = np.concatenate(
        [
            descending_eigenvalues(np.kron(u.T @ u / len(u), v.T @ v / len(v)))
            for u, v in zip(a, g, strict=True)
        ]
    )
    expected = np.sort(expected)[::-1]
    ax = plot.spectrum(curvature, "blocks/Dense_0")
    values = ax.get_lines()[0].get_ydata()
    np.testing.assert_allclose(
        values, expected[: len(values)], rtol=1e-4, atol=1e-9 * expected[0]
    )
    assert f"of {expected.size} eigenvalues" in ax.get_title(loc="left")


def test_a_spectrum_needs_rows_a_layer_and_a_structure():
    empty = problem().curvature()
    with pytest.raises(ValueError, match="no rows of the layer 'out' yet"):
        plot.spectrum(empty, "out")
    with pytest.raises(ValueError, match="No tagged layer 'nobody'"):
        plot.spectrum(empty, "nobody")
    with pytest.raises(ValueError, match="'kronecker' or 'block', got 'full'"):
        plot.spectrum(empty, "out", structure="full")


# ---------------------------------------------------------------- without matplotlib


def test_without_matplotlib_the_module_is_there_and_says_what_to_install(monkeypatch):
    for name in "optax_cgfac.plot":
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(optax_cgfac, "plot", plot)  # back to it afterwards
    fresh = importlib.import_module("optax_cgfac.plot")
    assert fresh is not plot
    with pytest.raises(ImportError, match=r"pip install 'optax_cgfac\[plot\]'"):
        fresh.residuals(entries())
