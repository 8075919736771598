"""Attention with biases for NVIDIA GPUs, of few tokens, as Pallas kernels that keep queries, keys and values in 8 bits.

All keys of a window fit in one block, so that its scores stay in registers, forward and backward: each array is read and
written once, where it lies. A program goes over some windows of one image, for one head, and adds up what the cotangents of
bias, scale and offset get from them. The backward pass is that of FlashAttention (Dao et al., 2022, algorithm 4), with one
block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.coders import coded_rows, has_row_steps, row_codes
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import call, like
from lbpwht_jax.ops.platforms import is_narrow

BITS = 8
LEAST_SQUARE = 1e-24  # of the length of a query or key that is not taken for zero
_MOST_TOKENS = 64
_MOST_CHANNELS = 128
_WINDOWS = 8  # of a program
_LEAST = -1e30  # a score that leaves nothing of its weight
_PARTS = 3  # queries, keys, values


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
        return (part, 0) if self.groups == _PARTS else (0, part * self.key_dim)

    def channels(self, packed: int) -> tuple[int, int, int]:
        """The channels of each part, of an array with ``packed`` of them."""
        return self.key_dim, self.key_dim, packed if self.groups == _PARTS else packed - 2 * self.key_dim

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


def takes(qkv: jax.Array, form: Form) -> bool:
    """Whether there are kernels for such an array."""
    channels = form.channels(qkv.shape[-1])
    fits = all(has_row_steps(count) and count <= _MOST_CHANNELS for count in channels)
    return is_narrow(qkv.dtype) and qkv.shape[2] <= _MOST_TOKENS and fits


_PACKED = "b w n s h c"
_ROWS = ["b w n h k", "b w n h k", "b w n h v"]
_STEPS = ["b w n h o"] * 3


def _letters(form: Form) -> Others:
    """The axes of what a form has, as ``distributed`` takes them."""
    scale, offset, mask = "h" if form.cosine else None, "s h c" if form.offset else None, "w n m" if form.mask else None
    return Others("h n m", scale, offset, mask)


@functools.cache
def forward_kernel(form: Form, interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The forward pass, which can be mapped, and sharded along batch and heads.

    Args:
      form: what it computes.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      A function of ``[batch, windows, tokens, groups, heads, channels]``, the bias and, as the form has them, scale, offset and
      mask. It returns attention's result, ``[batch, windows, tokens, heads, channels]``, ``Rows``' codes of queries, keys and
      values, each uint8 in such a shape, and their steps, each float32 ``[batch, windows, tokens, heads, 1]``.
    """

    def run(qkv: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        return _forward(form, qkv, given, interpret)

    return distributed(run, [_PACKED, *_letters(form).given()], [_ROWS[2], *_ROWS, *_STEPS], "bh")


@functools.cache
def backward_kernel(form: Form, interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The backward pass, as ``forward_kernel``.

    Args:
      form: what it computes.
      interpret: as there.

    Returns:
      A function of the codes, the steps, the result's cotangent, the bias and, as the form has them, scale and mask. It returns
      the cotangent of ``[batch, windows, tokens, groups, heads, channels]`` and those of bias and, as the form has them, scale
      and offset: float32 ``[batch, splits, ...]``, still to be summed over batch and splits.
    """

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _backward(form, operands, interpret)

    inputs = [*_ROWS, *_STEPS, _ROWS[2], *_letters(form)._replace(offset=None).given()]
    sums = [f"b p {letters}" for letters in _letters(form)._replace(mask=None).given()]
    return distributed(run, inputs, [_PACKED, *sums], "bh")


class _Head:
    """One head of some windows of an image, which a program works on; rows and columns fill powers of two."""

    def __init__(self, windows: int, tokens: int, heads: int):
        program, splits = pl.program_id(0), pl.cdiv(windows, _WINDOWS)
        self.head, self.split, self.image = program % heads, program // heads % splits, program // (heads * splits)
        self.first = self.split * _WINDOWS
        self.end = jnp.minimum(self.first + _WINDOWS, windows)
        self.rows = jnp.arange(_filled(tokens))
        self.present = self.rows < tokens

    def part(self, ref: Any, window: Any, channels: int, *group: int, first: int = 0) -> tuple[Any, jax.Array]:
        """Where a window's rows are in an array, and which there are."""
        columns = jnp.arange(_filled(channels))
        index = (self.image, window, self.rows[:, None], *group, self.head, first + columns[None, :])
        return ref.at[index], self.present[:, None] & (columns < channels)[None, :]

    def steps(self, ref: Any, window: Any) -> tuple[Any, jax.Array]:
        return ref.at[self.image, window, self.rows[:, None], self.head, jnp.arange(1)[None, :]], self.present[:, None]

    def scores(self, ref: Any, *index: Any) -> tuple[Any, jax.Array]:
        pairs = self.rows[:, None], self.rows[None, :]
        return ref.at[(*index, *pairs)], self.present[:, None] & self.present[None, :]

    def offset(self, ref: Any, channels: int, *index: Any, first: int) -> tuple[Any, jax.Array]:
        *before, group = index
        columns = jnp.arange(_filled(channels))
        return ref.at[(*before, group, self.head, first + columns)], columns < channels


def _filled(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


def _load(where: tuple[Any, jax.Array], other: float = 0) -> jax.Array:
    ref, mask = where
    return plgpu.load(ref, mask=mask, other=other)


def _store(where: tuple[Any, jax.Array], value: jax.Array) -> None:
    ref, mask = where
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


class _Scores:
    """How queries and keys make weights."""

    def __init__(self, form: Form, head: _Head, others: Others):
        self.cosine, self.head, self.mask = form.cosine, head, others.mask
        self.factor = plgpu.load(others.scale.at[head.head]) if form.cosine else form.key_dim**-0.5
        # keys that there are not get no weight
        self.bias = _load(head.scores(others.bias, head.head), other=_LEAST).astype(jnp.float32)

    def unit(self, rows: jax.Array) -> tuple[jax.Array, Any]:
        """Float32 rows, normalised where scores are cosines, and the inverse of their lengths."""
        if not self.cosine:
            return rows, 1.0
        square = jnp.sum(rows * rows, axis=1, keepdims=True)
        positive = square > LEAST_SQUARE
        inverse = jnp.where(positive, lax.rsqrt(jnp.where(positive, square, 1.0)), 0.0)
        return rows * inverse, inverse

    def weights(self, query: jax.Array, key: jax.Array, window: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Products of queries and keys, ``exp(scores - largest)``, and the sums of these by query."""
        products = plgpu.dot(query, key, trans_b=True)
        scores = products * self.factor + self.bias
        if self.mask is not None:
            scores += _load(self.head.scores(self.mask, window)).astype(jnp.float32)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        return products, weights, jnp.sum(weights, axis=1, keepdims=True)


def _forward(form: Form, qkv: jax.Array, given: tuple[jax.Array, ...], interpret: bool) -> tuple[jax.Array, ...]:
    *rows, _, heads, packed = qkv.shape
    windows, tokens = rows[1:]
    channels = form.channels(packed)

    def program(qkv_ref, *refs):
        others = form.others(refs)
        out_ref, *kept_refs = refs[len(given) :]
        head = _Head(windows, tokens, heads)
        scores = _Scores(form, head, others)

        def load(part, window):
            group, first = form.place(part)
            loaded = _load(head.part(qkv_ref, window, channels[part], group, first=first))
            if others.offset is None:
                return loaded
            offset = _load(head.offset(others.offset, channels[part], group, first=first))
            return (loaded.astype(jnp.float32) + offset.astype(jnp.float32)[None, :]).astype(loaded.dtype)

        def one(window, _):
            parts = [load(part, window) for part in range(_PARTS)]
            for part, (narrow, count) in enumerate(zip(parts, channels, strict=True)):
                codes, steps = row_codes(narrow.astype(jnp.float32), BITS, 1)
                _store(head.part(kept_refs[part], window, count), codes)
                _store(head.steps(kept_refs[_PARTS + part], window), steps)
            query, key = (scores.unit(narrow.astype(jnp.float32))[0].astype(qkv.dtype) for narrow in parts[:2])
            _, weights, total = scores.weights(query, key, window)
            result = plgpu.dot(weights.astype(qkv.dtype), parts[2]) / total
            _store(head.part(out_ref, window, channels[2]), result)

        lax.fori_loop(head.first, head.end, one, None)

    codes = [like(qkv, (*rows, heads, count), jnp.uint8) for count in channels]
    steps = [like(qkv, (*rows, heads, 1), jnp.float32)] * _PARTS
    shapes = [like(qkv, codes[2].shape, qkv.dtype), *codes, *steps]
    products = channels[0] + channels[2]
    return _call(form, program, "forward", shapes, (qkv, *given), shapes[0].shape, products, interpret)


def _backward(form: Form, operands: tuple[jax.Array, ...], interpret: bool) -> tuple[jax.Array, ...]:
    g = operands[2 * _PARTS]
    batch, windows, tokens, heads, _ = g.shape
    channels = tuple(codes.shape[-1] for codes in operands[:_PARTS])
    packed = channels[2] if form.groups == _PARTS else sum(channels)

    def program(*refs):
        kept_refs, g_ref = refs[: 2 * _PARTS], refs[2 * _PARTS]
        results = refs[len(operands) :]
        dx_ref, bias_ref = results[:2]
        head = _Head(windows, tokens, heads)
        scores = _Scores(form, head, dataclasses.replace(form, offset=False).others(refs[2 * _PARTS + 1 :]))

        def load(part, window):
            # codes that there are not stand for zero
            codes = _load(head.part(kept_refs[part], window, channels[part]), other=2 ** (BITS - 1) - 1)
            return coded_rows(codes, _load(head.steps(kept_refs[_PARTS + part], window)), BITS).astype(g.dtype)

        def one(window, carry):
            of_bias, of_scale, of_offset = carry
            value, of_result = load(2, window), _load(head.part(g_ref, window, channels[2]))
            units, inverses = zip(*(scores.unit(load(part, window).astype(jnp.float32)) for part in range(2)), strict=True)
            query, key = (unit.astype(g.dtype) for unit in units)
            products, weights, total = scores.weights(query, key, window)
            weights = weights / total
            of_weights = plgpu.dot(of_result, value, trans_b=True)
            of_scores = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
            narrow = of_scores.astype(g.dtype)
            of_units = plgpu.dot(narrow, key) * scores.factor, plgpu.dot(narrow, query, trans_a=True) * scores.factor
            of_parts = [plgpu.dot(weights.astype(g.dtype), of_result, trans_a=True)]
            for unit, inverse, of_unit in zip(units[::-1], inverses[::-1], of_units[::-1], strict=True):
                if form.cosine:
                    of_unit = (of_unit - unit * jnp.sum(unit * of_unit, axis=1, keepdims=True)) * inverse
                of_parts.insert(0, of_unit)
            for part, of_part in enumerate(of_parts):
                group, first = form.place(part)
                _store(head.part(dx_ref, window, channels[part], group, first=first), of_part)
            if form.cosine:
                of_scale += jnp.sum(of_scores * products, axis=1)
            if form.offset:
                of_offset = [total + jnp.sum(of_part, axis=0) for total, of_part in zip(of_offset, of_parts, strict=True)]
            return of_bias + of_scores, of_scale, of_offset

        block = len(head.rows)
        start = jnp.zeros((block, block)), jnp.zeros(block), [jnp.zeros(_filled(count)) for count in channels]
        of_bias, of_scale, of_offset = lax.fori_loop(head.first, head.end, one, start)
        where = head.image, head.split
        _store(head.scores(bias_ref, *where, head.head), of_bias)
        if form.cosine:
            plgpu.store(results[2].at[(*where, head.head)], jnp.sum(of_scale))
        if form.offset:
            for part, of_part in enumerate(of_offset):
                group, first = form.place(part)
                _store(head.offset(results[-1], channels[part], *where, group, first=first), of_part)

    sums = [(heads, tokens, tokens), *([(heads,)] if form.cosine else [])]
    sums += [(form.groups, heads, packed)] if form.offset else []
    parts = batch, pl.cdiv(windows, _WINDOWS)
    shapes = [like(g, (*g.shape[:3], form.groups, heads, packed), g.dtype)]
    shapes += [like(g, (*parts, *shape), jnp.float32) for shape in sums]
    return _call(form, program, "backward", shapes, operands, g.shape, 3 * channels[0] + 2 * channels[2], interpret)


def _call(
    form: Form,
    program: Callable[..., None],
    name: str,
    shapes: list[jax.ShapeDtypeStruct],
    operands: tuple[jax.Array, ...],
    result: tuple[int, ...],
    products: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel; ``result`` is the shape of attention's, ``products`` the multiply-adds of all products for a score."""
    batch, windows, tokens, heads, channels = result
    scores = batch * windows * heads * _filled(tokens) ** 2
    return call(
        program,
        f"{'cosine' if form.cosine else 'biased'}_attention_{name}",
        f"{windows}x{tokens}x{heads}x{channels}",
        (batch * pl.cdiv(windows, _WINDOWS) * heads,),
        shapes,
        operands,
        flops=2 * products * scores,
        transcendentals=scores,
        interpret=interpret,
    )
