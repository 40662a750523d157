"""Small NNX models for the capture tests, each with what must be found in it.

`CASES` holds models that are covered whole; `REPORTED` holds models of which some
parameters cannot be, with a part of the reason.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import optax_cgfac
from models import BATCH, NUM_EXAMPLES, normal

IMAGES = normal(0, NUM_EXAMPLES, 6, 6, 2)
SEQUENCES = normal(0, NUM_EXAMPLES, 3, 5)
TOKENS = jax.random.randint(jax.random.key(3), (NUM_EXAMPLES, 4), 0, 7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A module and a batch.

    Attributes:
      model: The module.
      inputs: The batch.
      layers: The layers that must be covered: kind and positions by name.
      model_fn: ``(model, inputs) -> outputs``.
    """

    model: nnx.Module
    inputs: Any
    layers: dict[str, tuple[str, int]]
    model_fn: Callable[[Any, Any], jax.Array] = lambda model, x: model(x)

    def loss(self, model, inputs):
        outputs = self.model_fn(model, inputs).astype(jnp.float32)
        # Another weight for every number: a norm's squares would add up to a constant.
        outputs = outputs.reshape(NUM_EXAMPLES, -1)
        weights = jnp.linspace(0.5, 1.5, outputs.shape[-1])
        return jnp.mean(jnp.sum(weights * (outputs - 0.3) ** 2, -1))


def rngs(seed=1):
    return nnx.Rngs(seed)


def shifted(model):
    """The module with biases and scales that are not what they start with."""
    state = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(structure, leaves))
    return model


def case(model, inputs, layers, **kwargs):
    return Case(shifted(model), inputs, layers, **kwargs)


def single(layer, inputs, kind, positions, **kwargs):
    return case(layer, inputs, {".": (kind, positions)}, **kwargs)


