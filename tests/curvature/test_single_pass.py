"""The single pass: like `jax.value_and_grad`, with the rows of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import (
    CASES,
    NUM_EXAMPLES,
    Compact,
    by_name,
    init,
    normal,
    rebuild_gradients,
)
from optax_cgfac import value_and_grad

X = normal(0, NUM_EXAMPLES, 5)
Y = normal(1, NUM_EXAMPLES, 3)
PARAMS = init(Compact(), X)


def outputs_of(params, x):
    return Compact().apply({"params": params}, x)


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((outputs_of(params, x) - y) ** 2, -1))


def test_has_aux_returns_the_pair_with_the_value():
    def with_aux(params, x, y):
        outputs = outputs_of(params, x)
        return jnp.mean(jnp.sum((outputs - y) ** 2, -1)), {"outputs": outputs}

    run = jax.jit(value_and_grad(with_aux, has_aux=True))
    (value, aux), *others = run(PARAMS, X, Y)
    expected, *other_expected = jax.jit(value_and_grad(loss_fn))(PARAMS, X, Y)
    np.testing.assert_allclose(aux["outputs"], outputs_of(PARAMS, X), rtol=1e-5)
    assert_close((value, others[0]), (expected, other_expected[0]))
    assert_close(others[1].layers, other_expected[1].layers)


def assert_close(found, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)


def test_each_row_is_the_gradient_of_its_own_example():
    _, _, curvature = jax.jit(value_and_grad(loss_fn))(PARAMS, X, Y)
    per_example = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0, 0)))(
        PARAMS, X[:, None], Y[:, None]
    )
    for name, leaf in per_example.items():
        outer = jnp.einsum("ni,no->nio", *curvature.layers[name])
        assert_close({"kernel": outer[:, :-1], "bias": outer[:, -1]}, leaf)


def test_a_summed_loss_has_the_same_rows_as_its_mean():
    def summed(*args):
        return NUM_EXAMPLES * loss_fn(*args)

    _, _, mean = jax.jit(value_and_grad(loss_fn))(PARAMS, X, Y)
    _, _, total = jax.jit(value_and_grad(summed, loss_reduction="sum"))(PARAMS, X, Y)
    assert_close(total.layers, mean.layers)


def test_every_position_is_a_row_of_a_window_of_one_batch():
    case = CASES["dense rank 4"]()
    _, _, curvature = jax.jit(value_and_grad(case.loss))(case.params, case.inputs)
    assert curvature.layers["."].a.shape == (NUM_EXAMPLES * 6, 6)
    assert int(curvature.num_rows(".")) == NUM_EXAMPLES * 6
    assert int(curvature.num_updates) == 1


def test_where_leaves_parameters_out_but_differentiates_them():
    run = value_and_grad(loss_fn, where=lambda path: path != "Dense_0/bias")
    _, grads, curvature = jax.jit(run)(PARAMS, X, Y)
    assert np.any(grads["Dense_0"]["bias"])
    assert curvature.layers["Dense_0"].a.shape == (NUM_EXAMPLES, 5)
    assert not curvature.covers("Dense_0/bias")
    rebuilt, gradients = rebuild_gradients(curvature, PARAMS), by_name(grads)
    name = "Dense_0/kernel"
    assert_close(rebuilt[name], gradients[name])


@pytest.mark.parametrize("depth", [1, 3])
def test_examples_are_those_of_the_arguments_however_deep_the_model(depth):
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(-1, x.shape[-1])
            for _ in range(depth):
                x = nn.tanh(nn.Dense(3)(x))
            return x

    model, x = Flat(), normal(0, 6, 5, 4)
    params = init(model, x)
    run = value_and_grad(lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2))
    assert run(params, x)[2].spec.examples == 6
