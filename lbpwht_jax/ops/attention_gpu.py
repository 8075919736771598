"""Attention for NVIDIA GPUs as Pallas kernels that keep queries, keys and values in 8 bits, and read tokens unpadded.

The forward pass is FlashAttention (Dao et al., 2022, algorithm 1): blocks of keys with a running maximum and sum, so that
scores are never stored. It writes the codes in passing. The backward pass is one program per image and head. It decodes keys
and values once, into the place of their cotangents, and goes over them twice for each block of queries, for the softmax's sums
and then for the queries' cotangent; at last once over the queries for each block of keys. Scores are in bits, not nats, because
a power of two takes a GPU half as long as ``exp``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.coders import coded_rows, has_row_steps, middle
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import call, like, row_bytes
from lbpwht_jax.ops.platforms import is_narrow

BITS = 8
_BLOCK = 64
_LARGEST_HEAD = 128
_LEAST = -1e30  # a score that leaves nothing of its weight

QUERY, KEY, VALUE = range(3)


def takes(dtype: Any, head_dim: int) -> bool:
    """Whether there are kernels for heads of so many channels in some dtype."""
    return is_narrow(dtype) and has_row_steps(head_dim) and head_dim <= _LARGEST_HEAD


@functools.cache
def forward_kernel(interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The forward pass, which can be mapped, and sharded along batch and heads.

    Args:
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      A function of ``[batch, tokens, 3, heads, head_dim]``, queries, keys and values, that returns attention's result,
      ``[batch, tokens, heads, head_dim]``, ``Rows``' codes of queries, keys and values, each uint8 of the same shape, and their
      steps, each float32 ``[batch, tokens, heads, 1]``.
    """

    def run(qkv: jax.Array) -> tuple[jax.Array, ...]:
        return _forward(qkv, interpret)

    return distributed(run, ["b n s h d"], ["b n h d"] * 4 + ["b n h o"] * 3, "bh")


