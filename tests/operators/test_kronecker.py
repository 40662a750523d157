import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import (
    DampedOperator,
    DiagonalOperator,
    FactoredDampedOperator,
    KroneckerOperator,
    jacobi_preconditioner,
)

A_SCALE, G_SCALE, DAMPING, ALPHA, BETA = 0.2, 0.7, 0.3, 0.5, 1.5
STACKS = {"one layer": (), "stacked": (2,), "doubly stacked": (2, 2)}
NAMES = ["kronecker", "damped", "factored damped"]


def rows(stack, dtype, sizes=(5, 4, 3)):
    num_rows, n_in, n_out = sizes
    rng = np.random.default_rng(0)
    a = rng.normal(size=(*stack, num_rows, n_in))
    g = rng.normal(size=(*stack, num_rows, n_out))
    vector = rng.normal(size=(*stack, n_in, n_out))
    return tuple(jnp.asarray(x, dtype) for x in (a, g, vector))


def make(name, a, g):
    operator = KroneckerOperator(a, g, A_SCALE, G_SCALE)
    if name == "damped":
        return DampedOperator(operator, DAMPING)
    if name == "factored damped":
        stack = a.shape[:-2]
        alpha, beta = (jnp.full(stack, x, a.dtype) for x in (ALPHA, BETA))
        return FactoredDampedOperator(operator, alpha, beta)
    return operator


def dense_layer(name, a, g):
    a, g = oracles.moment(a, A_SCALE), oracles.moment(g, G_SCALE)
    if name == "factored damped":
        a, g = a + ALPHA * np.eye(len(a)), g + BETA * np.eye(len(g))
    dense = np.kron(a, g)
    return dense + DAMPING * np.eye(len(dense)) if name == "damped" else dense


def dense_layers(name, a, g):
    """The oracle's matrices of shape ``(*stack, n, n)``."""
    stack = a.shape[:-2]
    flat_a, flat_g = a.reshape(-1, *a.shape[-2:]), g.reshape(-1, *g.shape[-2:])
    layers = [dense_layer(name, *pair) for pair in zip(flat_a, flat_g, strict=True)]
    return np.stack(layers).reshape(*stack, *layers[0].shape)


@jax.jit
def views(operator, vector):
    return (
        operator.to_dense(),
        operator.matvec(vector),
        operator.diagonal(),
        operator.trace(),
    )


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_view_of_an_operator_agrees_with_the_dense_oracle(name, stack, dtype):
    a, g, vector = rows(stack, dtype)
    operator = make(name, a, g)
    dense = dense_layers(name, a, g)
    product = np.einsum("...ij,...j->...i", dense, vector.reshape(*stack, -1))
    diagonal = np.diagonal(dense, axis1=-2, axis2=-1)
    expected_views = (
        dense,
        product.reshape(vector.shape),
        diagonal.reshape(vector.shape),
        diagonal.sum(-1),
    )
    for view, expected in zip(views(operator, vector), expected_views, strict=True):
        assert view.dtype == dtype
        assert oracles.relative_error(view, expected) < oracles.tolerance(dtype)


@jax.jit
def extremes(operator):
    return operator.eigenvalue_extremes()


@pytest.mark.parametrize("num_rows", [5, 2], ids=["many rows", "few rows"])
@pytest.mark.parametrize("name", NAMES)
def test_the_extreme_eigenvalues_are_those_of_the_dense_oracle(name, num_rows, x64):
    a, g, _ = rows((2,), "float64", sizes=(num_rows, 4, 3))
    values = np.linalg.eigvalsh(dense_layers(name, a, g))
    low, high = extremes(make(name, a, g))
    np.testing.assert_allclose(low, values[:, 0], atol=1e-12)
    np.testing.assert_allclose(high, values[:, -1], rtol=1e-12)


