"""Linen models with one kind of layer each, for the capture tests."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import optax_cgfac
from models import NUM_EXAMPLES, Case, init, normal, plain

N = NUM_EXAMPLES
SEQUENCE = normal(0, N, 5, 4)
IMAGE = normal(0, N, 5, 4, 2)
TOKENS = jnp.asarray(
    [[0, 3, 1], [2, 2, 5], [6, 0, 4], [1, 1, 1], [5, 6, -1], [3, 2, 0]]
)


# ---------------------------------------------------------------- convolutions


def conv(kernel_size, shape, positions, features=3, **kwargs):
    model = nn.Conv(features, kernel_size, **kwargs)
    return plain(model, normal(0, N, *shape), {".": ("conv", positions)})


def conv_transpose(kernel_size, shape, positions, features=3, **kwargs):
    model = nn.ConvTranspose(features, kernel_size, **kwargs)
    return plain(model, normal(0, N, *shape), {".": ("conv_transpose", positions)})


class SharedConv(nn.Module):
    """One kernel on images of two sizes."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(2, (3, 3), strides=2, name="shared")
        x = nn.tanh(layer(x))
        return layer(x)


CONVOLUTIONS = {
    "conv 1-D": lambda: conv((3,), (5, 2), 5),
    "conv 1-D integer kernel size": lambda: conv(3, (5, 2), 5),
    "conv 2-D": lambda: conv((3, 2), (5, 4, 2), 20),
    "conv 3-D": lambda: conv((2, 3, 2), (3, 4, 2, 2), 24),
    "conv without bias": lambda: conv((3, 2), (5, 4, 2), 20, use_bias=False),
    "conv 1x1": lambda: conv((1, 1), (5, 4, 2), 20),
    "conv strides": lambda: conv((3, 2), (5, 4, 2), 6, strides=(2, 2)),
    "conv strides in one axis": lambda: conv((3, 3), (6, 5, 2), 10, strides=(3, 1)),
    "conv VALID": lambda: conv((3, 2), (5, 4, 2), 9, padding="VALID"),
    "conv VALID strides": lambda: conv(
        (3, 2), (6, 5, 2), 4, strides=2, padding="VALID"
    ),
    "conv explicit padding": lambda: conv(
        (3, 2), (5, 4, 2), 30, padding=((2, 1), (0, 2))
    ),
    "conv integer padding": lambda: conv((3, 3), (5, 4, 2), 42, padding=2),
    "conv negative padding": lambda: conv(
        (2, 2), (5, 4, 2), 6, padding=((-1, 0), (0, 0)), strides=(1, 2)
    ),
    "conv CIRCULAR": lambda: conv((3, 2), (5, 4, 2), 20, padding="CIRCULAR"),
    "conv CIRCULAR strides": lambda: conv(
        (4, 3), (5, 4, 2), 6, padding="CIRCULAR", strides=2, kernel_dilation=(1, 1)
    ),
    "conv REFLECT": lambda: conv((3, 4), (5, 4, 2), 20, padding="REFLECT"),
    "conv CAUSAL": lambda: conv((3,), (5, 2), 5, padding="CAUSAL", kernel_dilation=2),
    "conv kernel dilation": lambda: conv((2, 3), (5, 5, 2), 25, kernel_dilation=(2, 2)),
    "conv input dilation": lambda: conv(
        (3, 2), (3, 4, 2), 18, input_dilation=(2, 2), padding=0
    ),
    "conv everything at once": lambda: conv(
        (3, 2),
        (4, 5, 4),
        35,
        features=6,
        feature_group_count=2,
        strides=(2, 2),
        padding=((2, 3), (1, 2)),
        input_dilation=(2, 3),
        kernel_dilation=(1, 2),
    ),
    "conv grouped": lambda: conv(
        (3, 2), (5, 4, 4), 20, features=6, feature_group_count=2
    ),
    "conv grouped without bias": lambda: conv(
        (3,), (5, 4), 5, features=2, feature_group_count=2, use_bias=False
    ),
    "conv depthwise": lambda: conv(
        (3, 3), (5, 4, 3), 20, features=3, feature_group_count=3
    ),
    "conv depthwise multiplier": lambda: conv(
        (3,), (5, 3), 5, features=6, feature_group_count=3
    ),
    "conv extra leading axes": lambda: conv((3, 2), (2, 3, 5, 4, 2), 120),
    "conv grouped extra leading axis": lambda: conv(
        (3,), (2, 5, 4), 10, features=6, feature_group_count=2
    ),
    "conv shared on two sizes": lambda: plain(
        SharedConv(), IMAGE, {"shared": ("conv", 6 + 2)}
    ),
    "conv_transpose 1-D": lambda: conv_transpose((3,), (5, 2), 5),
    "conv_transpose 1-D strides 2": lambda: conv_transpose(
        (3,), (5, 2), 10, strides=(2,)
    ),
    "conv_transpose 1-D strides 3": lambda: conv_transpose(
        (2,), (4, 2), 12, strides=(3,)
    ),
    "conv_transpose 1-D strides 3 VALID": lambda: conv_transpose(
        (2,), (4, 2), 12, strides=(3,), padding="VALID"
    ),
    "conv_transpose VALID": lambda: conv_transpose(
        (3, 2), (3, 2, 2), 15, padding="VALID"
    ),
    "conv_transpose strides VALID": lambda: conv_transpose(
        (3, 2), (3, 2, 2), 42, strides=(2, 3), padding="VALID"
    ),
    "conv_transpose strides SAME": lambda: conv_transpose(
        (4, 3), (3, 2, 2), 24, strides=(2, 2)
    ),
    "conv_transpose explicit padding": lambda: conv_transpose(
        (3, 2), (3, 2, 2), 28, strides=(2, 2), padding=((2, 2), (2, 0))
    ),
    "conv_transpose dilation": lambda: conv_transpose(
        (3, 2), (3, 2, 2), 24, strides=(2, 2), kernel_dilation=(2, 2)
    ),
    "conv_transpose transpose_kernel": lambda: conv_transpose(
        (3, 2), (3, 2, 2), 6, transpose_kernel=True
    ),
    "conv_transpose transpose_kernel strides": lambda: conv_transpose(
        (3, 4), (3, 2, 2), 24, strides=(2, 2), transpose_kernel=True, use_bias=False
    ),
    "conv_transpose transpose_kernel strides VALID": lambda: conv_transpose(
        (3,), (3, 2), 7, strides=(2,), transpose_kernel=True, padding="VALID"
    ),
}


