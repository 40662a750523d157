"""Linen models of more than one layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import optax_cgfac


class Function(nn.Module):
    """A compact module that calls a function, which makes the layers."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def last(x):
    return nn.Dense(2, name="last")(x)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))  # Dense_0
        return nn.Dense(3)(x)


class RematMethod(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


class Setup(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(4)
        self.decoders = [nn.Dense(3), nn.Dense(3, use_bias=False)]

    def __call__(self, x):
        code = nn.tanh(self.encoder(x))
        return self.decoders[0](code) + self.decoders[1](nn.tanh(code))


class Heads(nn.Module):
    """A kernel for each head: ``batch_dims`` must lead, the batch comes second."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        layer = nn.DenseGeneral(
            (2, 3), axis=-1, batch_dims=0, use_bias=self.use_bias, name="heads"
        )
        return layer(x.swapaxes(0, 1)).swapaxes(0, 1)


class Outer(nn.Module):
    """Puts a lifted class between two plain layers."""

    inner: Any

    @nn.compact
    def __call__(self, x):
        x = self.inner(name="inner")(nn.tanh(nn.Dense(4, name="first")(x)))
        return last(nn.tanh(x))


mlp = Function(
    lambda x: nn.Dense(3, name="last")(nn.tanh(nn.Dense(4, name="first")(x)))
)


# ---------------------------------------------------------------- scan and vmap


def scanned(block, length, axes=True, **kwargs):
    return nn.scan(
        block,
        variable_axes={"params": 0} | (optax_cgfac.capture_axes() if axes else {}),
        split_rngs={"params": True},
        length=length,
        **kwargs,
    )


def mapped(block, axis=0, **kwargs):
    """Members with parameters of their own, or with shared ones at positions."""
    return nn.vmap(
        block,
        variable_axes={"params": axis} | optax_cgfac.capture_axes(),
        split_rngs={"params": axis is not None},
        in_axes=None if axis == 0 else 1,
        out_axes=1,
        **kwargs,
    )


class Block(nn.Module):
    """The body of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    """Stacked layers, with or without the capture's collections among the axes."""

    axes: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, _ = scanned(block, 3, self.axes)(name="blocks")(x, None)
        return last(x)


class OuterBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.tanh(nn.Dense(4, name="mix")(x))
        return scanned(Block, 2)(name="blocks")(x, None)


@Function
def nested_scan(x):
    x = nn.Dense(4, name="first")(x)
    return scanned(OuterBlock, 3)(name="outer")(x, None)[0]


class Cell(nn.Module):
    """A recurrent cell: the same parameters at each time."""

    @nn.compact
    def __call__(self, carry, x):
        carry = nn.tanh(nn.Dense(3, name="in")(x) + nn.Dense(3, name="rec")(carry))
        return carry, carry


@Function
def over_time(x):
    cell = nn.scan(
        Cell,
        variable_broadcast="params",
        variable_axes=optax_cgfac.capture_axes(),
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    _, y = cell(name="cell")(jnp.zeros((x.shape[0], 3)), x)
    return last(y)


ensemble = Function(lambda x: mapped(Compact, axis_size=3)(name="members")(x))


shared_vmap = Function(lambda x: mapped(Compact, axis=None)(name="mapped")(x))


class Looked(nn.Module):
    """A block that looks tokens up by itself."""

    @nn.compact
    def __call__(self, x, tokens):
        y = nn.Embed(7, 4, name="table")(tokens)
        y = nn.Conv(4, (3,), feature_group_count=2, name="conv")(x + y)
        y = nn.LayerNorm(name="norm")(y)
        return nn.tanh(x + jnp.sin(y + 0.3)), None


LIFTS = {
    "scan": lambda: scanned(Looked, 3, in_axes=nn.broadcast),
    "scan of remat": lambda: scanned(
        nn.remat(Looked, prevent_cse=False), 3, in_axes=nn.broadcast
    ),
    "vmap": lambda: mapped(Looked, axis_size=3),
    "remat": lambda: nn.remat(Looked),
    "jit": lambda: nn.jit(Looked),
}


class Stack(nn.Module):
    """Blocks under a lifted transform, on a sequence and its tokens."""

    transform: str

    @nn.compact
    def __call__(self, inputs):
        blocks = LIFTS[self.transform]()(name="blocks")
        return jnp.cumsum(blocks(inputs["x"], inputs["tokens"])[0], -1)


# ---------------------------------------------------------------- state and sharing


@Function
def shared_twice(x):
    shared = nn.Dense(5, name="shared")
    return last(shared(nn.tanh(shared(x))))


@Function
def shared_conv(x):
    """One kernel on images of two sizes."""
    layer = nn.Conv(2, (3, 3), strides=2, name="shared")
    return layer(nn.tanh(layer(x)))


@Function
def normalized(x, train):
    """Running statistics in a mutable collection."""
    # No bias: batch statistics remove it, so that its gradient is zero.
    x = nn.Dense(4, use_bias=False, name="first")(x)
    x = nn.BatchNorm(use_running_average=not train, use_bias=False, use_scale=False)(x)
    return last(x)


@Function
def batch_normed(x, train):
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    return jnp.cumsum(jnp.sin(x + 0.3), -1) ** 2


@Function
def dropped(x):
    x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, name="first")(x))
    return last(x)


class Doubled(nn.Dense):
    """A subclass that calls its parent."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


subclassed = Function(
    lambda x: Doubled(2, name="last")(nn.tanh(Doubled(4, name="first")(x)))
)


class Normed(nn.Module):
    """A norm with something before and after it, so that its gradient is not zero."""

    norm: Any
    calls: int = 1

    @nn.compact
    def __call__(self, x):
        layer = self.norm(name="norm")
        for _ in range(self.calls):
            x = jnp.sin(layer(x) + 0.3)
        return jnp.cumsum(x, -1) ** 2


# ---------------------------------------------------------------- tokens, attention


class Tokens(nn.Module):
    """Looks tokens up, once or twice, and may predict them with the same table."""

    calls: int = 1
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(7, 3, name="table")
        x = sum(jnp.sin(table((tokens + i) % 7)) for i in range(self.calls))
        return table.attend(nn.tanh(x)) if self.tied else nn.tanh(x)


class AttendAlone(nn.Module):
    def setup(self):
        self.table = nn.Embed(7, 4)

    def __call__(self, x):
        return self.table.attend(x)


@Function
def tied(tokens):
    """An embedding that is used transposed, too."""
    embed = nn.Embed(7, 5, name="embed")
    return embed.attend(nn.tanh(nn.Dense(5, name="mix")(embed(tokens))))


@Function
def self_attention(x):
    # Softmax ignores a bias of the keys, whose gradient would be zero.
    return nn.MultiHeadDotProductAttention(
        2, qkv_features=6, use_bias=False, name="mha"
    )(x)


def linear_attention(query, key, value, **kwargs):
    del kwargs
    return jnp.einsum("nqhd,nkhd,nkhe->nqhe", query, key, value)


@Function
def cross_attention(inputs):
    layer = nn.MultiHeadAttention(
        2, qkv_features=6, out_features=3, attention_fn=linear_attention, name="mha"
    )
    return layer(inputs["q"], inputs["k"], inputs["v"])


@Function
def transformer_block(tokens):
    table = nn.Embed(7, 4, name="table")
    x = table(tokens)
    positions = nn.Dense(4, use_bias=False, name="mix")(x)
    y = nn.LayerNorm(name="before")(x + positions)
    x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="mha")(y)
    y = nn.RMSNorm(name="after")(x)
    y = nn.Dense(4, name="down")(nn.gelu(nn.Dense(6, name="up")(y)))
    return table.attend(x + y)


@Function
def half_precision(tokens):
    """Everything computed in bfloat16, parameters in float32."""
    half = jnp.bfloat16
    x = nn.Embed(7, 4, dtype=half, name="table")(tokens)
    x = nn.Conv(4, (3,), dtype=half, name="conv")(x)
    x = jnp.sin(nn.LayerNorm(dtype=half, name="norm")(x) + 0.3)
    return nn.Dense(3, dtype=half, name="last")(x)


# ---------------------------------------------------------------- recurrent cells


class Recurrence(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(name="cell"), name="rnn")(x)


@Function
def both_ways(x):
    forward = nn.RNN(nn.LSTMCell(3, name="forward"))
    return nn.Bidirectional(forward, nn.RNN(nn.GRUCell(2, name="backward")))(x)


over_images = Function(lambda x: nn.RNN(nn.ConvLSTMCell(2, (3, 2), name="cell"))(x))


# ---------------------------------------------------------------- reported


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
        return last(nn.tanh(x))


@Function
def with_conv_local(x):
    x = nn.tanh(nn.ConvLocal(3, (3, 3), name="conv")(x))
    return last(x.reshape(len(x), -1))


class OwnKernel(nn.Dense):
    """Overrides the call without its parent's: a layer of its own."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.normal(), (5, self.features))
        return jnp.sin(inputs @ kernel)


with_own = Function(lambda x: last(OwnKernel(3, name="own")(x)))


class MappedParameters(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.map_variables(
            nn.Dense,
            "params",
            lambda variables: jax.tree.map(jnp.tanh, variables),
            init=self.is_initializing(),
        )
        return last(layer(3, name="inner")(x))


@Function
def weight_norm(x):
    x = nn.WeightNorm(nn.Dense(3, name="inner"), name="wrapper")(x)
    return last(x)


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(5, name="inner")
        if self.is_initializing():
            return last(inner(x))
        _, x = nn.while_loop(
            lambda module, carry: carry[0] < 2,
            lambda module, carry: (carry[0] + 1, module(carry[1])),
            inner,
            (0, x),
        )
        return last(x)
