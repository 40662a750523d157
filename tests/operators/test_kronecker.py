"""Every view of an operator against the dense matrix, made by an oracle in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from optax_cgfac import DampedOperator, FactoredDampedOperator, KroneckerOperator

A_SCALE, G_SCALE, DAMPING, ALPHA, BETA = 0.2, 0.7, 0.3, 0.5, 1.5
NAMES = ["kronecker", "damped", "factored damped"]


def rows(stack, dtype, sizes=(5, 4, 3)):
    num_rows, n_in, n_out = sizes
    rng = np.random.default_rng(0)
    shapes = (num_rows, n_in), (num_rows, n_out), (n_in, n_out)
    return [jnp.asarray(rng.normal(size=(*stack, *shape)), dtype) for shape in shapes]


def make(name, a, g, cast=lambda x: x):
    operator = KroneckerOperator(a, g, cast(A_SCALE), cast(G_SCALE))
    if name == "damped":
        return DampedOperator(operator, cast(DAMPING))
    if name == "factored damped":
        alpha, beta = (jnp.full(a.shape[:-2], x, a.dtype) for x in (ALPHA, BETA))
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
    flat = zip(a.reshape(-1, *a.shape[-2:]), g.reshape(-1, *g.shape[-2:]), strict=True)
    layers = np.stack([dense_layer(name, *pair) for pair in flat])
    return layers.reshape(*a.shape[:-2], *layers.shape[1:])


@jax.jit
def views(operator, vector):
    return (
        operator.to_dense(),
        operator.matvec(vector),
        operator.diagonal(),
        operator.trace(),
    )


@pytest.mark.parametrize("stack", [(), (2,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_view_of_an_operator_agrees_with_the_dense_oracle(name, stack, dtype):
    a, g, vector = rows(stack, dtype)
    dense = dense_layers(name, a, g)
    product = np.einsum("...ij,...j->...i", dense, vector.reshape(*stack, -1))
    diagonal = np.diagonal(dense, axis1=-2, axis2=-1)
    matrices = (x.reshape(vector.shape) for x in (product, diagonal))
    expected_views = dense, *matrices, diagonal.sum(-1)
    found = views(make(name, a, g), vector)
    for view, expected in zip(found, expected_views, strict=True):
        assert view.dtype == dtype
        assert oracles.relative_error(view, expected) < oracles.tolerance(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_stays_single_with_double_precision_scales(name, x64):
    a, g, vector = rows((), "float32")
    operator = make(name, a, g, cast=jnp.float64)
    results = operator.matvec(vector), operator.diagonal(), operator.to_dense()
    assert {result.dtype for result in results} == {jnp.dtype("float32")}


def products(name, sizes):
    """The shapes and precisions of the matrix products of one ``matvec``."""
    a, g, vector = rows((), "float32", sizes)
    jaxpr = jax.make_jaxpr(make(name, a, g).matvec)(vector)
    found = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    shapes = {var.aval.shape for eqn in found for var in eqn.outvars}
    return shapes, [eqn.params["precision"] for eqn in found]


@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_precise_and_forms_no_matrix_as_large_as_a_factor(name):
    shapes, precisions = products(name, (2, 50, 40))
    assert (50, 40) in shapes
    assert not shapes & {(50, 50), (40, 40)}
    assert precisions == [(jax.lax.Precision.HIGHEST,) * 2] * 4


def test_a_product_with_many_rows_takes_the_small_factor():
    shapes, _ = products("factored damped", (50, 4, 3))
    assert shapes == {(50, 3), (4, 3), (3, 3)}


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (12,)])
def test_an_operator_takes_matrices_of_its_own_shape_only(shape):
    a, g, _ = rows((), "float32")
    with pytest.raises(ValueError, match=r"expected: \(\.\.\., 4, 3\)"):
        make("kronecker", a, g).matvec(jnp.ones(shape))