class Mlp(nnx.Module):
    def __init__(self, rngs, n_in=5, n_hidden=4, n_out=3):
        self.first = nnx.Linear(n_in, n_hidden, rngs=rngs)
        self.last = nnx.Linear(n_hidden, n_out, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


MLP = {"first": ("dense", 1), "last": ("dense", 1)}


class Wrapped(nnx.Module):
    """A linear layer, then another module of four features."""

    def __init__(self, inner, n_in=5):
        self.first = nnx.Linear(n_in, 4, rngs=rngs())
        self.inner = inner

    def __call__(self, x):
        return self.inner(nnx.tanh(self.first(x)))


def norm(layer, inputs=BATCH, positions=1):
    layers = {"first": ("dense", positions), "inner": ("norm", 1)}
    return case(Wrapped(layer, inputs.shape[-1]), inputs, layers)


class Tied(nnx.Module):
    """An embedding that is used transposed, too."""

    def __init__(self):
        self.embed = nnx.Embed(7, 5, rngs=rngs())
        self.mix = nnx.Linear(5, 5, rngs=rngs())

    def __call__(self, tokens):
        return self.embed.attend(nnx.tanh(self.mix(self.embed(tokens))))


class Attention(nnx.Module):
    def __init__(self):
        self.attend = nnx.MultiHeadAttention(
            num_heads=2, in_features=5, qkv_features=6, decode=False, rngs=rngs()
        )

    def __call__(self, x):
        return self.attend(x)


class Twice(nnx.Module):
    """One module called twice."""

    def __init__(self):
        self.shared = nnx.Linear(5, 5, rngs=rngs())
        self.last = nnx.Linear(5, 2, rngs=rngs())

    def __call__(self, x):
        return self.last(self.shared(nnx.tanh(self.shared(x))))


class OneParam(nnx.Module):
    """Two modules with one kernel."""

    def __init__(self, use_bias=False):
        self.a = nnx.Linear(5, 5, use_bias=use_bias, rngs=rngs())
        self.b = nnx.Linear(5, 5, use_bias=use_bias, rngs=rngs())
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class Doubled(nnx.Linear):
    """A subclass that calls its parent."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class ByJit(nnx.Module):
    def __init__(self):
        self.inner = Mlp(rngs())

    def __call__(self, x):
        return nnx.jit(lambda model, x: model(x))(self.inner, x)


class ByRemat(ByJit):
    def __call__(self, x):
        return nnx.remat(lambda model, x: model(x))(self.inner, x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.linear(x))


def stack(build, count):
    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return build(rngs)

    return create(rngs())


class Scanned(nnx.Module):
    """Stacked layers, one after the other."""

    def __init__(self, remat=False):
        self.first = nnx.Linear(5, 4, rngs=rngs())
        self.blocks = stack(Block, 3)
        self.remat = remat

    def __call__(self, x):
        def body(block, x):
            return block(x)

        body = nnx.remat(body) if self.remat else body
        scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(self.blocks, self.first(x))


class Ensemble(nnx.Module):
    """Stacked layers side by side."""

    def __init__(self):
        self.members = stack(Mlp, 3)

    def __call__(self, x):
        run = nnx.vmap(lambda m, x: m(x), in_axes=(0, None), out_axes=1)
        return run(self.members, x)


class SharedVmap(nnx.Module):
    """One set of parameters, mapped over positions."""

    def __init__(self, axes=True):
        self.first = nnx.Linear(5, 5, rngs=rngs())
        self.inner = Mlp(rngs())
        self.axes = axes

    def __call__(self, x):
        axes = None
        if self.axes:
            axes = nnx.StateAxes({optax_cgfac.CaptureVariable: 0, ...: None})
        run = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 1), out_axes=1)
        return run(self.inner, self.first(x))


class Recurrent(nnx.Module):
    def __init__(self, cell):
        self.rnn = nnx.RNN(cell(5, 4, rngs=rngs()), rngs=rngs())
        self.last = nnx.Linear(4, 2, rngs=rngs())

    def __call__(self, x):
        return self.last(self.rnn(x))


def recurrent(cell, names):
    layers = {f"rnn/cell/{name}": ("dense", 3) for name in names}
    return case(Recurrent(cell), SEQUENCES, layers | {"last": ("dense", 3)})


class Stateful(nnx.Module):
    """Running statistics and dropout."""

    def __init__(self):
        self.first = nnx.Linear(5, 4, use_bias=False, rngs=rngs())
        self.norm = nnx.BatchNorm(4, rngs=rngs())
        self.dropout = nnx.Dropout(0.3, rngs=rngs())
        self.last = nnx.Linear(4, 2, rngs=rngs())

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


STATEFUL = {"first": ("dense", 1), "norm": ("norm", 1), "last": ("dense", 1)}
GATES = ["ii", "if_", "ig", "io", "hi", "hf", "hg", "ho"]


class Tagged(nnx.Module):
    """A matrix and a scale that no layer of Flax's holds."""

    def __init__(self):
        self.w = nnx.Param(normal(1, 5, 4))
        self.gain = nnx.Param(normal(2, 4))
        self.last = nnx.Linear(4, 3, rngs=rngs())

    def __call__(self, x):
        y = optax_cgfac.tag_layer(self, x, x @ self.w, kernel="w")
        return self.last(optax_cgfac.tag_layer(self, y, y * self.gain, scale="gain"))


class HalfPrecision(nnx.Module):
    """Everything computed in bfloat16, parameters in float32."""

    def __init__(self):
        options = {"dtype": jnp.bfloat16, "rngs": rngs()}
        self.table = nnx.Embed(7, 4, **options)
        self.conv = nnx.Conv(4, 4, (3,), **options)
        self.norm = nnx.LayerNorm(4, **options)
        self.last = nnx.Linear(4, 3, **options)

    def __call__(self, tokens):
        x = self.norm(self.conv(self.table(tokens)))
        return self.last(jnp.sin(x + 0.3))


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: single(nnx.Linear(5, 4, rngs=rngs()), BATCH, "dense", 1),
    "linear without bias": lambda: single(
        nnx.Linear(5, 4, use_bias=False, rngs=rngs()), BATCH, "dense", 1
    ),
    "linear rank 3": lambda: single(
        nnx.Linear(5, 4, rngs=rngs()), SEQUENCES, "dense", 3
    ),
    "linear_general": lambda: single(
        nnx.LinearGeneral((3, 5), (2, 3), axis=(-2, -1), rngs=rngs()),
        SEQUENCES,
        "dense_general",
        1,
    ),
    "linear_general batch_axis": lambda: single(
        nnx.LinearGeneral(5, 4, batch_axis={0: 3}, rngs=rngs()),
        SEQUENCES,
        "dense_general",
        1,
        model_fn=lambda model, x: model(x.swapaxes(0, 1)).swapaxes(0, 1),
    ),
    "einsum": lambda: single(
        nnx.Einsum("ntd,dhk->nthk", (5, 2, 3), (2, 3), rngs=rngs()),
        SEQUENCES,
        "einsum",
        3,
    ),
    "conv": lambda: single(
        nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs()), IMAGES, "conv", 9
    ),
    "conv circular": lambda: single(
        nnx.Conv(2, 3, (3, 3), padding="CIRCULAR", rngs=rngs()), IMAGES, "conv", 36
    ),
    "conv groups": lambda: single(
        nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs()), IMAGES, "conv", 36
    ),
    "conv causal": lambda: single(
        nnx.Conv(5, 3, (2,), padding="CAUSAL", rngs=rngs()), SEQUENCES, "conv", 3
    ),
    "conv_transpose": lambda: single(
        nnx.ConvTranspose(2, 3, (3, 3), strides=2, rngs=rngs()),
        IMAGES,
        "conv_transpose",
        144,
    ),
    "linear_general without bias": lambda: single(
        nnx.LinearGeneral(5, (2, 3), use_bias=False, rngs=rngs()),
        SEQUENCES,
        "dense_general",
        3,
    ),
    "einsum ellipsis": lambda: single(
        nnx.Einsum("...d,dk->...k", (5, 4), (4,), rngs=rngs()), SEQUENCES, "einsum", 3
    ),
    "einsum per head": lambda: single(
        nnx.Einsum("nhd,hdk->nhk", (3, 5, 2), (3, 2), rngs=rngs()),
        SEQUENCES,
        "einsum",
        1,
    ),
    "conv 1-D": lambda: single(nnx.Conv(5, 3, (3,), rngs=rngs()), SEQUENCES, "conv", 3),
    "conv 3-D": lambda: single(
        nnx.Conv(2, 3, (2, 2, 3), rngs=rngs()),
        normal(0, NUM_EXAMPLES, 2, 3, 4, 2),
        "conv",
        24,
    ),
    "conv 1x1": lambda: single(nnx.Conv(2, 3, (1, 1), rngs=rngs()), IMAGES, "conv", 36),
    "conv VALID": lambda: single(
        nnx.Conv(2, 3, (3, 2), padding="VALID", use_bias=False, rngs=rngs()),
        IMAGES,
        "conv",
        20,
    ),
    "conv explicit padding": lambda: single(
        nnx.Conv(2, 3, (3, 2), padding=((2, 1), (0, 2)), rngs=rngs()),
        IMAGES,
        "conv",
        49,
    ),
    "conv kernel dilation": lambda: single(
        nnx.Conv(2, 3, (2, 3), kernel_dilation=(2, 1), rngs=rngs()), IMAGES, "conv", 36
    ),
    "conv depthwise": lambda: single(
        nnx.Conv(2, 2, (3, 3), feature_group_count=2, rngs=rngs()), IMAGES, "conv", 36
    ),
    "conv_transpose VALID": lambda: single(
        nnx.ConvTranspose(2, 3, (3, 2), padding="VALID", rngs=rngs()),
        IMAGES,
        "conv_transpose",
        56,
    ),
    "conv_transpose transpose_kernel": lambda: single(
        nnx.ConvTranspose(2, 3, (3, 3), transpose_kernel=True, rngs=rngs()),
        IMAGES,
        "conv_transpose",
        36,
    ),
    "embed": lambda: single(nnx.Embed(7, 5, rngs=rngs()), TOKENS, "embed", 4),
    "embed and attend": lambda: case(
        Tied(), TOKENS, {"embed": ("embed+attend", 8), "mix": ("dense", 4)}
    ),
    "layer_norm": lambda: norm(nnx.LayerNorm(4, rngs=rngs())),
    "layer_norm without bias": lambda: norm(
        nnx.LayerNorm(4, use_bias=False, rngs=rngs())
    ),
    "rms_norm": lambda: norm(nnx.RMSNorm(4, rngs=rngs())),
    "group_norm": lambda: norm(nnx.GroupNorm(4, num_groups=2, rngs=rngs())),
    "instance_norm": lambda: norm(nnx.InstanceNorm(4, rngs=rngs()), SEQUENCES, 3),
    "batch_norm": lambda: norm(
        nnx.BatchNorm(4, use_running_average=True, rngs=rngs()), SEQUENCES, 3
    ),
    "batch_norm training": lambda: norm(
        nnx.BatchNorm(4, use_running_average=False, rngs=rngs()), SEQUENCES, 3
    ),
    "norm without parameters": lambda: case(
        Wrapped(nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=rngs())),
        BATCH,
        {"first": ("dense", 1)},
    ),
    "prelu": lambda: case(
        Wrapped(nnx.PReLU()), BATCH, {"first": ("dense", 1), "inner": ("prelu", 1)}
    ),
    "attention": lambda: case(
        Attention(),
        SEQUENCES,
        {f"attend/{n}": ("dense_general", 3) for n in ("query", "key", "value", "out")},
    ),
    "cross-attention": lambda: case(
        Attention(),
        SEQUENCES,
        {f"attend/{n}": ("dense_general", 3) for n in ("query", "key", "value", "out")},
        model_fn=lambda model, x: model.attend(x, 0.5 * x[:, ::-1]),
    ),
    "custom layers": lambda: case(
        Tagged(),
        SEQUENCES,
        {"w": ("custom", 3), "gain": ("custom", 1), "last": ("dense", 3)},
    ),
    "half precision": lambda: case(
        HalfPrecision(),
        TOKENS,
        {
            "table": ("embed", 4),
            "conv": ("conv", 4),
            "norm": ("norm", 1),
            "last": ("dense", 4),
        },
    ),
    "mlp": lambda: case(Mlp(rngs()), BATCH, MLP),
    "sequential": lambda: case(
        nnx.Sequential(
            nnx.Linear(5, 4, rngs=rngs()), nnx.tanh, nnx.Linear(4, 3, rngs=rngs())
        ),
        BATCH,
        {"layers/0": ("dense", 1), "layers/2": ("dense", 1)},
    ),
    "subclass": lambda: single(Doubled(5, 4, rngs=rngs()), BATCH, "dense", 1),
    "called twice": lambda: case(
        Twice(), BATCH, {"shared": ("dense", 2), "last": ("dense", 1)}
    ),
    "one Param in two modules": lambda: case(OneParam(), BATCH, {"a": ("dense", 2)}),
    "stateful": lambda: case(Stateful(), BATCH, STATEFUL),
    "jit": lambda: case(ByJit(), BATCH, {f"inner/{k}": v for k, v in MLP.items()}),
    "remat": lambda: case(ByRemat(), BATCH, {f"inner/{k}": v for k, v in MLP.items()}),
    "scan": lambda: case(
        Scanned(), BATCH, {"first": ("dense", 1), "blocks/linear": ("dense", 1)}
    ),
    "scan of remat": lambda: case(
        Scanned(True), BATCH, {"first": ("dense", 1), "blocks/linear": ("dense", 1)}
    ),
    "vmap": lambda: case(
        Ensemble(), BATCH, {f"members/{k}": v for k, v in MLP.items()}
    ),
    "vmap with shared parameters": lambda: case(
        SharedVmap(),
        SEQUENCES,
        {
            "first": ("dense", 3),
            "inner/first": ("dense", 3),
            "inner/last": ("dense", 3),
        },
    ),
    "rnn lstm": lambda: recurrent(nnx.LSTMCell, GATES),
    "rnn optimized lstm": lambda: recurrent(
        nnx.OptimizedLSTMCell, ("dense_i", "dense_h")
    ),
    "rnn gru": lambda: recurrent(nnx.GRUCell, ("dense_i", "dense_h")),
    "rnn simple": lambda: recurrent(nnx.SimpleCell, ("dense_i", "dense_h")),
}


