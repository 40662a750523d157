"""The models that the workloads train."""

import flax.linen as nn
import jax.numpy as jnp


class Autoencoder(nn.Module):
    """A mirrored tanh autoencoder with a linear code; its outputs are logits."""

    widths: tuple[int, ...] = (1000, 500, 250, 30)

    @nn.compact
    def __call__(self, x):
        num_pixels = x.shape[-1]
        *hidden, code = self.widths
        for width in hidden:
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(code)(x)
        for width in reversed(hidden):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(num_pixels)(x)


class PixelAutoencoder(nn.Module):
    """`Autoencoder` whose outputs are grey values instead of logits."""

    widths: tuple[int, ...] = (1000, 500, 250, 30)

    @nn.compact
    def __call__(self, x):
        return nn.sigmoid(Autoencoder(self.widths)(x))


class MLP(nn.Module):
    """Dense layers with ReLU between them; its outputs are logits."""

    widths: tuple[int, ...] = (512, 256, 10)

    @nn.compact
    def __call__(self, x):
        *hidden, classes = self.widths
        for width in hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(classes)(x)


class CNN(nn.Module):
    """Two strided convolutions, then two dense layers."""

    channels: tuple[int, ...] = (16, 32)
    hidden: int = 64

    @nn.compact
    def __call__(self, x):
        for num in self.channels:
            x = nn.relu(nn.Conv(num, (3, 3), strides=(2, 2))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


class Transformer(nn.Module):
    """A causal language model over characters, with pre-norm blocks."""

    vocabulary: int
    width: int = 64
    heads: int = 4
    depth: int = 2

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[-1]
        mask = nn.make_causal_mask(tokens)
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(length, self.width)(positions)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
            y = nn.LayerNorm()(x)
            y = nn.gelu(nn.Dense(4 * self.width)(y))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))