# ---------------------------------------------------------------- embeddings


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


def embed(tokens, positions):
    return plain(nn.Embed(7, 3), tokens, {".": ("embed", positions)})


def attend(x, positions):
    model = AttendAlone()
    layers = {"table": ("attend", positions)}
    return Case(lambda p, x: model.apply({"params": p}, x), init(model, x), x, layers)


EMBEDDINGS = {
    "embed (N,)": lambda: embed(TOKENS[:, 0], 1),
    "embed (N, T)": lambda: embed(TOKENS, 3),
    "embed twice": lambda: plain(Tokens(calls=2), TOKENS, {"table": ("embed", 6)}),
    "attend": lambda: attend(normal(0, N, 4), 1),
    "attend (N, T)": lambda: attend(SEQUENCE, 5),
    "attend tied": lambda: plain(
        Tokens(tied=True), TOKENS, {"table": ("embed+attend", 6)}
    ),
    "attend tied (N,)": lambda: plain(
        Tokens(tied=True), TOKENS[:, 0], {"table": ("embed+attend", 2)}
    ),
    "attend tied, embed twice": lambda: plain(
        Tokens(calls=2, tied=True), TOKENS, {"table": ("embed+attend", 9)}
    ),
}


# ---------------------------------------------------------------- einsum, attention


