"""NNX modules of more than one layer."""

import jax
import jax.numpy as jnp
from flax import nnx

import optax_cgfac
from models.common import moved, normal


def rngs(seed=1):
    return nnx.Rngs(seed)


def shifted(model):
    """The module with biases and scales other than those of initialization."""
    nnx.update(model, moved(nnx.state(model, nnx.Param)))
    return model


def linear(n_in, n_out, **kwargs):
    return nnx.Linear(n_in, n_out, rngs=rngs(), **kwargs)


class Mlp(nnx.Module):
    def __init__(self, rngs, n_in=5, n_hidden=4, n_out=3):
        self.first = nnx.Linear(n_in, n_hidden, rngs=rngs)
        self.last = nnx.Linear(n_hidden, n_out, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


class Parts(nnx.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, function, **parts):
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.function(self, x)


def normed(norm):
    """A norm with something before and after it, so that its gradient is not zero."""
    return Parts(lambda m, x: jnp.cumsum(jnp.sin(m.norm(x) + 0.3), -1) ** 2, norm=norm)


def tied():
    """An embedding that is used transposed, too."""

    def function(m, tokens):
        return m.embed.attend(nnx.tanh(m.mix(m.embed(tokens))))

    return Parts(function, embed=nnx.Embed(7, 5, rngs=rngs()), mix=linear(5, 5))


def heads(n_in, **kwargs):
    options = {"in_features": n_in, "qkv_features": 6, "decode": False} | kwargs
    return nnx.MultiHeadAttention(2, **options, rngs=rngs())


def attention():
    return Parts(lambda m, x: m.attend(x), attend=heads(5))


def self_attention():
    return Parts(lambda m, x: m.mha(x), mha=heads(4, use_bias=False))


def cross_attention():
    return Parts(lambda m, x: m.attend(x, 0.5 * x[:, ::-1]), attend=heads(5))


def plain_norm():
    norm = nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=rngs())
    return nnx.Sequential(linear(5, 4), norm)


def twice():
    """One module called twice."""

    def function(m, x):
        return m.last(m.shared(nnx.tanh(m.shared(x))))

    return Parts(function, shared=linear(5, 5), last=linear(5, 2))


def one_param(use_bias=False):
    """Two modules with one kernel."""
    a, b = (linear(5, 5, use_bias=use_bias) for _ in range(2))
    b.kernel = a.kernel
    return Parts(lambda m, x: m.b(nnx.tanh(m.a(x))), a=a, b=b)


class Doubled(nnx.Linear):
    """A subclass that calls its parent."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def lifted(lift):
    """A module below a transform of NNX's."""
    return Parts(
        lambda m, x: lift(lambda model, x: model(x))(m.inner, x), inner=Mlp(rngs())
    )


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


def scanned(remat=False):
    """Stacked layers, one after the other."""

    def function(m, x):
        def body(block, x):
            return block(x)

        body = nnx.remat(body) if remat else body
        scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(m.blocks, m.first(x))

    return Parts(function, first=linear(5, 4), blocks=stack(Block, 3))


def ensemble():
    """Stacked layers side by side."""
    run = nnx.vmap(lambda m, x: m(x), in_axes=(0, None), out_axes=1)
    return Parts(lambda m, x: run(m.members, x), members=stack(Mlp, 3))


def shared_vmap(has_axes=True):
    """One set of parameters, mapped over positions."""
    axes = nnx.StateAxes({optax_cgfac.CaptureVariable: 0, ...: None})
    axes = axes if has_axes else None
    run = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 1), out_axes=1)
    first = linear(5, 5)
    return Parts(lambda m, x: run(m.inner, m.first(x)), first=first, inner=Mlp(rngs()))


def recurrent(cell):
    rnn = nnx.RNN(cell(5, 4, rngs=rngs()), rngs=rngs())
    return Parts(lambda m, x: m.last(m.rnn(x)), rnn=rnn, last=linear(4, 2))


class Stateful(nnx.Module):
    """Running statistics and dropout."""

    def __init__(self):
        self.first = linear(5, 4, use_bias=False)
        self.norm = nnx.BatchNorm(4, rngs=rngs())
        self.dropout = nnx.Dropout(0.3, rngs=rngs())
        self.last = linear(4, 2)

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def tagged():
    """A matrix and a scale that no layer of Flax's holds."""

    def function(m, x):
        y = optax_cgfac.tag_layer(m, x, x @ m.w, kernel="w")
        return m.last(optax_cgfac.tag_layer(m, y, y * m.gain, scale="gain"))

    params = {"w": nnx.Param(normal(1, 5, 4)), "gain": nnx.Param(normal(2, 4))}
    return Parts(function, last=linear(4, 3), **params)


def half_precision():
    """Everything computed in bfloat16, parameters in float32."""

    def function(m, tokens):
        return m.last(jnp.sin(m.norm(m.conv(m.table(tokens))) + 0.3))

    options = {"dtype": jnp.bfloat16, "rngs": rngs()}
    return Parts(
        function,
        table=nnx.Embed(7, 4, **options),
        conv=nnx.Conv(4, 4, (3,), **options),
        norm=nnx.LayerNorm(4, **options),
        last=nnx.Linear(4, 3, **options),
    )


# ---------------------------------------------------------------- reported


class Custom(nnx.Module):
    """A parameter that no layer of Flax's holds."""

    def __init__(self):
        self.weights = nnx.Param(normal(1, 5, 5))
        self.last = linear(5, 3)

    def __call__(self, x):
        return self.last(x @ self.weights[...])


class Unused(Mlp):
    def __call__(self, x):
        return self.first(x)


def half(inner, through=lambda inner, x: inner(x)):
    """A first layer that is covered and a second part that may not be."""
    return Parts(
        lambda m, x: through(m.inner, m.first(x)), first=linear(5, 5), inner=inner
    )


def through_cond(inner, x):
    return nnx.cond(x.sum() < 1e9, lambda m, x: m(x), lambda m, x: x[:, :3], inner, x)


def through_lax_cond(inner, x):
    return jax.lax.cond(x.sum() < 1e9, lambda: inner(x), lambda: x[:, :3])


def through_jit(inner, x):
    return jax.jit(lambda m, x: m(x))(inner, x)


def through_split(inner, x):
    """Takes the module apart and allows for nothing but parameters in it."""
    graphdef, params = nnx.split(inner, nnx.Param)
    return nnx.merge(graphdef, params)(x)
