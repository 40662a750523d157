"""Models with parameters that no rows can be taken for, and a part of the reason."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from models import linen_modules as lm
from models import nnx_modules as nm
from models.common import BATCH, SEQUENCE, N, init, normal
from models.linen_modules import Compact, WithScale
from models.nnx_modules import Mlp, half, rngs

__all__ = ["HIDDEN", "REPORTED", "UNCOVERED", "WithScale", "X"]

X = BATCH
MAPPED = r"computes with a function of it \(nn.map_variables, nn.WeightNorm"


def uncovered(model, leaves, reason, x=X):
    return model, x, leaves.split(), reason


def between(leaves, reason, make):
    """One layer before a dense one."""
    model = lm.Function(lambda x: lm.last(make()(x)))
    return uncovered(model, leaves, reason, SEQUENCE)


# name -> (Linen model, inputs, uncovered parameters, part of the reason)
UNCOVERED = {
    "norm": uncovered(WithScale(), "norm/bias norm/scale", "a parameter of Scale"),
    "conv": uncovered(
        lm.with_conv_local,
        "conv/bias conv/kernel",
        "a kernel for every position",
        normal(0, N, 4, 4, 2),
    ),
    "own": uncovered(lm.with_own, "own/kernel", "a parameter of OwnKernel"),
    "scan": uncovered(
        lm.Scanned(axes=False),
        "blocks/Dense_0/bias blocks/Dense_0/kernel",
        r"add optax_cgfac.capture_axes\(\) to the variable_axes of nn.scan",
    ),
    "map_variables": uncovered(
        lm.MappedParameters(), "inner/bias inner/kernel", MAPPED
    ),
    "WeightNorm": uncovered(
        lm.weight_norm, "inner/bias inner/kernel wrapper/inner/kernel/scale", MAPPED
    ),
    "while_loop": uncovered(
        lm.Repeated(),
        "inner/bias inner/kernel",
        r"no other \(nn.while_loop, say\) can carry them",
    ),
    "masked conv": between(
        "inner/bias inner/kernel",
        "its kernel is masked",
        lambda: nn.Conv(2, (3,), mask=jnp.ones((3, 4, 2)), name="inner"),
    ),
    "circular conv_transpose": between(
        "inner/bias inner/kernel",
        "adds up periods of its output",
        lambda: nn.ConvTranspose(2, (3,), padding="CIRCULAR", name="inner"),
    ),
    "norm of other axes": between(
        "inner/bias inner/scale",
        "its features are not on the last axis",
        lambda: nn.LayerNorm(feature_axes=(-2,), name="inner"),
    ),
    "einsum that sums the input": between(
        "inner/kernel",
        "sums over an axis of one operand alone",
        lambda: nn.Einsum((4, 3), "btc,cd->bd", use_bias=False, name="inner"),
    ),
    "einsum of a diagonal": between(
        "inner/kernel",
        "repeats a letter",
        lambda: nn.Einsum((4, 4, 3), "btc,ccd->btd", use_bias=False, name="inner"),
    ),
    "einsum with features first": between(
        "inner/bias inner/kernel",
        "puts features before the kernel's batch axes",
        lambda: nn.Einsum((5, 4, 2), "btc,tcd->bdt", name="inner"),
    ),
}


def compact(params, x):
    return Compact().apply({"params": params}, x)


def jitted_before():
    apply = jax.jit(compact)
    for num_examples in (4, N):  # what init traces, and the whole batch
        apply(init(Compact(), X), X[:num_examples])
    return apply


def jitted_now():
    return jax.jit(lambda params, x: compact(params, x))


def under_cond():
    def model_fn(params, x):
        def branch():
            return compact(params, x)

        return jax.lax.cond(jnp.sum(x) > 0, branch, branch)

    return model_fn


def under_scan():
    return lambda params, x: jax.lax.map(lambda row: compact(params, row[None])[0], x)


# Functions of the user's that hide the whole model below a transform of JAX's own.
HIDDEN = {
    function.__name__: function
    for function in (jitted_before, jitted_now, under_cond, under_scan)
}


def reported(make, covered, uncovered, reason="LoRA", x=X):
    return lambda: (make(), x, tuple(covered.split()), tuple(uncovered.split()), reason)


def through(reason, function):
    return reported(
        lambda: half(Mlp(rngs()), function), "first", "inner/first inner/last", reason
    )


COPIED, OUTSIDE = "on a copy of the module", "a module from outside"
LOST = "does not carry the capture"

# name -> (NNX module, inputs, covered layers, uncovered layers, part of the reason)
REPORTED = {
    "custom": reported(nm.Custom, "last", ".", "a parameter of Custom"),
    "cond": through(LOST, nm.through_cond),
    "lax.cond": through(OUTSIDE, nm.through_lax_cond),
    "jax.checkpoint": through(OUTSIDE, lambda m, x: jax.checkpoint(lambda x: m(x))(x)),
    "jax.vmap": through(OUTSIDE, lambda m, x: jax.vmap(lambda x: m(x))(x)),
    "jax.jit": through(COPIED, nm.through_jit),
    "once lost": through(COPIED, lambda m, x: m(x) + nm.through_jit(m, x)),
    "lost once": through(COPIED, lambda m, x: nm.through_jit(m, x) + m(x)),
    "split": through(LOST, nm.through_split),
    "shared vmap without axes": reported(
        lambda: nm.shared_vmap(has_axes=False),
        "first",
        "inner/first inner/last",
        "CaptureVariable",
        normal(0, N, 3, 5),
    ),
    "lora": reported(lambda: half(nnx.LoRA(5, 2, 3, rngs=rngs())), "first", "inner"),
    "lora around a layer": reported(
        lambda: half(nnx.LoRA(5, 2, 3, base_module=nm.linear(5, 3), rngs=rngs())),
        "first inner/base_module",
        "inner",
    ),
    "lora linear": reported(
        lambda: half(nnx.LoRALinear(5, 3, lora_rank=2, rngs=rngs())),
        "first inner",
        "inner/lora",
    ),
    "weight_norm": reported(
        lambda: half(nnx.WeightNorm(nm.linear(5, 3), use_scale=False, rngs=rngs())),
        "first",
        "inner/layer_instance",
        "another module computes",
    ),
    "masked conv_transpose": reported(
        lambda: half(
            nnx.ConvTranspose(5, 3, (3,), mask=jnp.ones((3, 5, 3)), rngs=rngs())
        ),
        "first",
        "inner",
        "its kernel is masked",
        normal(0, N, 3, 5),
    ),
    "one kernel, two biases": reported(
        lambda: nm.one_param(use_bias=True), "", "a b", "has another bias"
    ),
    "unused": reported(lambda: nm.Unused(rngs()), "first", "last", "was not called"),
}
