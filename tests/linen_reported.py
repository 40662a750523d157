"""Linen models with parameters that no rows can be taken for, and the reason."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from models import NUM_EXAMPLES, Compact, Scanned, init, normal

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


# name -> (module, inputs, uncovered parameters, part of the reason)
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


# Functions of the user's that hide the whole model below a transform of JAX's own.
HIDDEN = {
    function.__name__: function
    for function in (jitted_before, jitted_now, under_cond, under_scan)
}