def einsum(shape, equation, x, positions, layout=None, use_bias=True):
    """``layout`` maps the matrix (inputs, outputs) to the kernel, where it is not
    a plain reshape."""
    model = nn.Einsum(shape, equation, use_bias=use_bias)
    layouts = {"kernel": layout} if layout else {}
    case = plain(model, x, {".": ("einsum", positions)})
    return dataclasses.replace(case, layouts=layouts)


HEADS = normal(0, N, 3, 2, 4)  # (N, T, heads, depth)

EINSUMS = {
    "einsum": lambda: einsum((4, 3), "btc,cd->btd", SEQUENCE, 5),
    "einsum without bias": lambda: einsum(
        (4, 3), "btc,cd->btd", SEQUENCE, 5, use_bias=False
    ),
    "einsum ellipsis": lambda: einsum((4, 3), "...c,cd->...d", SEQUENCE, 5),
    "einsum ellipsis two axes": lambda: einsum((4, 3), "...c,cd->...d", HEADS, 6),
    "einsum kernel transposed": lambda: einsum(
        (3, 4), "btc,dc->btd", SEQUENCE, 5, lambda m: m.T
    ),
    "einsum two features": lambda: einsum((4, 2, 3), "btc,chd->bthd", SEQUENCE, 5),
    "einsum features apart": lambda: einsum(
        (2, 4, 3),
        "btc,hcd->bthd",
        SEQUENCE,
        5,
        lambda m: m.reshape(4, 2, 3).transpose(1, 0, 2),
    ),
    "einsum two contracted": lambda: einsum((2, 4, 3), "bthc,hcd->btd", HEADS, 3),
    "einsum contracted in another order": lambda: einsum(
        (4, 2, 3),
        "bthc,chd->btd",
        HEADS,
        3,
        lambda m: m.reshape(4, 2, 3),
    ),
    "einsum features before positions": lambda: einsum(
        (4, 3), "btc,cd->bdt", SEQUENCE, 5, use_bias=False
    ),
    "einsum per head": lambda: einsum((2, 4, 3), "bthc,hcd->bthd", HEADS, 3),
    "einsum per head without bias": lambda: einsum(
        (2, 4, 3), "bthc,hcd->bthd", HEADS, 3, use_bias=False
    ),
    "einsum per head, kernel in another order": lambda: einsum(
        (4, 2, 3),
        "bthc,chd->bthd",
        HEADS,
        3,
        lambda m: m.transpose(1, 0, 2),
    ),
}


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Softmax takes a bias of the keys off again: its gradient would be zero.
        return nn.MultiHeadDotProductAttention(
            2, qkv_features=6, use_bias=False, name="mha"
        )(x)


def linear_attention(query, key, value, **kwargs):
    del kwargs
    return jnp.einsum("nqhd,nkhd,nkhe->nqhe", query, key, value)


class CrossAttention(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        layer = nn.MultiHeadAttention(
            2,
            qkv_features=6,
            out_features=3,
            attention_fn=linear_attention,
            name="mha",
        )
        return layer(inputs["q"], inputs["k"], inputs["v"])


def projections(q, kv):
    names = {"query": q, "key": kv, "value": kv, "out": q}
    return {f"mha/{name}": ("dense_general", n) for name, n in names.items()}


def cross_attention():
    inputs = {
        "q": normal(0, N, 3, 4),
        "k": normal(1, N, 5, 2),
        "v": normal(2, N, 5, 3),
    }
    return plain(CrossAttention(), inputs, projections(3, 5))


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(7, 4, name="table")
        x = table(tokens)
        positions = nn.Dense(4, use_bias=False, name="mix")(x)
        y = nn.LayerNorm(name="before")(x + positions)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="mha")(y)
        y = nn.RMSNorm(name="after")(x)
        y = nn.Dense(4, name="down")(nn.gelu(nn.Dense(6, name="up")(y)))
        return table.attend(x + y)


def transformer():
    layers = projections(3, 3) | {
        "mix": ("dense", 3),
        "up": ("dense", 3),
        "down": ("dense", 3),
        "before": ("norm", 1),
        "after": ("norm", 1),
        "table": ("embed+attend", 6),
    }
    return plain(TransformerBlock(), TOKENS, layers)


