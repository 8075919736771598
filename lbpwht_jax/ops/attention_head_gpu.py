"""What a program of the GPU's kernels for attention with biases sees: one head of some windows, and their scores."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST_SQUARE = 1e-24  # of the length of a query or key that is not taken for zero
PARTS = 3  # queries, keys, values
_WINDOWS = 8  # of a program
_LEAST = -1e30  # a score that leaves nothing of its weight


@dataclasses.dataclass(frozen=True)
class Form:
    """What is computed, as ``packed_biased_attention`` describes it.

    Attributes:
      key_dim: channels of a head's queries and of its keys.
      groups: three, or one that holds all parts.
      cosine: whether there is a scale.
      offset: whether there is one.
      mask: whether there is one.
    """

    key_dim: int
    groups: int
    cosine: bool
    offset: bool
    mask: bool

    def place(self, part: int) -> tuple[int, int]:
        """A part's group, and its first channel there."""
        return (part, 0) if self.groups == PARTS else (0, part * self.key_dim)

    def channels(self, packed: int) -> tuple[int, int, int]:
        """The channels of each part, of an array with ``packed`` of them."""
        return self.key_dim, self.key_dim, packed if self.groups == PARTS else packed - 2 * self.key_dim

    def others(self, given: Sequence[Any]) -> "Others":
        """What is given, in this order, as far as the form has it."""
        own = iter(given)
        return Others(*(next(own) if has else None for has in (True, self.cosine, self.offset, self.mask)))


class Others(NamedTuple):
    """What attention has besides queries, keys and values; or the cotangents of these."""

    bias: Any
    scale: Any
    offset: Any
    mask: Any

    def given(self) -> list[Any]:
        """Those there are."""
        return [array for array in self if array is not None]


def splits(windows: int) -> int:
    """How many programs share the windows of an image, for each head."""
    return pl.cdiv(windows, _WINDOWS)


def filled(count: int) -> int:
    """The rows or columns of the block that holds so many."""
    return max(16, 1 << (count - 1).bit_length())


def load(where: tuple[Any, jax.Array], other: float = 0) -> jax.Array:
    """What is there, and ``other`` beyond it."""
    ref, mask = where
    return plgpu.load(ref, mask=mask, other=other)


def store(where: tuple[Any, jax.Array], value: jax.Array) -> None:
    """Writes what is there of a block, in the array's dtype."""
    ref, mask = where
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


class Head:
    """One head of some windows of an image, which a program works on; rows and columns fill powers of two.

    Its methods say where something is in an array, for ``load`` and ``store``.

    Attributes:
      image, split, head: which image, which of its splits and which head.
      first, end: the windows, from the first to before the end.
      block: how many rows there are with those that only fill the block.
    """

    def __init__(self, windows: int, tokens: int, heads: int):
        program, count = pl.program_id(0), splits(windows)
        self.head, self.split, self.image = program % heads, program // heads % count, program // (heads * count)
        self.first = self.split * _WINDOWS
        self.end = jnp.minimum(self.first + _WINDOWS, windows)
        self.block = filled(tokens)
        self.rows = jnp.arange(self.block)
        self.present = self.rows < tokens

    def part(self, ref: Any, window: Any, channels: int, *group: int, first: int = 0) -> tuple[Any, jax.Array]:
        """Queries, keys or values of a window, ``[tokens, channels]``, from the first channel on."""
        columns = jnp.arange(filled(channels))
        index = (self.image, window, self.rows[:, None], *group, self.head, first + columns[None, :])
        return ref.at[index], self.present[:, None] & (columns < channels)[None, :]

    def steps(self, ref: Any, window: Any) -> tuple[Any, jax.Array]:
        """The steps of their codes, ``[tokens, 1]``."""
        return ref.at[self.image, window, self.rows[:, None], self.head, jnp.arange(1)[None, :]], self.present[:, None]

    def scores(self, ref: Any, *index: Any) -> tuple[Any, jax.Array]:
        """``[tokens, tokens]`` of an array with these two axes last."""
        pairs = self.rows[:, None], self.rows[None, :]
        return ref.at[(*index, *pairs)], self.present[:, None] & self.present[None, :]

    def offset(self, ref: Any, channels: int, *index: Any, first: int) -> tuple[Any, jax.Array]:
        """One part's ``[channels]`` of an array with a group's heads and channels last."""
        columns = jnp.arange(filled(channels))
        return ref.at[(*index, self.head, first + columns)], columns < channels


class Scores:
    """How queries and keys make weights."""

    def __init__(self, form: Form, head: Head, others: Others):
        self.cosine, self.head, self.bias, self.mask = form.cosine, head, others.bias, others.mask
        self.factor = plgpu.load(others.scale.at[head.head]) if form.cosine else form.key_dim**-0.5

    def unit(self, rows: jax.Array) -> tuple[jax.Array, Any]:
        """Float32 rows, normalised where scores are cosines, and the inverse of their lengths."""
        if not self.cosine:
            return rows, 1.0
        square = jnp.sum(rows * rows, axis=1, keepdims=True)
        positive = square > LEAST_SQUARE
        inverse = jnp.where(positive, lax.rsqrt(jnp.where(positive, square, 1.0)), 0.0)
        return rows * inverse, inverse

    def of_rows(self, unit: jax.Array, inverse: Any, of_unit: jax.Array) -> jax.Array:
        """The rows' cotangent, from what ``unit`` returned and the cotangent of the rows it returned."""
        if not self.cosine:
            return of_unit
        return (of_unit - unit * jnp.sum(unit * of_unit, axis=1, keepdims=True)) * inverse

    def weights(self, query: jax.Array, key: jax.Array, window: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Products of queries and keys, ``exp(scores - largest)``, and the sums of these by query."""
        products = plgpu.dot(query, key, trans_b=True)
        # read for each window: registers are few; and keys that there are not get no weight
        scores = products * self.factor + load(self.head.scores(self.bias, self.head.head), other=_LEAST)
        if self.mask is not None:
            scores += load(self.head.scores(self.mask, window)).astype(jnp.float32)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        return products, weights, jnp.sum(weights, axis=1, keepdims=True)
