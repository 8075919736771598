"""What some vision transformers have and the plain one has not: registers, layer scale, CLIP's norms, SigLIP's pooling."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.models.blocks import Activation, Mlp, Part, dense
from lbpwht_jax.models.norms import layer_norm, widen
from lbpwht_jax.ops.attention import kept_attention
from lbpwht_jax.ops.spec import Grid


@dataclasses.dataclass(frozen=True)
class Options:
    """How a vision transformer differs from the plain one.

    Attributes:
      pooling: what the head sees of the last block: its class token; the average of the patches' tokens; or what a learned
        query attends to (``AttentionPool``). Only the first has a class token.
      registers: number of tokens besides, which nothing reads at the end (Darcet et al., 2024).
      prefix_positions: whether the tokens in front of the patches' have position embeddings too.
      pre_norm: whether the tokens are normalised before the first block; the patch embedding then has no bias.
      layer_scale: the value at which the factors of the residual branches' channels start; ``None`` for none.
      epsilon: added to the variance in layer norms.
      activation: of the MLPs.
    """

    pooling: Literal["token", "average", "attention"] = "token"
    registers: int = 0
    prefix_positions: bool = True
    pre_norm: bool = False
    layer_scale: float | None = None
    epsilon: float = 1e-6
    activation: Activation = "gelu"


class AttentionPool(Part):
    """One token from all: a learned query attends to them, and an MLP follows (the MAP head of Zhai et al., 2022).

    Attributes:
      heads: number of attention heads.
      hidden: channels between the two layers of the MLP.
      options: those of the model.
      grid: patches along each axis.
      prefix_tokens: tokens in front of the patches'.
    """

    heads: int
    hidden: int
    options: Options
    grid: Grid
    prefix_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, prefix_tokens + tokens, channels]`` to ``[batch, channels]``."""
        batch, length, channels = x.shape
        # What is one token is a map of 1x1, which every rule for maps takes.
        latent = self.param("latent", nn.initializers.normal(channels**-0.5), (1, 1, channels)).astype(x.dtype)
        query = dense(self, "q", channels)(latent[:, None])
        query = jnp.broadcast_to(query.reshape(1, 1, self.heads, -1), (batch, 1, self.heads, channels // self.heads))
        pair = dense(self, "kv", 2 * channels, grid=self.grid, prefix_tokens=self.prefix_tokens)(x)
        key, value = jnp.moveaxis(pair.reshape(batch, length, 2, self.heads, -1), 2, 0)
        y = kept_attention(_attend, self.settings.residuals, (query, key, value))
        y = dense(self, "proj", channels)(y.reshape(batch, 1, 1, channels))
        mlp = Mlp(self.hidden, grid=None, activation=self.options.activation, settings=self.settings, name="mlp")
        return (y + mlp(layer_norm(self, "norm", y, epsilon=self.options.epsilon))).reshape(batch, channels)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of ``[batch, queries, heads, head_dim]`` to ``[batch, keys, heads, head_dim]``."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(widen(logits)).astype(value.dtype), value)