ATTENTION = EINSUMS | {
    "self-attention": lambda: plain(SelfAttention(), SEQUENCE, projections(5, 5)),
    "cross-attention": cross_attention,
    "transformer block": transformer,
}


# ---------------------------------------------------------------- norms


class Normed(nn.Module):
    """A norm with something before and after it: its own gradient is not zero."""

    norm: Any
    calls: int = 1

    @nn.compact
    def __call__(self, x):
        layer = self.norm(name="norm")
        for _ in range(self.calls):
            x = jnp.sin(layer(x) + 0.3)
        return jnp.cumsum(x, -1) ** 2


def norm(make, x=SEQUENCE, calls=1, kind="norm"):
    return plain(Normed(make, calls), x, {"norm": (kind, 1)})


def _partial(cls, **kwargs):
    return lambda name: cls(name=name, **kwargs)


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return jnp.cumsum(jnp.sin(x + 0.3), -1) ** 2


def batch_norm(x, train):
    model = BatchNormed()
    variables = model.init(jax.random.key(1), x, train=True)
    stats = jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])

    def model_fn(params, inputs):
        variables = {"params": params, "batch_stats": inputs["batch_stats"]}
        outputs, updated = model.apply(
            variables, inputs["x"], train=train, mutable=["batch_stats"]
        )
        # The user's own state must come back as without capture.
        assert set(updated) == {"batch_stats"}, set(updated)
        return outputs

    inputs = {"x": x, "batch_stats": stats}
    return Case(model_fn, init(model, x, train=True), inputs, {"norm": ("norm", 1)})


NORMS = {
    "LayerNorm": lambda: norm(_partial(nn.LayerNorm), normal(0, N, 4)),
    "LayerNorm (N, T, C)": lambda: norm(_partial(nn.LayerNorm)),
    "LayerNorm without scale": lambda: norm(_partial(nn.LayerNorm, use_scale=False)),
    "LayerNorm without bias": lambda: norm(_partial(nn.LayerNorm, use_bias=False)),
    "LayerNorm over two axes": lambda: norm(
        _partial(nn.LayerNorm, reduction_axes=(-2, -1))
    ),
    "RMSNorm": lambda: norm(_partial(nn.RMSNorm)),
    "GroupNorm": lambda: norm(_partial(nn.GroupNorm, num_groups=2)),
    "GroupNorm image": lambda: norm(
        _partial(nn.GroupNorm, num_groups=None, group_size=1), IMAGE
    ),
    "InstanceNorm": lambda: norm(_partial(nn.InstanceNorm), IMAGE),
    "norm shared": lambda: norm(_partial(nn.LayerNorm), calls=2),
    "BatchNorm inference": lambda: batch_norm(SEQUENCE, False),
    "BatchNorm training": lambda: batch_norm(SEQUENCE, True),
    "BatchNorm training image": lambda: batch_norm(IMAGE, True),
    "PReLU": lambda: norm(_partial(nn.PReLU), SEQUENCE, kind="prelu"),
    "PReLU shared": lambda: norm(_partial(nn.PReLU), normal(0, N, 4), 2, "prelu"),
}


# ---------------------------------------------------------------- recurrent cells


class Recurrence(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(name="cell"), name="rnn")(x)


