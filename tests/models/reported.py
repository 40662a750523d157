"""Models with parameters that no rows can be taken for, and a part of the reason."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from models import linen_modules as linen_models
from models import nnx_modules as nnx_models
from models.common import BATCH, SEQUENCE, N, init, normal
from models.linen_modules import Compact, WithScale
from models.nnx_modules import Half, Mlp, rngs

__all__ = ["HIDDEN", "REPORTED", "UNCOVERED", "WithScale", "X"]

X = BATCH
MAPPED = r"computes with a function of it \(nn.map_variables, nn.WeightNorm"


def between(make, *leaves, reason):
    """One layer before a dense one."""
    model = linen_models.Function(lambda x: nn.Dense(2, name="last")(make(x)))
    return model, SEQUENCE, [f"inner/{leaf}" for leaf in leaves], reason


# name -> (Linen model, inputs, uncovered parameters, part of the reason)
UNCOVERED = {
    "norm": (WithScale(), X, ["norm/bias", "norm/scale"], "a parameter of Scale"),
    "conv": (
        linen_models.with_conv_local,
        normal(0, N, 4, 4, 2),
        ["conv/bias", "conv/kernel"],
        "a kernel for every position",
    ),
    "own": (
        linen_models.Function(
            lambda x: nn.Dense(2, name="last")(linen_models.OwnKernel(3, name="own")(x))
        ),
        X,
        ["own/kernel"],
        "a parameter of OwnKernel",
    ),
    "scan": (
        linen_models.Scanned(axes=False),
        X,
        ["blocks/Dense_0/bias", "blocks/Dense_0/kernel"],
        r"add optax_cgfac.capture_axes\(\) to the variable_axes of nn.scan",
    ),
    "map_variables": (
        linen_models.MappedParameters(),
        X,
        ["inner/bias", "inner/kernel"],
        MAPPED,
    ),
    "WeightNorm": (
        linen_models.weight_norm,
        X,
        ["inner/bias", "inner/kernel", "wrapper/inner/kernel/scale"],
        MAPPED,
    ),
    "while_loop": (
        linen_models.Repeated(),
        X,
        ["inner/bias", "inner/kernel"],
        r"no other \(nn.while_loop, say\) can carry them",
    ),
    "masked conv": between(
        lambda x: nn.Conv(2, (3,), mask=jnp.ones((3, 4, 2)), name="inner")(x),
        "bias",
        "kernel",
        reason="its kernel is masked",
    ),
    "circular conv_transpose": between(
        lambda x: nn.ConvTranspose(2, (3,), padding="CIRCULAR", name="inner")(x),
        "bias",
        "kernel",
        reason="adds up periods of its output",
    ),
    "norm of other axes": between(
        lambda x: nn.LayerNorm(feature_axes=(-2,), name="inner")(x),
        "bias",
        "scale",
        reason="its features are not on the last axis",
    ),
    "einsum that sums the input": between(
        lambda x: nn.Einsum((4, 3), "btc,cd->bd", use_bias=False, name="inner")(x),
        "kernel",
        reason="sums over an axis of one operand alone",
    ),
    "einsum of a diagonal": between(
        lambda x: nn.Einsum((4, 4, 3), "btc,ccd->btd", use_bias=False, name="inner")(x),
        "kernel",
        reason="repeats a letter",
    ),
}


def compact_fn(params, x):
    return Compact().apply({"params": params}, x)


def jitted_before():
    apply = jax.jit(compact_fn)
    for num_examples in (4, N):  # what init traces, and the whole batch
        apply(init(Compact(), X), X[:num_examples])
    return apply


def jitted_now():
    return jax.jit(lambda params, x: compact_fn(params, x))


def under_cond():
    def model_fn(params, x):
        def branch():
            return compact_fn(params, x)

        return jax.lax.cond(jnp.sum(x) > 0, branch, branch)

    return model_fn


def under_scan():
    def model_fn(params, x):
        return jax.lax.map(lambda row: compact_fn(params, row[None])[0], x)

    return model_fn


# Functions of the user's that hide the whole model below a transform of JAX's own.
HIDDEN = {
    function.__name__: function
    for function in (jitted_before, jitted_now, under_cond, under_scan)
}


def half(through, reason):
    def make():
        covered, uncovered = ("first",), ("inner/first", "inner/last")
        return Half(Mlp(rngs()), through), X, covered, uncovered, reason

    return make


def around(make, *uncovered, covered=("first",), reason="LoRA"):
    return lambda: (Half(make()), X, covered, uncovered, reason)


COPIED, OUTSIDE = "on a copy of the module", "a module from outside"
LOST = "does not carry the capture"

# name -> (NNX module, inputs, covered layers, uncovered layers, part of the reason)
REPORTED = {
    "custom": lambda: (
        nnx_models.Custom(),
        X,
        ("last",),
        (".",),
        "a parameter of Custom",
    ),
    "cond": half(nnx_models.through_cond, LOST),
    "lax.cond": half(nnx_models.through_lax_cond, OUTSIDE),
    "jax.checkpoint": half(lambda m, x: jax.checkpoint(lambda x: m(x))(x), OUTSIDE),
    "jax.vmap": half(lambda m, x: jax.vmap(lambda x: m(x))(x), OUTSIDE),
    "jax.jit": half(nnx_models.through_jit, COPIED),
    "once lost": half(lambda m, x: m(x) + nnx_models.through_jit(m, x), COPIED),
    "lost once": half(lambda m, x: nnx_models.through_jit(m, x) + m(x), COPIED),
    "split": half(nnx_models.through_split, LOST),
    "shared vmap without axes": lambda: (
        nnx_models.SharedVmap(False),
        normal(0, N, 3, 5),
        ("first",),
        ("inner/first", "inner/last"),
        "CaptureVariable",
    ),
    "lora": around(lambda: nnx.LoRA(5, 2, 3, rngs=rngs()), "inner"),
    "lora around a layer": around(
        lambda: nnx.LoRA(
            5, 2, 3, base_module=nnx.Linear(5, 3, rngs=rngs()), rngs=rngs()
        ),
        "inner",
        covered=("first", "inner/base_module"),
    ),
    "lora linear": around(
        lambda: nnx.LoRALinear(5, 3, lora_rank=2, rngs=rngs()),
        "inner/lora",
        covered=("first", "inner"),
    ),
    "weight_norm": around(
        lambda: nnx.WeightNorm(
            nnx.Linear(5, 3, rngs=rngs()), use_scale=False, rngs=rngs()
        ),
        "inner/layer_instance",
        reason="another module computes",
    ),
    "one kernel, two biases": lambda: (
        nnx_models.OneParam(use_bias=True),
        X,
        (),
        ("a", "b"),
        "has another bias",
    ),
    "unused": lambda: (
        nnx_models.Unused(rngs()),
        X,
        ("first",),
        ("last",),
        "was not called",
    ),
}