class Custom(nnx.Module):
    """A parameter that no layer of Flax's holds."""

    def __init__(self):
        self.weights = nnx.Param(normal(1, 5, 5))
        self.last = nnx.Linear(5, 3, rngs=rngs())

    def __call__(self, x):
        return self.last(x @ self.weights[...])


class Half(nnx.Module):
    """A first layer that is covered and a second part that may not be."""

    def __init__(self, inner):
        self.first = nnx.Linear(5, 5, rngs=rngs())
        self.inner = inner

    def __call__(self, x):
        return self.through(self.inner, self.first(x))

    def through(self, inner, x):
        return inner(x)


class Cond(Half):
    def through(self, inner, x):
        return nnx.cond(
            x.sum() < 1e9, lambda m, x: m(x), lambda m, x: x[:, :3], inner, x
        )


class LaxCond(Half):
    def through(self, inner, x):
        return jax.lax.cond(x.sum() < 1e9, lambda: inner(x), lambda: x[:, :3])


class Checkpoint(Half):
    def through(self, inner, x):
        return jax.checkpoint(lambda x: inner(x))(x)


class JaxJit(Half):
    def through(self, inner, x):
        return jax.jit(lambda m, x: m(x))(inner, x)


class JaxVmap(Half):
    def through(self, inner, x):
        return jax.vmap(lambda x: inner(x))(x)


