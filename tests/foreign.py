"""Models of Flax's own layers that know nothing of this library."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(y, y)
        y = nn.Dense(16, name="fc1")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(8, name="fc2")(nn.Dropout(0.5, deterministic=not train)(nn.gelu(y)))


class ViT(nn.Module):
    """A vision transformer: patches of 4x4 pixels, a 1x1 convolution, a class token, two blocks, a head on all tokens."""

    remat: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (4, 4), (4, 4), name="embed")(images)
        x = nn.Conv(8, (1, 1), name="mix")(x)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("cls_token", nn.initializers.normal(1.0), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], axis=1)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i in range(2):
            x = block(name=f"block_{i}")(x, train)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class MixerBlock(nnx.Module):
    def __init__(self, tokens, channels, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(channels, rngs=rngs), nnx.LayerNorm(channels, rngs=rngs)
        self.tokens = nnx.Linear(tokens, tokens, rngs=rngs)
        self.fc1 = nnx.Linear(channels, 2 * channels, rngs=rngs)
        self.fc2 = nnx.Linear(2 * channels, channels, rngs=rngs)

    def __call__(self, x):
        x = x + jnp.swapaxes(self.tokens(jnp.swapaxes(self.norm1(x), 1, 2)), 1, 2)
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class Mixer(nnx.Module):
    """An MLP-mixer (Tolstikhin et al., 2021) of images of 16x20 pixels."""

    def __init__(self, rngs):
        self.embed = nnx.Conv(3, 8, (4, 4), (4, 4), rngs=rngs)
        self.mix = nnx.Conv(8, 8, (1, 1), rngs=rngs)
        self.blocks = nnx.List([MixerBlock(20, 8, rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        x = self.mix(self.embed(images))
        x = x.reshape(x.shape[0], -1, 8)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))