class BothWays(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward = nn.RNN(nn.LSTMCell(3, name="forward"))
        backward = nn.RNN(nn.GRUCell(2, name="backward"))
        return nn.Bidirectional(forward, backward)(x)


class OverImages(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.ConvLSTMCell(2, (3, 2), name="cell"))(x)


def gates(prefix, names, kind="dense", positions=5):
    return {f"{prefix}/{name}": (kind, positions) for name in names}


LSTM = [a + b for a in "ih" for b in "ifgo"]
GRU = ["ir", "iz", "in", "hr", "hz", "hn"]


def rnn(cell, names):
    return plain(Recurrence(_partial(cell, features=3)), SEQUENCE, gates("cell", names))


RECURRENT = {
    "LSTMCell": lambda: rnn(nn.LSTMCell, LSTM),
    "OptimizedLSTMCell": lambda: rnn(nn.OptimizedLSTMCell, LSTM),
    "GRUCell": lambda: rnn(nn.GRUCell, GRU),
    "MGUCell": lambda: rnn(nn.MGUCell, ["if", "in", "hf", "hn"]),
    "SimpleCell": lambda: rnn(nn.SimpleCell, ["i", "h"]),
    "Bidirectional": lambda: plain(
        BothWays(), SEQUENCE, gates("forward", LSTM) | gates("backward", GRU)
    ),
    "ConvLSTMCell": lambda: plain(
        OverImages(),
        normal(0, N, 3, 4, 3, 2),
        gates("cell", ["ih", "hh"], "conv", 3 * 12),
    ),
}


# ---------------------------------------------------------------- lifted transforms


class Looked(nn.Module):
    """A block that looks tokens up by itself."""

    @nn.compact
    def __call__(self, x, tokens):
        y = nn.Embed(7, 4, name="table")(tokens)
        y = nn.Conv(4, (3,), feature_group_count=2, name="conv")(x + y)
        y = nn.LayerNorm(name="norm")(y)
        return nn.tanh(x + jnp.sin(y + 0.3)), None


class Stack(nn.Module):
    """Blocks under a lifted transform, on a sequence and its tokens."""

    transform: str

    @nn.compact
    def __call__(self, inputs):
        x, tokens = inputs["x"], inputs["tokens"]
        if self.transform in {"scan", "scan of remat"}:
            body = (
                nn.remat(Looked, prevent_cse=False)
                if "of" in self.transform
                else (Looked)
            )
            blocks = nn.scan(
                body,
                variable_axes={"params": 0} | optax_cgfac.capture_axes(),
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=3,
            )
            x, _ = blocks(name="blocks")(x, tokens)
        elif self.transform == "vmap":
            members = nn.vmap(
                Looked,
                variable_axes={"params": 0} | optax_cgfac.capture_axes(),
                split_rngs={"params": True},
                in_axes=None,
                out_axes=1,
                axis_size=3,
            )
            x, _ = members(name="blocks")(x, tokens)
        else:
            lift = {"jit": nn.jit, "remat": nn.remat}[self.transform]
            x, _ = lift(Looked)(name="blocks")(x, tokens)
        return jnp.cumsum(x, -1)


def stack(transform):
    inputs = {"x": normal(0, N, 3, 4), "tokens": TOKENS}
    layers = {
        "blocks/table": ("embed", 3),
        "blocks/conv": ("conv", 3),
        "blocks/norm": ("norm", 1),
    }
    return plain(Stack(transform), inputs, layers)


LIFTED = {
    f"layers below {name}": lambda name=name: stack(name)
    for name in ("scan", "scan of remat", "vmap", "remat", "jit")
}


# ---------------------------------------------------------------- half precision


class Half(nn.Module):
    """Everything computed in bfloat16, parameters in float32."""

    @nn.compact
    def __call__(self, tokens):
        half = jnp.bfloat16
        x = nn.Embed(7, 4, dtype=half, name="table")(tokens)
        x = nn.Conv(4, (3,), dtype=half, name="conv")(x)
        x = nn.LayerNorm(dtype=half, name="norm")(x)
        x = jnp.sin(x + 0.3)
        return nn.Dense(3, dtype=half, name="dense")(x)


HALF = {
    "half precision": lambda: plain(
        Half(),
        TOKENS,
        {
            "table": ("embed", 3),
            "conv": ("conv", 3),
            "norm": ("norm", 1),
            "dense": ("dense", 3),
        },
    )
}

LAYER_CASES = CONVOLUTIONS | EMBEDDINGS | ATTENTION | NORMS | RECURRENT | LIFTED | HALF