@functools.cache
def backward_kernel(interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The backward pass, as ``forward_kernel``.

    Args:
      interpret: as there.

    Returns:
      A function of the codes, the steps and the result's cotangent that returns the cotangent of
      ``[batch, tokens, 3, heads, head_dim]``.
    """

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _backward(operands, interpret)

    return distributed(run, ["b n h d"] * 3 + ["b n h o"] * 3 + ["b n h d"], ["b n s h d"], "bh")


class _Head:
    """Blocks of the tokens of one head of one image."""

    def __init__(self, index: jax.Array, tokens: int, heads: int, channels: int):
        self.image, self.head, self.tokens = index // heads, index % heads, tokens
        self.columns = jnp.arange(max(16, 1 << (channels - 1).bit_length()))
        self.inside = (self.columns < channels)[None, :]

    def rows(self, block: Any) -> jax.Array:
        return block * _BLOCK + jnp.arange(_BLOCK)

    def present(self, block: Any) -> jax.Array:
        return (self.rows(block) < self.tokens)[:, None]

    def load(self, ref: Any, block: Any, *part: int, other: int = 0) -> jax.Array:
        index = (self.image, self.rows(block)[:, None], *part, self.head, self.columns[None, :])
        return plgpu.load(ref.at[index], mask=self.present(block) & self.inside, other=other)

    def store(self, ref: Any, value: jax.Array, block: Any, *part: int) -> None:
        index = (self.image, self.rows(block)[:, None], *part, self.head, self.columns[None, :])
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=self.present(block) & self.inside)

    def steps(self, ref: Any, block: Any) -> tuple[Any, jax.Array]:
        """Where the steps of a block's rows are, and which there are: ``[rows, 1]``."""
        return ref.at[self.image, self.rows(block)[:, None], self.head, jnp.arange(1)[None, :]], self.present(block)


def _forward(qkv: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
    batch, tokens, _, heads, channels = qkv.shape
    blocks, scale = pl.cdiv(tokens, _BLOCK), channels**-0.5 / math.log(2)

    def program(qkv_ref, out_ref, *kept_refs):
        head, block = _Head(pl.program_id(0), tokens, heads, channels), pl.program_id(1)
        query = head.load(qkv_ref, block, QUERY)

        def add(j, carry):
            most, total, result = carry
            scores = plgpu.dot(query, head.load(qkv_ref, j, KEY), trans_b=True) * scale
            scores = jnp.where(head.present(j).reshape(1, _BLOCK), scores, _LEAST)
            new = jnp.maximum(most, jnp.max(scores, axis=1))
            weights, before = jnp.exp2(scores - new[:, None]), jnp.exp2(most - new)
            part = plgpu.dot(weights.astype(query.dtype), head.load(qkv_ref, j, VALUE))
            return new, total * before + jnp.sum(weights, axis=1), result * before[:, None] + part

        start = jnp.full(_BLOCK, _LEAST), jnp.zeros(_BLOCK), jnp.zeros((_BLOCK, len(head.columns)))
        _, total, result = lax.fori_loop(0, blocks, add, start)
        head.store(out_ref, result / total[:, None], block)
        for part in (QUERY, KEY, VALUE):
            [codes], steps = row_bytes([head.load(qkv_ref, block, part).astype(jnp.float32)])
            head.store(kept_refs[part], codes, block)
            where, mask = head.steps(kept_refs[3 + part], block)
            plgpu.store(where, steps, mask=mask)

    result = (batch, tokens, heads, channels)
    codes, steps = like(qkv, result, jnp.uint8), like(qkv, (*result[:-1], 1), jnp.float32)
    shapes = [like(qkv, result, qkv.dtype), codes, codes, codes, steps, steps, steps]
    return _call(program, "attention_forward", (batch * heads, blocks), shapes, (qkv,), result, 2, interpret)


def _backward(operands: tuple[jax.Array, ...], interpret: bool) -> tuple[jax.Array, ...]:
    g = operands[-1]
    batch, tokens, heads, channels = g.shape
    blocks, scale = pl.cdiv(tokens, _BLOCK), channels**-0.5
    in_bits = scale / math.log(2)

    def program(*refs):
        *kept_refs, g_ref, dx_ref, sums_ref = refs
        index = pl.program_id(0)
        head = _Head(index, tokens, heads, channels)

        def decoded(j, part):
            where, mask = head.steps(kept_refs[3 + part], j)
            codes = head.load(kept_refs[part], j, other=middle(BITS))
            rows = coded_rows(codes, plgpu.load(where, mask=mask, other=0), BITS)
            return rows.astype(g_ref.dtype)

        def decode(j, _):
            for part in (KEY, VALUE):
                head.store(dx_ref, decoded(j, part), j, part)

        def sums(which, i):
            return sums_ref.at[index, which, head.rows(i)]

        def queries(i, _):
            query, of_result = decoded(i, QUERY), head.load(g_ref, i)

            def score(j):
                scores = plgpu.dot(query, head.load(dx_ref, j, KEY), trans_b=True) * in_bits
                of_weights = plgpu.dot(of_result, head.load(dx_ref, j, VALUE), trans_b=True)
                return jnp.where(head.present(j).reshape(1, _BLOCK), scores, _LEAST), of_weights

            def add(j, carry):
                most, total, delta = carry
                scores, of_weights = score(j)
                new = jnp.maximum(most, jnp.max(scores, axis=1))
                weights, before = jnp.exp2(scores - new[:, None]), jnp.exp2(most - new)
                delta = delta * before + jnp.sum(weights * of_weights, axis=1)
                return new, total * before + jnp.sum(weights, axis=1), delta

            start = jnp.full(_BLOCK, _LEAST), jnp.zeros(_BLOCK), jnp.zeros(_BLOCK)
            most, total, delta = lax.fori_loop(0, blocks, add, start)
            normaliser, delta = most + jnp.log2(total), delta / total
            plgpu.store(sums(0, i), normaliser)
            plgpu.store(sums(1, i), delta)

            def of_query(j, dx):
                scores, of_weights = score(j)
                of_scores = jnp.exp2(scores - normaliser[:, None]) * (of_weights - delta[:, None])
                return dx + plgpu.dot(of_scores.astype(g_ref.dtype), head.load(dx_ref, j, KEY))

            dx = lax.fori_loop(0, blocks, of_query, jnp.zeros((_BLOCK, len(head.columns))))
            head.store(dx_ref, dx * scale, i, QUERY)

        def keys(j, _):
            key, value = head.load(dx_ref, j, KEY), head.load(dx_ref, j, VALUE)

            def add(i, carry):
                of_key, of_value = carry
                query, of_result = decoded(i, QUERY), head.load(g_ref, i)
                scores = plgpu.dot(key, query, trans_b=True) * in_bits
                weights = jnp.exp2(scores - plgpu.load(sums(0, i))[None, :])
                of_value += plgpu.dot(weights.astype(g_ref.dtype), of_result)
                of_scores = weights * (plgpu.dot(value, of_result, trans_b=True) - plgpu.load(sums(1, i))[None, :])
                return of_key + plgpu.dot(of_scores.astype(g_ref.dtype), query), of_value

            zeros = jnp.zeros((_BLOCK, len(head.columns)))
            of_key, of_value = lax.fori_loop(0, blocks, add, (zeros, zeros))
            head.store(dx_ref, of_key * scale, j, KEY)
            head.store(dx_ref, of_value, j, VALUE)

        for stage in (decode, queries, keys):
            lax.fori_loop(0, blocks, stage, None)
            if not interpret:
                plgpu.debug_barrier()  # the program's threads read what others of them wrote

    dx = like(g, (batch, tokens, 3, heads, channels), g.dtype)
    shapes = [dx, like(g, (batch * heads, 2, blocks * _BLOCK), jnp.float32)]
    return _call(program, "attention_backward", (batch * heads,), shapes, operands, g.shape, 9, interpret)[:1]


def _call(
    program: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    shapes: list[jax.ShapeDtypeStruct],
    operands: tuple[jax.Array, ...],
    result: tuple[int, ...],
    products: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel; ``result`` is the shape of attention's, ``products`` how many it makes of all scores' size."""
    batch, tokens, heads, channels = result
    scores = batch * heads * (pl.cdiv(tokens, _BLOCK) * _BLOCK) ** 2
    return call(
        program,
        name,
        f"{tokens}x{heads}x{channels}",
        grid,
        shapes,
        operands,
        flops=2 * products * scores * channels,
        transcendentals=scores * (1 if products == 2 else 3),
        interpret=interpret,
    )
