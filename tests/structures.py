"""Small copies of the structures of models that others wrote, for Linen and NNX; none knows anything of this library."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class Block(nn.Module):
    """Two dense layers beside a residual connection."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(2 * x.shape[-1], name="fc1")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(x.shape[-1], name="fc2")(jnp.tanh(y)), None


class Stacked(nn.Module):
    """Patches, then blocks in one scan or under ``vmap``, as big_vision has them; the tokens' mean."""

    axis: int = 0
    kind: str = "scan"
    remat: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), (2, 2), name="embed")(images)
        x = x.reshape(x.shape[0], -1, 4)
        block: Any = nn.remat(Block, prevent_cse=False) if self.remat else Block
        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.kind == "scan":
            x, _ = nn.scan(block, length=3, **axes)(name="blocks")(x, None)
        else:
            x, _ = nn.vmap(block, in_axes=None, axis_size=3, **axes)(name="blocks")(x)
            x = x.sum(0)
        return nn.Dense(3, name="head")(x.mean(1))


class StandardConv(nn.Conv):
    """A convolution with standardised kernels (Qiao et al., 2019), as vision_transformer's hybrid models make them."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        value = value - value.mean((0, 1, 2), keepdims=True)
        return value / (value.std((0, 1, 2), keepdims=True) + 1e-5)


class Standardised(nn.Module):
    """A residual network's bottleneck with standardised kernels, and a dense layer with a normalised one."""

    @nn.compact
    def __call__(self, images):
        x = StandardConv(4, (2, 2), (2, 2), name="embed")(images)
        x = x + StandardConv(4, (1, 1), name="mix")(nn.GroupNorm(2, name="norm")(x))
        x = nn.WeightNorm(nn.Dense(6, name="fc"))(jnp.tanh(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Partitioned(nn.Module):
    """Kernels that say how they are partitioned."""

    @nn.compact
    def __call__(self, images):
        split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Conv(4, (2, 2), (2, 2), name="embed")(images)
        x = x + nn.Dense(4, kernel_init=split, name="fc")(x)
        return nn.Dense(3, kernel_init=split, name="head")(jnp.tanh(x).mean((1, 2)))


class Shared(nn.Module):
    """One layer called on a map and on a vector, as heads with a shared projection do."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), (2, 2), name="embed")(images)
        shared = nn.Dense(4, name="fc")
        return nn.Dense(3, name="head")(shared(jnp.tanh(shared(x)).mean((1, 2))))


class Mixer(nn.Module):
    """An MLP-mixer (Tolstikhin et al., 2021): dense layers across tokens and across channels."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(6, (2, 2), (2, 2), name="embed")(images)
        x = x.reshape(x.shape[0], -1, 6)
        tokens = x.shape[1]
        y = nn.Dense(8, name="tokens")(jnp.swapaxes(nn.LayerNorm(name="norm1")(x), 1, 2))
        y = nn.Dense(tokens, name="tokens2")(jnp.tanh(y))
        x = x + jnp.swapaxes(y, 1, 2)
        x = x + nn.Dense(6, name="fc")(nn.LayerNorm(name="norm2")(x))
        return nn.Dense(3, name="head")(x.mean(1))


class Convolutions(nn.Module):
    """Convolutions with windows, strides and dilation, and a depthwise one."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), (2, 2), padding="VALID", name="embed")(images)
        x = x + nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = jnp.tanh(nn.Conv(6, (3, 2), padding="CIRCULAR", kernel_dilation=2, name="fc1")(x))
        x = nn.Conv(4, (1, 1), (2, 2), name="fc2")(x)
        return nn.Dense(3, name="head")(jnp.tanh(x).mean((1, 2)))


class Video(nn.Module):
    """Patches of frames: a grid of three axes, as V-JEPA has it."""

    @nn.compact
    def __call__(self, frames):
        x = nn.Conv(4, (1, 2, 2), (1, 2, 2), name="embed")(frames)
        x = x.reshape(x.shape[0], -1, 4)
        x = x + nn.Dense(4, name="fc")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(3, name="head")(jnp.tanh(x).mean(1))


class Towers(nn.Module):
    """Two methods, as models of image and text have."""

    def setup(self):
        self.embed = nn.Conv(4, (2, 2), (2, 2))
        self.fc = nn.Dense(4)
        self.text = nn.Dense(4)

    def encode(self, images):
        return jnp.tanh(self.fc(self.embed(images))).mean((1, 2))

    def __call__(self, images, words):
        return self.encode(images) * self.text(words)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        y = jnp.tanh(self.fc1(x))
        return x + self.fc2(y if rngs is None else self.dropout(y, rngs=rngs))


class NNXStacked(nnx.Module):
    """Blocks in one scan; the keys of dropout are an argument."""

    def __init__(self, rngs):
        self.embed = nnx.Conv(3, 4, (2, 2), (2, 2), rngs=rngs)
        make = nnx.vmap(NNXBlock, in_axes=0)
        self.blocks = make(rngs.split(3))
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, images):
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, 4)
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.head(x.mean(1))


class NNXMixer(nnx.Module):
    """A mixer for six tokens."""

    def __init__(self, rngs):
        self.embed = nnx.Conv(3, 6, (2, 2), (2, 2), rngs=rngs)
        self.tokens, self.tokens2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.fc, self.head = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, images):
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, 6)
        x = x + self.tokens2(jnp.tanh(self.tokens(x.swapaxes(1, 2)))).swapaxes(1, 2)
        return self.head((x + self.fc(x)).mean(1))


class NNXNormalised(nnx.Module):
    """A dense layer with a normalised kernel, and an attribute named as the one that ``adapt`` would like to set."""

    def __init__(self, rngs):
        self.resolution = 8
        self.embed = nnx.Conv(3, 4, (2, 2), (2, 2), rngs=rngs)
        self.fc = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, images):
        return self.head(jnp.tanh(self.fc(self.embed(images))).mean((1, 2)))


class Structure(NamedTuple):
    """A model, the shape of its input, and the layers to adapt."""

    model: nn.Module
    shape: tuple[int, ...]
    pattern: str
    grid: tuple[int, ...] | None = None
    merges: bool = True
    low: bool = True


IMAGES = (2, 8, 10, 3)
LINEN = {
    "scan": Structure(Stacked(), IMAGES, "blocks/fc", (4, 5)),
    "scan, parameters along axis 1": Structure(Stacked(axis=1, remat=True), IMAGES, "blocks/fc", (4, 5)),
    "vmap, parameters along the last axis": Structure(Stacked(axis=-1, kind="vmap"), IMAGES, "blocks/fc", (4, 5)),
    "computed kernels": Structure(Standardised(), IMAGES, "mix|fc", merges=False),
    "partitioned kernels": Structure(Partitioned(), IMAGES, "fc"),
    "a map and a vector": Structure(Shared(), IMAGES, "fc"),
    "mixer": Structure(Mixer(), IMAGES, "fc", (4, 5)),
    "convolutions": Structure(Convolutions(), IMAGES, "fc|embed", low=False),
    "three axes": Structure(Video(), (2, 3, 4, 4, 3), "fc", (3, 2, 2)),
}
