"""Parameters that no tag covers: found, explained, and three ways out."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_cgfac
from models import NUM_EXAMPLES, Compact, JitMethod, Scanned, init, normal

X = normal(0, NUM_EXAMPLES, 5)


class Scale(nn.Module):
    """A user's module with parameters of its own."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class WithScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Scale(name="norm")(nn.Dense(4, name="first")(x))
        return nn.Dense(2, name="last")(nn.tanh(x))


class WithConvLocal(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.ConvLocal(3, (3, 3), name="conv")(x))
        return nn.Dense(2, name="last")(x.reshape(len(x), -1))


class OwnKernel(nn.Dense):
    """Overrides the call without its parent's: a layer of its own."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.normal(), (5, self.features))
        return jnp.sin(inputs @ kernel)


class WithOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(OwnKernel(3, name="own")(x))


def wrapped(wrapper, x, **kwargs):
    return wrapper(nn.Dense(3, name="inner"), name="wrapper")(x, **kwargs)


class Wrapped(nn.Module):
    """A layer whose parameters are mapped before it sees them."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "WeightNorm":
            x = wrapped(nn.WeightNorm, x)
        else:
            mapped = nn.map_variables(
                nn.Dense,
                "params",
                lambda variables: jax.tree.map(jnp.tanh, variables),
                init=self.is_initializing(),
            )
            x = mapped(3, name="inner")(x)
        return nn.Dense(2, name="last")(x)


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(5, name="inner")
        last = nn.Dense(2, name="last")
        if self.is_initializing():
            return last(inner(x))
        _, x = nn.while_loop(
            lambda module, carry: carry[0] < 2,
            lambda module, carry: (carry[0] + 1, module(carry[1])),
            inner,
            (0, x),
        )
        return last(x)


class Between(nn.Module):
    """One layer before a dense one."""

    layer: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(self.layer()(x))


def between(make, *leaves, reason, x=None):
    x = normal(0, NUM_EXAMPLES, 5, 4) if x is None else x
    return Between(make), x, [f"inner/{leaf}" for leaf in leaves], reason


MAPPED = r"computes with a function of it \(nn.map_variables, nn.WeightNorm"


def estimator_of(model, **options):
    return optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x), "squared_error", rows=4, **options
    )


def estimate(model, inputs=X, params=None, **options):
    params = init(model, inputs) if params is None else params
    return estimator_of(model, **options).init(params, inputs)


