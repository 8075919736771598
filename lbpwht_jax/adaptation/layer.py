"""What is known of a model's dense layers, and how each of them is adapted.

Neither Flax nor arrays are needed here: layers are known by their paths and shapes.
"""

import dataclasses
import math
from typing import NamedTuple

from lbpwht_jax.ops.heuristic import Place
from lbpwht_jax.ops.spec import Grid, LowRankSpec


class Stack(NamedTuple):
    """How the parameters of equal layers lie in one array, as ``nn.scan`` and ``nn.vmap`` store them.

    Attributes:
      sizes: number of layers along each axis of the stack; empty for a single layer.
      kernel_axes: these axes in the stored kernel.
      matrix_axes: these axes in a stored matrix, such as LoRA's.
    """

    sizes: tuple[int, ...] = ()
    kernel_axes: tuple[int, ...] = ()
    matrix_axes: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return math.prod(self.sizes)


SINGLE = Stack()


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer or a convolution without groups of a model.

    Attributes:
      path: the module's path, joined by "/".
      kind: the name of its class.
      input_shape: the shape of its input; the dimensions that the kernel contracts are joined into one, the last.
      kernel_shape: the shape of one layer's kernel.
      outputs: number of output channels.
      convolution: whether it is a convolution.
      window: the sizes of the window of a convolution that is no 1x1 one, or has a stride; empty for all other layers.
      contracted: how many dimensions of the input the kernel contracts.
      grid: tokens along each axis, if the layer knows them.
      prefix_tokens: leading tokens outside the grid, if the layer knows them.
      other_shapes: the shapes of the inputs of its other calls, without vectors, ``[batch, channels]``.
      on_vectors: whether some of its calls, but not all, are on vectors.
      stack: how the parameters of several such layers are stored together.
      own_product: the name of the attribute in which the layer holds a product of its own; ``""`` if it has none.
      plain: whether the product takes the kernel as it is stored, perhaps in another dtype or shape. ``False`` where the
        kernel is standardised, normalised or otherwise computed first.
      place: which of two layers it is that are joined, GELU between them; ``None`` for a layer by itself.
      mixes_tokens: whether the layer is known to contract tokens, as a mixer's does, or to follow such a layer.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    outputs: int
    convolution: bool = False
    window: tuple[int, ...] = ()
    contracted: int = 1
    grid: Grid | None = None
    prefix_tokens: int = 0
    other_shapes: tuple[tuple[int, ...], ...] = ()
    on_vectors: bool = False
    stack: Stack = SINGLE
    own_product: str = ""
    plain: bool = True
    place: Place | None = None
    mixes_tokens: bool = False

    @property
    def shown(self) -> str:
        """The path, for messages."""
        return self.path or "the top level"

    @property
    def inputs(self) -> int:
        """Number of input channels, times the places of a convolution's window."""
        return math.prod(self.window) * self.input_shape[-1]


def called_again(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """The layer after one more call, on an input of ``shape`` in the form of ``Layer.input_shape``."""
    if shape in (layer.input_shape, *layer.other_shapes):
        return layer
    if len(shape) <= 2:
        return dataclasses.replace(layer, on_vectors=len(layer.input_shape) > 2)
    if len(layer.input_shape) <= 2:
        return dataclasses.replace(layer, input_shape=shape, on_vectors=True)
    return dataclasses.replace(layer, other_shapes=(*layer.other_shapes, shape))


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How one layer is adapted.

    Attributes:
      layer: the layer.
      spec: the Walsh functions kept in its backward pass; ``None`` for an exact one.
      grid: tokens along each axis; ``None`` for channels-last maps and where ``spec`` is ``None``.
      prefix_tokens: leading tokens outside the grid.
      shown_grid: tokens along each axis, given for maps too.
      rank: rank of the LoRA branch, 0 without one.
      alpha: alpha of the LoRA branch.
      dropout: probability of zeros in the input of the LoRA branch while training.
      rslora: whether the branch is multiplied by ``alpha / rank ** 0.5`` instead of ``alpha / rank``.
      slower: whether the rule's spec, whose ``when`` is ``"faster"``, was left out because low rank is predicted to be slower.
    """

    layer: Layer
    spec: LowRankSpec | None
    grid: Grid | None = None
    prefix_tokens: int = 0
    shown_grid: Grid | None = None
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    slower: bool = False

    @property
    def scale(self) -> float:
        """The factor of the LoRA branch."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def branch_parameters(self) -> int:
        """Number of parameters in the LoRA branches of all layers of the stack, 0 without one."""
        return self.layer.stack.layers * self.rank * (self.layer.inputs + self.layer.outputs)

    @property
    def method(self) -> str:
        """How the layer is adapted, for people to read."""
        parts = ["LoRA"] * bool(self.rank) + ["LowRank"] * (self.spec is not None)
        return " + ".join(parts + ["full: LowRank is slower"] * self.slower) or "full"

    @property
    def ranks(self) -> str:
        """The rank of the branch and the number of Walsh functions, those of them that there are, for people to read."""
        return " + ".join(str(rank) for rank in (self.rank, self.spec.rank if self.spec else 0) if rank)
