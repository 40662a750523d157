"""Capture in Linen: interceptors, collections and attributes of the user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import (
    CASES,
    NUM_EXAMPLES,
    Compact,
    assert_close,
    by_name,
    init,
    normal,
    rebuild_gradients,
)
from optax_cgfac import check_gradients, value_and_grad

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("cell", [nn.SimpleCell(3), nn.OptimizedLSTMCell(3)])
def test_an_rnn_that_is_an_attribute_is_covered(cell):
    class Model(nn.Module):
        rnn: nn.RNN

        def __call__(self, x):
            return self.rnn(x)

    model, x = Model(nn.RNN(cell)), normal(0, NUM_EXAMPLES, 3, 5)
    found = check_gradients(
        lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2), init(model, x), x
    )
    assert not found.uncovered
    assert max(found.errors.values()) < 1e-5


@pytest.mark.parametrize("is_inside", [False, True])
def test_interceptors_of_the_user_still_run(is_inside):
    case, seen = CASES["compact"](), []

    def doubling(next_function, args, kwargs, context):
        seen.append(type(context.module).__name__)
        outputs = next_function(*args, **kwargs)
        return 2 * outputs if isinstance(context.module, nn.Dense) else outputs

    def intercepted(function):
        def call(*args):
            with nn.intercept_methods(doubling):
                return function(*args)

        return call

    loss = intercepted(case.loss)
    value, grads = jax.value_and_grad(loss)(case.params, case.inputs)
    seen.clear()
    run = value_and_grad(loss) if is_inside else intercepted(value_and_grad(case.loss))
    captured, captured_grads, curvature = run(case.params, case.inputs)
    assert seen.count("Dense") >= 2
    np.testing.assert_allclose(captured, value, rtol=1e-6)
    assert_close(by_name(captured_grads), by_name(grads), 1e-6)
    assert_close(rebuild_gradients(curvature, case.params), by_name(grads), 1e-6)


def test_capture_leaves_no_interceptor_and_no_cached_trace_behind():
    case = CASES["jit class"]()
    before = jax.jit(jax.grad(case.loss))(case.params, case.inputs)
    jax.jit(value_and_grad(case.loss))(case.params, case.inputs)
    after = jax.jit(jax.grad(lambda *args: case.loss(*args)))(case.params, case.inputs)
    assert_close(by_name(after), by_name(before), 4 * EPS)
    variables = CASES["compact"]()
    _, state = Compact().apply(
        {"params": variables.params}, variables.inputs, mutable=True
    )
    assert set(state) == {"params"}


def test_the_users_own_collections_come_back_alone():
    """Sown values and statistics, under every way to say what is mutable."""

    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            self.sow("intermediates", "x", x)
            return x

    case = CASES["dense rank 2"]()
    params, returned = {"Dense_0": case.params}, []
    mutables = ["intermediates", ("intermediates", "batch_stats"), True]

    def loss(params, x):
        for mutable in mutables:
            outputs, state = Sowing().apply({"params": params}, x, mutable=mutable)
            returned.append(set(state))
        return jnp.mean(outputs**2)

    value_and_grad(loss)(params, case.inputs)
    own = {"intermediates"}
    assert returned[:3] == returned[-3:] == [own, own, own | {"params"}]
