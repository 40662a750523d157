"""Capture in Linen: every supported way to write a layer, without touching it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import (
    CASES,
    LAYER_CASES,
    NUM_EXAMPLES,
    Compact,
    assert_close,
    by_name,
    init,
    normal,
    rebuild_gradients,
)
from optax_cgfac import check_gradients, fisher_estimator, value_and_grad

X = normal(0, NUM_EXAMPLES, 5)
EPS = np.finfo(np.float32).eps
ALL_CASES = CASES | LAYER_CASES
TOLERANCES = {"cast on the way": 1e-2, "half precision": 2e-2}


@pytest.mark.parametrize("name", ALL_CASES)
def test_rows_rebuild_the_gradient_and_change_nothing(name):
    case = ALL_CASES[name]()
    # Traced without capture first: no cache of a lifted transform may hide a layer.
    value, grads = jax.jit(jax.value_and_grad(case.loss))(case.params, case.inputs)

    captured_value, captured_grads, curvature = jax.jit(value_and_grad(case.loss))(
        case.params, case.inputs
    )

    found = {tag.name: (tag.kind, tag.positions) for tag in curvature.tags}
    assert found == case.layers
    assert curvature.spec.uncovered == ()
    rebuilt = rebuild_gradients(curvature, case.params)
    assert_close(rebuilt, by_name(grads), TOLERANCES.get(name, 5e-6))
    np.testing.assert_allclose(captured_value, value, rtol=4 * EPS)
    assert jax.tree.structure(captured_grads) == jax.tree.structure(grads)
    assert_close(by_name(captured_grads), by_name(grads), 8 * EPS)


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
@pytest.mark.parametrize("name", LAYER_CASES)
def test_the_estimator_takes_rows_of_a_few_examples(name):
    case = LAYER_CASES[name]()
    estimator = fisher_estimator(
        case.model_fn,
        "squared_error",
        examples=NUM_EXAMPLES - 2,
        window=2,
        input_axes=case.input_axes,
    )
    curvature = estimator.init(case.params, case.inputs)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), curvature)
    update = jax.jit(estimator.update)
    for i in range(2):
        curvature = update(curvature, case.params, case.inputs, rng=jax.random.key(i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), curvature) == shapes
    assert {tag.name: tag.kind for tag in curvature.tags} == {
        name: kind for name, (kind, _) in case.layers.items()
    }
    for tag in curvature.tags:
        rows = curvature.layers[tag.name]
        assert rows.g.shape == (*tag.stack, 2 * tag.rows_per_step, tag.n_out)
        leaves = jax.tree.leaves(rows)
        assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in leaves)
        # Every update's rows count: each half of the window has some.
        halves = np.split(np.asarray(rows.g, np.float32), 2, axis=-2)
        if "+" not in tag.kind:
            assert all(np.any(half) for half in halves), tag.name


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


def test_an_error_in_the_users_model_leaves_capture_usable():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(4)(x)
            raise RuntimeError("the user's own")

    case = CASES["dense rank 2"]()

    def broken(params, x):
        return jnp.sum(Broken().apply({"params": {"Dense_0": params}}, x))

    with pytest.raises(RuntimeError, match="the user's own"):
        value_and_grad(broken)(case.params, case.inputs)
    _, grads, curvature = value_and_grad(case.loss)(case.params, case.inputs)
    assert_close(rebuild_gradients(curvature, case.params), by_name(grads), 1e-6)
