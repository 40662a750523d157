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


class Mlp(nnx.Module):
    def __init__(self, rngs, n_in=5, n_hidden=4, n_out=3):
        self.first = nnx.Linear(n_in, n_hidden, rngs=rngs)
        self.last = nnx.Linear(n_hidden, n_out, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


class Normed(nnx.Module):
    """A norm with something before and after it, so that its gradient is not zero."""

    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        return jnp.cumsum(jnp.sin(self.norm(x) + 0.3), -1) ** 2


class Tied(nnx.Module):
    """An embedding that is used transposed, too."""

    def __init__(self):
        self.embed = nnx.Embed(7, 5, rngs=rngs())
        self.mix = nnx.Linear(5, 5, rngs=rngs())

    def __call__(self, tokens):
        return self.embed.attend(nnx.tanh(self.mix(self.embed(tokens))))


class Attention(nnx.Module):
    def __init__(self, **kwargs):
        self.attend = nnx.MultiHeadAttention(
            2, in_features=5, qkv_features=6, decode=False, rngs=rngs(), **kwargs
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


class Lifted(nnx.Module):
    """A module below a transform of NNX's."""

    def __init__(self, lift):
        self.inner, self.lift = Mlp(rngs()), lift

    def __call__(self, x):
        return self.lift(lambda model, x: model(x))(self.inner, x)


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


class Stateful(nnx.Module):
    """Running statistics and dropout."""

    def __init__(self):
        self.first = nnx.Linear(5, 4, use_bias=False, rngs=rngs())
        self.norm = nnx.BatchNorm(4, rngs=rngs())
        self.dropout = nnx.Dropout(0.3, rngs=rngs())
        self.last = nnx.Linear(4, 2, rngs=rngs())

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


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


# ---------------------------------------------------------------- reported


class Custom(nnx.Module):
    """A parameter that no layer of Flax's holds."""

    def __init__(self):
        self.weights = nnx.Param(normal(1, 5, 5))
        self.last = nnx.Linear(5, 3, rngs=rngs())

    def __call__(self, x):
        return self.last(x @ self.weights[...])


class Unused(Mlp):
    def __call__(self, x):
        return self.first(x)


class Half(nnx.Module):
    """A first layer that is covered and a second part that may not be."""

    def __init__(self, inner, through=lambda inner, x: inner(x)):
        self.first = nnx.Linear(5, 5, rngs=rngs())
        self.inner, self.through = inner, through

    def __call__(self, x):
        return self.through(self.inner, self.first(x))


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