def test_no_eigenvalue_is_negative_by_rounding():
    a, g, _ = rows((20,), "float32")
    a = a.at[..., 0].set(a[..., 1])
    assert np.any(np.linalg.eigvalsh(np.asarray(a.mT @ a)) < 0)
    low, _ = extremes(make("kronecker", a, g))
    assert np.all(low >= 0)


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_pytrees(name):
    a, g, vector = rows((), "float32")
    operator = make(name, a, g)
    apply = jax.jit(lambda operator, vector: operator.matvec(vector))
    np.testing.assert_allclose(
        apply(operator, vector), operator.matvec(vector), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_stays_single_beside_double_precision_scales(name, x64):
    a, g, vector = rows((), "float32")
    operator = KroneckerOperator(a, g, jnp.float64(A_SCALE), jnp.float64(G_SCALE))
    if name == "damped":
        operator = DampedOperator(operator, jnp.float64(DAMPING))
    elif name == "factored damped":
        alpha, beta = jnp.float32(ALPHA), jnp.float32(BETA)
        operator = FactoredDampedOperator(operator, alpha, beta)
    results = operator.matvec(vector), operator.diagonal(), operator.to_dense()
    assert {result.dtype for result in results} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", NAMES)
def test_a_product_forms_no_matrix_as_large_as_a_factor(name):
    a, g, vector = rows((), "float32", sizes=(2, 50, 40))
    operator = make(name, a, g)
    jaxpr = jax.make_jaxpr(operator.matvec)(vector)
    shapes = {var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars}
    assert (50, 40) in shapes
    assert not shapes & {(50, 50), (40, 40)}


def test_a_product_with_many_rows_takes_the_small_factor():
    a, g, vector = rows((), "float32", sizes=(50, 4, 3))
    jaxpr = jax.make_jaxpr(make("factored damped", a, g).matvec)(vector)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    shapes = {var.aval.shape for eqn in products for var in eqn.outvars}
    assert shapes == {(50, 3), (4, 3), (3, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_products_ask_for_full_precision(name):
    a, g, vector = rows((), "float32")
    jaxpr = jax.make_jaxpr(make(name, a, g).matvec)(vector)
    precisions = [
        eqn.params["precision"]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general"
    ]
    highest = jax.lax.Precision.HIGHEST
    assert precisions == [(highest, highest)] * 4


def test_scales_default_to_the_sum_over_rows(dtype):
    a, g, vector = rows((), dtype)
    expected = np.kron(oracles.moment(a, 1.0), oracles.moment(g, 1.0))
    product = KroneckerOperator(a, g).matvec(vector)
    assert oracles.relative_error(
        product, oracles.apply(expected, vector)
    ) < oracles.tolerance(dtype)


def test_factors_are_the_scaled_moments(dtype):
    a, g, _ = rows((2,), dtype)
    factors = KroneckerOperator(a, g, A_SCALE, G_SCALE).factors()
    for factor, side, scale in zip(factors, (a, g), (A_SCALE, G_SCALE), strict=True):
        expected = np.stack([oracles.moment(layer, scale) for layer in side])
        assert oracles.relative_error(factor, expected) < oracles.tolerance(dtype)


def test_views_of_a_diagonal_operator_agree(dtype):
    entries = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype)
    operator = DiagonalOperator(entries)
    vector = entries[::-1]
    dense = np.diag(np.arange(1.0, 7.0))
    np.testing.assert_array_equal(operator.to_dense(), dense)
    np.testing.assert_array_equal(operator.matvec(vector), oracles.apply(dense, vector))
    np.testing.assert_array_equal(operator.diagonal(), entries)
    assert operator.trace() == 21
    assert operator.eigenvalue_extremes() == (1, 6)


def test_a_damped_diagonal_operator_agrees_with_its_dense_form():
    operator = DampedOperator(DiagonalOperator(jnp.array([1.0, 2.0, 3.0])), 0.5)
    np.testing.assert_array_equal(operator.to_dense(), np.diag([1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(operator.diagonal(), [1.5, 2.5, 3.5])
    assert operator.trace() == 7.5
    assert operator.eigenvalue_extremes() == (1.5, 3.5)


def test_the_inverse_of_a_diagonal_skips_entries_that_are_not_positive():
    inverse = DiagonalOperator(jnp.array([2.0, 0.0, -4.0, 0.5])).inverse()
    np.testing.assert_array_equal(inverse.entries, [0.5, 1.0, 1.0, 2.0])


def test_the_inverse_of_a_diagonal_has_a_derivative():
    def total(entries):
        return DiagonalOperator(entries).inverse().trace()

    derivative = jax.grad(total)(jnp.array([2.0, 0.0, -4.0]))
    np.testing.assert_array_equal(derivative, [-0.25, 0.0, 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobi_preconditioner_inverts_the_diagonal(name, dtype):
    problem = problems.layer_problem(5, 4, 3, dtype=dtype)
    operator = make(name, problem.a, problem.g)
    diagonal = np.diag(dense_layer(name, problem.a, problem.g))
    product = jacobi_preconditioner(operator).matvec(problem.b)
    expected = oracles.float64(problem.b) / diagonal.reshape(problem.b.shape)
    assert oracles.relative_error(product, expected) < oracles.tolerance(dtype)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)])
def test_a_diagonal_takes_vectors_of_its_own_shape_only(shape):
    with pytest.raises(ValueError, match="shape of its entries"):
        DiagonalOperator(jnp.ones(3)).matvec(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (4, 2), (4, 4), (12,)])
def test_an_operator_takes_matrices_of_its_own_shape_only(shape):
    a, g, _ = rows((), "float32")
    with pytest.raises(ValueError, match=r"expected: \(\.\.\., 4, 3\)"):
        make("kronecker", a, g).matvec(jnp.ones(shape))


def test_layers_of_one_feature_have_extreme_eigenvalues(x64):
    a, g, _ = rows((), "float64", sizes=(1, 2, 1))
    low, high = extremes(make("kronecker", a, g))
    values = np.linalg.eigvalsh(dense_layer("kronecker", a, g))
    np.testing.assert_allclose([low, high], [values[0], values[-1]], atol=1e-12)