UNCOVERED = {
    "norm": (WithScale(), X, ["norm/bias", "norm/scale"], "a parameter of Scale"),
    "conv": (
        WithConvLocal(),
        normal(0, NUM_EXAMPLES, 4, 4, 2),
        ["conv/bias", "conv/kernel"],
        "a kernel for every position",
    ),
    "own": (WithOwn(), X, ["own/kernel"], "a parameter of OwnKernel"),
    "scan": (
        Scanned(axes=False),
        X,
        ["blocks/Dense_0/bias", "blocks/Dense_0/kernel"],
        r"add optax_cgfac.capture_axes\(\) to the variable_axes of nn.scan",
    ),
    "map_variables": (Wrapped("map"), X, ["inner/bias", "inner/kernel"], MAPPED),
    "WeightNorm": (
        Wrapped("WeightNorm"),
        X,
        ["inner/bias", "inner/kernel", "wrapper/inner/kernel/scale"],
        MAPPED,
    ),
    "while_loop": (
        Repeated(),
        X,
        ["inner/bias", "inner/kernel"],
        r"no other \(nn.while_loop, say\) can carry them",
    ),
    "masked conv": between(
        lambda: nn.Conv(2, (3,), mask=jnp.ones((3, 4, 2)), name="inner"),
        "bias",
        "kernel",
        reason="its kernel is masked",
    ),
    "circular conv_transpose": between(
        lambda: nn.ConvTranspose(2, (3,), padding="CIRCULAR", name="inner"),
        "bias",
        "kernel",
        reason="adds up periods of its output",
    ),
    "norm of other axes": between(
        lambda: nn.LayerNorm(feature_axes=(-2,), name="inner"),
        "bias",
        "scale",
        reason="its features are not on the last axis",
    ),
    "einsum that sums the input": between(
        lambda: nn.Einsum((4, 3), "btc,cd->bd", use_bias=False, name="inner"),
        "kernel",
        reason="sums over an axis of one operand alone",
    ),
    "einsum of a diagonal": between(
        lambda: nn.Einsum((4, 4, 3), "btc,ccd->btd", use_bias=False, name="inner"),
        "kernel",
        reason="repeats a letter",
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_init_raises_with_the_list_the_reasons_and_three_ways_out(name):
    model, inputs, paths, reason = UNCOVERED[name]
    with pytest.raises(ValueError, match=reason) as error:
        estimate(model, inputs)
    message = str(error.value)
    assert message.startswith(f"{len(paths)} parameters have no curvature:\n")
    for path in paths:
        assert f"\n  {path}: " in message
    assert "last/kernel: " not in message
    for way_out in ("1. where", "2. fallback", "3. another layer", "tag_layer"):
        assert way_out in message


@pytest.mark.parametrize("name", UNCOVERED)
def test_fallback_covers_the_rest_and_reports_the_list(name):
    model, inputs, paths, _ = UNCOVERED[name]
    curvature = estimate(model, inputs, fallback=True)
    assert sorted("/".join(path) for path, _ in curvature.spec.uncovered) == paths
    assert curvature.covers("last/kernel")
    assert not any(curvature.covers(path) for path in paths)


def test_an_unused_parameter_is_told_apart():
    params = init(Compact(), X) | {"old": {"kernel": jnp.ones((5, 2))}}
    with pytest.raises(ValueError, match=r"1 parameters .*\n  old/kernel: .*unused"):
        estimate(Compact(), params=params)


def test_where_leaves_out_and_names_that_as_the_reason():
    curvature = estimate(WithScale(), where=lambda path: "norm" not in path)
    assert [tag.name for tag in curvature.tags] == ["first", "last"]
    assert "norm/scale: left out by where" in curvature.report()


def test_where_may_leave_out_a_tagged_layer_or_its_bias():
    curvature = estimate(Compact(), where=lambda path: "Dense_0" not in path)
    assert [tag.name for tag in curvature.tags] == ["Dense_1"]
    curvature = estimate(Compact(), where=lambda path: not path.endswith("bias"))
    assert [tag.bias for tag in curvature.tags] == [None, None]


def jitted_before():
    apply = jax.jit(lambda params, x: Compact().apply({"params": params}, x))
    for num_examples in (4, NUM_EXAMPLES):  # what init traces, and the whole batch
        apply(init(Compact(), X), X[:num_examples])
    return apply


def jitted_now():
    return jax.jit(lambda params, x: Compact().apply({"params": params}, x))


def under_cond():
    def model_fn(params, x):
        def branch():
            return Compact().apply({"params": params}, x)

        return jax.lax.cond(jnp.sum(x) > 0, branch, branch)

    return model_fn


def under_scan():
    def model_fn(params, x):
        def body(_, row):
            return None, Compact().apply({"params": params}, row[None])[0]

        return jax.lax.scan(body, None, x)[1]

    return model_fn


@pytest.mark.parametrize(
    "make",
    [jitted_before, jitted_now, under_cond, under_scan],
    ids=lambda f: f.__name__,
)
def test_an_apply_under_a_jax_transform_of_the_user_raises_a_clear_error(make):
    """Never a leaked tracer, and never a report that says all is covered."""
    estimator = optax_cgfac.fisher_estimator(make(), "squared_error", rows=4)
    with pytest.raises(ValueError, match=r"jax\.jit|jitted before|no curvature"):
        estimator.init(init(Compact(), X), X)


@pytest.mark.parametrize(
    "model",
    [nn.jit(Compact)(), nn.remat(Compact)(), JitMethod()],
    ids=["nn.jit", "nn.remat", "nn.jit of the method"],
)
def test_an_outermost_lifted_class_is_captured_or_refused_by_init(model):
    """What init accepts, update must be able to do."""
    estimator = estimator_of(model)
    params = init(model, X)
    try:
        curvature = estimator.init(params, X)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert re.search("no curvature|could not be captured", message)
        return
    curvature = jax.jit(estimator.update)(curvature, params, X, rng=jax.random.key(0))
    assert all(np.any(rows.g) for rows in curvature.layers.values())


def test_the_fallback_trains_the_rest_exactly_as_it_would_alone():
    model = WithScale()
    params, target = init(model, X), normal(1, NUM_EXAMPLES, 2)
    estimator = estimator_of(model, fallback=True)
    curvature = estimator.init(params, X)
    adam = optax.adam(1e-2)
    tx = optax_cgfac.cgfac(fallback=adam, where=curvature.covers)

    def loss_fn(params):
        return jnp.mean(jnp.sum((model.apply({"params": params}, X) - target) ** 2, -1))

    @jax.jit
    def step(params, state, adam_state, curvature, rng):
        value, grads = jax.value_and_grad(loss_fn)(params)
        curvature = estimator.update(curvature, params, X, rng=rng)
        updates, state = tx.update(
            grads, state, params, curvature=curvature, value=value, value_fn=loss_fn
        )
        expected, adam_state = adam.update(grads["norm"], adam_state)
        params = optax.apply_updates(params, updates)
        return params, state, adam_state, curvature, updates["norm"], expected

    carry = params, tx.init(params), adam.init(params["norm"]), curvature
    start = loss_fn(params)
    for i in range(3):
        *carry, updates, expected = step(*carry, jax.random.key(i))
        for name, leaf in expected.items():
            np.testing.assert_allclose(updates[name], leaf, rtol=1e-5)
    assert loss_fn(carry[0]) < start
    assert np.any(carry[0]["last"]["kernel"] != params["last"]["kernel"])


def test_an_uncovered_parameter_without_a_fallback_stops_the_update():
    model = WithScale()
    params = init(model, X)
    curvature = estimate(model, fallback=True)
    tx = optax_cgfac.cgfac(0.1)
    with pytest.raises(ValueError, match=r"norm/bias, norm/scale.*fallback=optax.adam"):
        tx.update(params, tx.init(params), params, curvature=curvature)


def test_left_out_parameters_get_their_plain_gradient():
    model = WithScale()
    params = init(model, X)
    curvature = estimate(model, where=lambda path: "norm" not in path)
    tx = optax_cgfac.scale_by_cgfac(0.1)
    updates, _ = tx.update(params, tx.init(params), params, curvature=curvature)
    np.testing.assert_array_equal(updates["norm"]["scale"], params["norm"]["scale"])
