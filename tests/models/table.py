"""Every way of writing a layer that is covered, as a Linen and as an NNX model."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import core, nnx
from flax import linen as nn

from models import linen_modules as lm
from models import nnx_modules as nm
from models.common import BATCH, IMAGE, SEQUENCE, TOKENS, Case, N, init, normal, of
from models.linen_modules import Compact
from models.nnx_modules import rngs, shifted


class Row(NamedTuple):
    """What makes the case of either library, None where there is none."""

    linen: Callable[[], Case] | None = None
    nnx: Callable[[], Case] | None = None


FEATURES = normal(0, N, 3, 5)
CODES = jax.random.randint(jax.random.key(3), (N, 4), 0, 7)


# ---------------------------------------------------------------- what rows are made of


def plain(model, inputs, layers):
    """The usual way: params from ``init``, ``model.apply`` inside ``model_fn``."""
    inputs = inputs() if callable(inputs) else inputs
    return Case(
        lambda params, x: model.apply({"params": params}, x),
        init(model, inputs),
        inputs,
        of(layers),
    )


def of_module(make, inputs, layers, model_fn=lambda model, x: model(x)):
    inputs = inputs() if callable(inputs) else inputs
    return Case(model_fn, shifted(make()), inputs, of(layers))


def linen(model, inputs, layers, make_nnx=None, nnx_layers=None):
    """A Linen model and, where ``make_nnx`` makes one, its twin."""
    nnx_layers = layers if nnx_layers is None else nnx_layers
    twin = make_nnx and partial(of_module, make_nnx, inputs, nnx_layers)
    return Row(partial(plain, model, inputs, layers), twin)


def in_nnx(make, inputs, layers, *model_fn):
    return Row(None, partial(of_module, make, inputs, layers, *model_fn))


def drawn(*shape):
    """Draws a batch when the case is made."""
    return partial(normal, 0, N, *shape)


def layer(cls, *args, **kwargs):
    """Makes a layer of NNX."""
    return lambda: cls(*args, **kwargs, rngs=rngs())


def dense(rank, twin=False, **kwargs):
    inputs = drawn(*(N, 3, 2)[1 : rank - 1], 5)
    twin = layer(nnx.Linear, 5, 4, **kwargs) if twin else None
    positions = {2: 1, 3: 3, 4: 6}[rank]
    return linen(nn.Dense(4, **kwargs), inputs, f"dense {positions} .", twin)


def dense_general(features, axis, shape, positions, twin=False, **kwargs):
    model = nn.DenseGeneral(features, axis=axis, **kwargs)
    if twin:
        n_in = tuple(shape[i] for i in axis)
        twin = layer(nnx.LinearGeneral, n_in, features, axis=axis, **kwargs)
    return linen(model, drawn(*shape), f"dense_general {positions} .", twin)


def conv(kernel, positions, shape=(5, 4, 2), n_out=3, cls="Conv", twin=False, **kwargs):
    kind = {"Conv": "conv", "ConvTranspose": "conv_transpose"}[cls]
    model = getattr(nn, cls)(n_out, kernel, **kwargs)
    if twin:
        twin = layer(getattr(nnx, cls), shape[-1], n_out, kernel, **kwargs)
    return linen(model, drawn(*shape), f"{kind} {positions} .", twin)


def deconv(kernel, positions, shape=(3, 2, 2), **kwargs):
    return conv(kernel, positions, shape, cls="ConvTranspose", **kwargs)


def einsum(shape, equation, x, positions, twin_bias=None, **kwargs):
    model = nn.Einsum(shape, equation, **kwargs)
    twin = twin_bias and layer(nnx.Einsum, equation, shape, twin_bias)
    return linen(model, x, f"einsum {positions} .", twin)


def norm(name, x=SEQUENCE, calls=1, kind="norm", twin=False, **kwargs):
    model = lm.Normed(partial(getattr(nn, name), **kwargs), calls)
    make = layer(getattr(nnx, name), x.shape[-1], **kwargs)
    make = nnx.PReLU if name == "PReLU" else make
    twin = (lambda: nm.normed(make())) if twin else None
    return linen(model, x, f"{kind} 1 norm", twin)


# With a twin in NNX.
convs, norms = partial(conv, twin=True), partial(norm, twin=True)
deconvs = partial(deconv, twin=True)


def with_statistics(model, x, train, layers):
    """A model whose statistics are inputs, and whose updates of them come back."""
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
    return Case(model_fn, init(model, x, train=True), inputs, of(layers))


def batch_norm(x, train):
    make = layer(nnx.BatchNorm, x.shape[-1], use_running_average=not train)
    return Row(
        partial(with_statistics, lm.batch_normed, x, train, "norm 1 norm"),
        partial(of_module, lambda: nm.normed(make()), x, "norm 1 norm"),
    )


def attend(x, positions):
    return linen(lm.AttendAlone(), x, f"attend {positions} table")


def tokens(kind, positions, x=TOKENS, **kwargs):
    return linen(lm.Tokens(**kwargs), x, f"{kind} {positions} table")


def below(prefix, names):
    return " ".join(prefix + name for name in names.split())


def rnn(cell, names):
    model = lm.Recurrence(partial(cell, features=3))
    return linen(model, SEQUENCE, "dense 5 " + below("cell/", names))


def nnx_rnn(cell, names):
    layers = f"dense 3 {below('rnn/cell/', names)} last"
    return in_nnx(lambda: nm.recurrent(cell), FEATURES, layers)


def outer(inner):
    """A lifted class between two plain layers."""
    layers = "dense 1 first last inner/Dense_0 inner/Dense_1"
    return linen(lm.Outer(inner), BATCH, layers)


def scan(remat):
    return linen(
        lm.Scanned(remat=remat),
        BATCH,
        "dense 1 first last blocks/Dense_0",
        lambda: nm.scanned(remat),
        "dense 1 first blocks/linear",
    )


# ---------------------------------------------------------------- cases that need code


def applied_twice():
    model = nn.Dense(5)

    def model_fn(params, x):
        x = nn.tanh(model.apply({"params": params}, x))
        return model.apply({"params": params}, x)

    return Case(model_fn, init(model, BATCH), BATCH, of("dense 2 ."))


def two_models():
    a, b = Compact(), nn.Dense(2)

    def model_fn(params, x):
        return b.apply({"params": params["b"]}, a.apply({"params": params["a"]}, x))

    params = {"a": init(a, BATCH), "b": init(b, normal(0, N, 3))}
    return Case(model_fn, params, BATCH, of("dense 1 a/Dense_0 a/Dense_1 b"))


def dropout():
    model, key = lm.dropped, jax.random.key(7)
    inputs = {"x": BATCH, "key": key}

    def model_fn(params, inputs):
        rngs = {"dropout": inputs["key"]}
        return model.apply({"params": params}, inputs["x"], rngs=rngs)

    variables = model.init({"params": jax.random.key(1), "dropout": key}, BATCH)
    return Case(model_fn, variables["params"], inputs, of(FIRST_LAST))


def frozen_dict():
    case = plain(Compact(), BATCH, TWO)
    return dataclasses.replace(case, params=core.freeze(case.params))


def partitioned():
    boxed = nn.with_partitioning
    model = nn.Dense(
        4,
        kernel_init=boxed(nn.initializers.lecun_normal(), (None, "model")),
        bias_init=boxed(nn.initializers.normal(), ("model",)),
    )
    return plain(nn.Sequential([model]), BATCH, "dense 1 layers_0")


def whole_variables():
    params = {"params": init(Compact(), BATCH)}
    layers = of("dense 1 params/Dense_0 params/Dense_1")
    return Case(Compact().apply, params, BATCH, layers)


def cast_on_the_way():
    def model_fn(params, x):
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return Compact().apply({"params": cast}, x.astype(jnp.bfloat16))

    return Case(model_fn, init(Compact(), BATCH), BATCH, COMPACT)


# ---------------------------------------------------------------- the table

TWO, FIRST_LAST = "dense 1 Dense_0 Dense_1", "dense 1 first last"
COMPACT = of(TWO)
IN_INNER, TWICE = "dense 1 inner/first inner/last", "dense 2 shared, dense 1 last"
HALF = "embed 3 table, conv 3 conv, norm 1 norm, dense 3 last"
LOOKED = "embed 3 blocks/table, conv 3 blocks/conv, norm 1 blocks/norm"
QKV = "mha/query mha/key mha/value mha/out"
NNX_QKV = "dense_general 3 attend/query attend/key attend/value attend/out"
LSTM = "ii if ig io hi hf hg ho"
GRU = "ir iz in hr hz hn"
HEADS = normal(0, N, 3, 2, 4)  # (N, T, heads, depth)
QUERIES = {"q": normal(0, N, 3, 4), "k": normal(1, N, 5, 2), "v": normal(2, N, 5, 3)}

MODELS = {
    "dense rank 2": dense(2, twin=True),
    "dense rank 3": dense(3, twin=True),
    "dense rank 4": dense(4),
    "dense rank 2 without bias": dense(2, twin=True, use_bias=False),
    "dense rank 3 without bias": dense(3, use_bias=False),
    "dense rank 4 without bias": dense(4, use_bias=False),
    "dense_general": dense_general(4, -1, (3, 5), 3),
    "dense_general two axes": dense_general(4, (-2, -1), (3, 5), 1),
    "dense_general inner axis": dense_general(4, 1, (3, 5), 5),
    "dense_general axes in another order": dense_general(4, (3, 1), (3, 2, 5), 2),
    "dense_general two features": dense_general((2, 3), -1, (3, 5), 3),
    "dense_general axes and features": dense_general(
        (2, 3), (-2, -1), (2, 3, 5), 2, twin=True
    ),
    "dense_general without bias": dense_general(
        (2, 3), (-2, -1), (3, 5), 1, twin=True, use_bias=False
    ),
    "dense_general batch_dims": linen(lm.Heads(), drawn(2, 5), "dense_general 1 heads"),
    "dense_general batch_dims without bias": linen(
        lm.Heads(use_bias=False), drawn(2, 5), "dense_general 1 heads"
    ),
    "linear_general batch_axis": in_nnx(
        layer(nnx.LinearGeneral, 5, 4, batch_axis={0: 3}),
        FEATURES,
        "dense_general 1 .",
        lambda model, x: model(x.swapaxes(0, 1)).swapaxes(0, 1),
    ),
    "compact": linen(Compact(), BATCH, TWO),
    "mlp": linen(lm.mlp, BATCH, FIRST_LAST, lambda: nm.Mlp(rngs())),
    "setup": linen(lm.Setup(), BATCH, "dense 1 encoder decoders_0 decoders_1"),
    "sequential": linen(
        nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]),
        BATCH,
        "dense 1 layers_0 layers_2",
        lambda: nnx.Sequential(nm.linear(5, 4), nnx.tanh, nm.linear(4, 3)),
        "dense 1 layers/0 layers/2",
    ),
    "jit class": outer(nn.jit(Compact)),
    "jit method": outer(lm.JitMethod),
    "jit": in_nnx(lambda: nm.lifted(nnx.jit), BATCH, IN_INNER),
    "remat class": outer(nn.remat(Compact)),
    "remat method": outer(lm.RematMethod),
    "remat": in_nnx(lambda: nm.lifted(nnx.remat), BATCH, IN_INNER),
    "scan": scan(remat=False),
    "scan of remat": scan(remat=True),
    "nested scan": linen(
        lm.nested_scan, BATCH, "dense 1 first outer/mix outer/blocks/Dense_0"
    ),
    "scan over time": linen(lm.over_time, FEATURES, "dense 3 cell/in cell/rec last"),
    "vmap": linen(
        lm.ensemble,
        BATCH,
        "dense 1 members/Dense_0 members/Dense_1",
        nm.ensemble,
        "dense 1 members/first members/last",
    ),
    "vmap with shared parameters": linen(
        lm.shared_vmap,
        FEATURES,
        "dense 3 mapped/Dense_0 mapped/Dense_1",
        nm.shared_vmap,
        "dense 3 first inner/first inner/last",
    ),
    "shared module": linen(lm.shared_twice, BATCH, TWICE),
    "called twice": in_nnx(nm.twice, BATCH, TWICE),
    "one Param in two modules": in_nnx(nm.one_param, BATCH, "dense 2 a"),
    "applied twice": Row(applied_twice),
    "two models": Row(two_models),
    "mutable collections": Row(
        partial(with_statistics, lm.normalized, BATCH, True, FIRST_LAST)
    ),
    "stateful": in_nnx(nm.Stateful, BATCH, FIRST_LAST + ", norm 1 norm"),
    "dropout": Row(dropout),
    "frozen dict": Row(frozen_dict),
    "partitioned": Row(partitioned),
    "whole variables": Row(whole_variables),
    "subclass": linen(
        lm.subclassed, BATCH, FIRST_LAST, layer(nm.Doubled, 5, 4), "dense 1 ."
    ),
    "cast on the way": Row(cast_on_the_way),
}

GROUPS = {"feature_group_count": 2}
CONVOLUTIONS = {
    "conv 1-D": convs((3,), 5, (5, 2)),
    "conv 1-D integer kernel size": conv(3, 5, (5, 2)),
    "conv 2-D": conv((3, 2), 20),
    "conv 3-D": convs((2, 3, 2), 24, (3, 4, 2, 2)),
    "conv without bias": convs((3, 2), 20, use_bias=False),
    "conv 1x1": convs((1, 1), 20),
    "conv strides": convs((3, 2), 6, strides=2),
    "conv strides in one axis": conv((3, 3), 10, (6, 5, 2), strides=(3, 1)),
    "conv VALID": convs((3, 2), 9, padding="VALID"),
    "conv VALID strides": conv((3, 2), 4, (6, 5, 2), strides=2, padding="VALID"),
    "conv explicit padding": convs((3, 2), 30, padding=((2, 1), (0, 2))),
    "conv integer padding": conv((3, 3), 42, padding=2),
    "conv negative padding": conv((2, 2), 6, padding=((-1, 0), (0, 0)), strides=(1, 2)),
    "conv CIRCULAR": convs((3, 2), 20, padding="CIRCULAR"),
    "conv CIRCULAR strides": conv((4, 3), 6, padding="CIRCULAR", strides=2),
    "conv REFLECT": conv((3, 4), 20, padding="REFLECT"),
    "conv CAUSAL": convs((3,), 5, (5, 2), padding="CAUSAL", kernel_dilation=2),
    "conv kernel dilation": convs((2, 3), 25, (5, 5, 2), kernel_dilation=2),
    "conv input dilation": conv((3, 2), 18, (3, 4, 2), input_dilation=2, padding=0),
    "conv everything at once": conv(
        (3, 2),
        35,
        (4, 5, 4),
        6,
        **GROUPS,
        strides=2,
        padding=((2, 3), (1, 2)),
        input_dilation=(2, 3),
        kernel_dilation=(1, 2),
    ),
    "conv grouped": convs((3, 2), 20, (5, 4, 4), 6, **GROUPS),
    "conv grouped without bias": conv((3,), 5, (5, 4), 2, **GROUPS, use_bias=False),
    "conv depthwise": convs((3, 3), 20, (5, 4, 3), feature_group_count=3),
    "conv depthwise multiplier": conv((3,), 5, (5, 3), 6, feature_group_count=3),
    "conv extra leading axes": conv((3, 2), 120, (2, 3, 5, 4, 2)),
    "conv grouped extra leading axis": conv((3,), 10, (2, 5, 4), 6, **GROUPS),
    "conv shared on two sizes": linen(lm.shared_conv, IMAGE, "conv 8 shared"),
    "conv_transpose 1-D": deconv((3,), 5, (5, 2)),
    "conv_transpose 1-D strides 2": deconv((3,), 10, (5, 2), strides=2),
    "conv_transpose 1-D strides 3": deconv((2,), 12, (4, 2), strides=3),
    "conv_transpose 1-D strides 3 VALID": deconv(
        (2,), 12, (4, 2), strides=3, padding="VALID"
    ),
    "conv_transpose VALID": deconvs((3, 2), 15, padding="VALID"),
    "conv_transpose strides VALID": deconv((3, 2), 42, strides=(2, 3), padding="VALID"),
    "conv_transpose strides SAME": deconvs((4, 3), 24, strides=2),
    "conv_transpose explicit padding": deconv(
        (3, 2), 28, strides=2, padding=((2, 2), (2, 0))
    ),
    "conv_transpose dilation": deconv((3, 2), 24, strides=2, kernel_dilation=2),
    "conv_transpose transpose_kernel": deconvs((3, 2), 6, transpose_kernel=True),
    "conv_transpose transpose_kernel strides": deconv(
        (3, 4), 24, strides=2, transpose_kernel=True, use_bias=False
    ),
    "conv_transpose transpose_kernel strides VALID": deconv(
        (3,), 7, (3, 2), strides=2, transpose_kernel=True, padding="VALID"
    ),
}

EMBEDDINGS = {
    "embed (N,)": linen(nn.Embed(7, 3), TOKENS[:, 0], "embed 1 ."),
    "embed (N, T)": linen(nn.Embed(7, 3), TOKENS, "embed 3 ."),
    "embed": in_nnx(layer(nnx.Embed, 7, 5), CODES, "embed 4 ."),
    "embed twice": tokens("embed", 6, calls=2),
    "attend": attend(normal(0, N, 4), 1),
    "attend (N, T)": attend(SEQUENCE, 5),
    "attend tied": tokens("embed+attend", 6, tied=True),
    "attend tied (N,)": tokens("embed+attend", 2, TOKENS[:, 0], tied=True),
    "attend tied, embed twice": tokens("embed+attend", 9, calls=2, tied=True),
    "embed and attend": linen(
        lm.tied, CODES, "embed+attend 8 embed, dense 4 mix", nm.tied
    ),
}

ATTENTION = {
    "einsum": einsum((4, 3), "btc,cd->btd", SEQUENCE, 5),
    "einsum without bias": einsum((4, 3), "btc,cd->btd", SEQUENCE, 5, use_bias=False),
    "einsum ellipsis": einsum((4, 3), "...c,cd->...d", SEQUENCE, 5, twin_bias=(3,)),
    "einsum ellipsis two axes": einsum((4, 3), "...c,cd->...d", HEADS, 6),
    "einsum kernel transposed": einsum((3, 4), "btc,dc->btd", SEQUENCE, 5),
    "einsum two features": einsum(
        (4, 2, 3), "btc,chd->bthd", SEQUENCE, 5, twin_bias=(2, 3)
    ),
    "einsum features apart": einsum((2, 4, 3), "btc,hcd->bthd", SEQUENCE, 5),
    "einsum two contracted": einsum((2, 4, 3), "bthc,hcd->btd", HEADS, 3),
    "einsum contracted in another order": einsum((4, 2, 3), "bthc,chd->btd", HEADS, 3),
    "einsum features before positions": einsum(
        (4, 3), "btc,cd->bdt", SEQUENCE, 5, use_bias=False
    ),
    "einsum per head": einsum((2, 4, 3), "bthc,hcd->bthd", HEADS, 3, twin_bias=(2, 3)),
    "einsum per head without bias": einsum(
        (2, 4, 3), "bthc,hcd->bthd", HEADS, 3, use_bias=False
    ),
    "einsum per head, kernel in another order": einsum(
        (4, 2, 3), "bthc,chd->bthd", HEADS, 3
    ),
    "attention": in_nnx(nm.attention, FEATURES, NNX_QKV),
    "self-attention": linen(
        lm.self_attention, SEQUENCE, f"dense_general 5 {QKV}", nm.self_attention
    ),
    "cross-attention": linen(
        lm.cross_attention,
        QUERIES,
        "dense_general 3 mha/query mha/out, dense_general 5 mha/key mha/value",
    )._replace(nnx=partial(of_module, nm.cross_attention, FEATURES, NNX_QKV)),
    "transformer block": linen(
        lm.transformer_block,
        TOKENS,
        f"dense_general 3 {QKV}, dense 3 mix up down, norm 1 before after, "
        "embed+attend 6 table",
    ),
}

NORMS = {
    "LayerNorm": norms("LayerNorm", normal(0, N, 4)),
    "LayerNorm (N, T, C)": norm("LayerNorm"),
    "LayerNorm without scale": norm("LayerNorm", use_scale=False),
    "LayerNorm without bias": norms("LayerNorm", use_bias=False),
    "LayerNorm over two axes": norm("LayerNorm", reduction_axes=(-2, -1)),
    "RMSNorm": norms("RMSNorm"),
    "GroupNorm": norms("GroupNorm", num_groups=2),
    "GroupNorm image": norm("GroupNorm", IMAGE, num_groups=None, group_size=1),
    "InstanceNorm": norms("InstanceNorm", IMAGE),
    "norm shared": norm("LayerNorm", calls=2),
    "norm without parameters": in_nnx(nm.plain_norm, BATCH, "dense 1 layers/0"),
    "BatchNorm inference": batch_norm(SEQUENCE, False),
    "BatchNorm training": batch_norm(SEQUENCE, True),
    "BatchNorm training image": batch_norm(IMAGE, True)._replace(nnx=None),
    "PReLU": norms("PReLU", kind="prelu"),
    "PReLU shared": norm("PReLU", normal(0, N, 4), 2, "prelu"),
}

RECURRENT = {
    "LSTMCell": rnn(nn.LSTMCell, LSTM),
    "OptimizedLSTMCell": rnn(nn.OptimizedLSTMCell, LSTM),
    "GRUCell": rnn(nn.GRUCell, GRU),
    "MGUCell": rnn(nn.MGUCell, "if in hf hn"),
    "SimpleCell": rnn(nn.SimpleCell, "i h"),
    "Bidirectional": linen(
        lm.both_ways,
        SEQUENCE,
        f"dense 5 {below('forward/', LSTM)} {below('backward/', GRU)}",
    ),
    "ConvLSTMCell": linen(lm.over_images, drawn(3, 4, 3, 2), "conv 36 cell/ih cell/hh"),
    "rnn lstm": nnx_rnn(nnx.LSTMCell, LSTM.replace("if", "if_")),
    "rnn optimized lstm": nnx_rnn(nnx.OptimizedLSTMCell, "dense_i dense_h"),
    "rnn gru": nnx_rnn(nnx.GRUCell, "dense_i dense_h"),
    "rnn simple": nnx_rnn(nnx.SimpleCell, "dense_i dense_h"),
}

OTHERS = {
    f"layers below {name}": linen(
        lm.Stack(name), {"x": normal(0, N, 3, 4), "tokens": TOKENS}, LOOKED
    )
    for name in lm.LIFTS
} | {
    "half precision": linen(lm.half_precision, TOKENS % 7, HALF, nm.half_precision),
    "custom layers": in_nnx(
        nm.tagged, FEATURES, "custom 3 w, custom 1 gain, dense 3 last"
    ),
}

LAYERS = CONVOLUTIONS | EMBEDDINGS | ATTENTION | NORMS | RECURRENT | OTHERS
TABLE = MODELS | LAYERS

# The Linen cases of models, those of layers, and all NNX cases.
CASES = {name: row.linen for name, row in MODELS.items() if row.linen}
LAYER_CASES = {name: row.linen for name, row in LAYERS.items() if row.linen}
NNX_CASES = {name: row.nnx for name, row in TABLE.items() if row.nnx}
COVERED = [
    (framework, name)
    for name, row in TABLE.items()
    for framework in row._fields
    if getattr(row, framework)
]