class Split(Half):
    """Takes a part of itself apart, and refuses to find more than it knows."""

    def through(self, inner, x):
        graphdef, params = nnx.split(inner, nnx.Param)
        return nnx.merge(graphdef, params)(x)


class OnceLost(Half):
    """A layer whose first call cannot be captured and whose second can."""

    def through(self, inner, x):
        return inner(x) + jax.jit(lambda m, x: m(x))(inner, x)


class LostOnce(Half):
    def through(self, inner, x):
        return jax.jit(lambda m, x: m(x))(inner, x) + inner(x)


INNER = ("inner/first", "inner/last")

# name -> (module, inputs, covered layers, uncovered layers, part of the reason)
REPORTED: dict[str, Callable[[], tuple[nnx.Module, Any, tuple, tuple, str]]] = {
    "custom": lambda: (Custom(), BATCH, ("last",), (".",), "a parameter of Custom"),
    "cond": lambda: (
        Cond(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "does not carry the capture",
    ),
    "lax.cond": lambda: (
        LaxCond(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "a module from outside",
    ),
    "jax.checkpoint": lambda: (
        Checkpoint(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "a module from outside",
    ),
    "jax.vmap": lambda: (
        JaxVmap(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "a module from outside",
    ),
    "jax.jit": lambda: (
        JaxJit(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "on a copy of the module",
    ),
    "once lost": lambda: (
        OnceLost(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "on a copy of the module",
    ),
    "lost once": lambda: (
        LostOnce(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "on a copy of the module",
    ),
    "split": lambda: (
        Split(Mlp(rngs())),
        BATCH,
        ("first",),
        INNER,
        "does not carry the capture",
    ),
    "shared vmap without axes": lambda: (
        SharedVmap(False),
        SEQUENCES,
        ("first",),
        INNER,
        "CaptureVariable",
    ),
    "lora": lambda: (
        Half(nnx.LoRA(5, 2, 3, rngs=rngs())),
        BATCH,
        ("first",),
        ("inner",),
        "LoRA",
    ),
    "lora around a layer": lambda: (
        Half(nnx.LoRA(5, 2, 3, base_module=nnx.Linear(5, 3, rngs=rngs()), rngs=rngs())),
        BATCH,
        ("first", "inner/base_module"),
        ("inner",),
        "LoRA",
    ),
    "lora linear": lambda: (
        Half(nnx.LoRALinear(5, 3, lora_rank=2, rngs=rngs())),
        BATCH,
        ("first", "inner"),
        ("inner/lora",),
        "LoRA",
    ),
    "weight_norm": lambda: (
        Half(
            nnx.WeightNorm(nnx.Linear(5, 3, rngs=rngs()), use_scale=False, rngs=rngs())
        ),
        BATCH,
        ("first",),
        ("inner/layer_instance",),
        "another module computes",
    ),
    "one kernel, two biases": lambda: (
        OneParam(use_bias=True),
        BATCH,
        (),
        ("a", "b"),
        "has another bias",
    ),
    "unused": lambda: (Unused(rngs()), BATCH, ("first",), ("last",), "was not called"),
}


class Unused(Mlp):
    def __call__(self, x):
        return self.first(x)
