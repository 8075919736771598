"""Attention with biases for NVIDIA GPUs, of few tokens, as Pallas kernels that keep queries, keys and values in 8 bits.

All keys of a window fit in one block, so that its scores stay in registers, forward and backward: each array is read and
written once, where it lies. A program goes over some windows of one image, for one head, and adds up what the cotangents of
bias, scale and offset get from them. The backward pass is that of FlashAttention (Dao et al., 2022, algorithm 4), with one
block.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.attention_head_gpu import PARTS, Form, Head, Others, Scores, filled, load, splits, store
from lbpwht_jax.ops.coders import coded_rows, has_row_steps, middle
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import call, like, row_bytes
from lbpwht_jax.ops.platforms import is_narrow

BITS = 8
_MOST_TOKENS = 64
_MOST_CHANNELS = 128


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


def _forward(form: Form, qkv: jax.Array, given: tuple[jax.Array, ...], interpret: bool) -> tuple[jax.Array, ...]:
    *rows, _, heads, packed = qkv.shape
    windows, tokens = rows[1:]
    channels = form.channels(packed)

    def program(qkv_ref, *refs):
        others = form.others(refs)
        out_ref, *kept_refs = refs[len(given) :]
        head = Head(windows, tokens, heads)
        scores = Scores(form, head, others)

        def read(part, window):
            group, first = form.place(part)
            loaded = load(head.part(qkv_ref, window, channels[part], group, first=first))
            if others.offset is None:
                return loaded
            offset = load(head.offset(others.offset, channels[part], group, first=first))
            return (loaded.astype(jnp.float32) + offset.astype(jnp.float32)[None, :]).astype(loaded.dtype)

        def one(window, _):
            parts = [read(part, window) for part in range(PARTS)]
            for part, (narrow, count) in enumerate(zip(parts, channels, strict=True)):
                [codes], steps = row_bytes([narrow.astype(jnp.float32)])
                store(head.part(kept_refs[part], window, count), codes)
                store(head.steps(kept_refs[PARTS + part], window), steps)
            query, key = (scores.unit(narrow.astype(jnp.float32))[0].astype(qkv.dtype) for narrow in parts[:2])
            _, weights, total = scores.weights(query, key, window)
            result = plgpu.dot(weights.astype(qkv.dtype), parts[2]) / total
            store(head.part(out_ref, window, channels[2]), result)

        lax.fori_loop(head.first, head.end, one, None)

    codes = [like(qkv, (*rows, heads, count), jnp.uint8) for count in channels]
    steps = [like(qkv, (*rows, heads, 1), jnp.float32)] * PARTS
    shapes = [like(qkv, codes[2].shape, qkv.dtype), *codes, *steps]
    products = channels[0] + channels[2]
    return _call(form, program, "forward", shapes, (qkv, *given), shapes[0].shape, products, interpret)


def _backward(form: Form, operands: tuple[jax.Array, ...], interpret: bool) -> tuple[jax.Array, ...]:
    g = operands[2 * PARTS]
    batch, windows, tokens, heads, _ = g.shape
    channels = tuple(codes.shape[-1] for codes in operands[:PARTS])
    packed = channels[2] if form.groups == PARTS else sum(channels)

    def program(*refs):
        kept_refs, g_ref = refs[: 2 * PARTS], refs[2 * PARTS]
        results = refs[len(operands) :]
        dx_ref, bias_ref = results[:2]
        head = Head(windows, tokens, heads)
        scores = Scores(form, head, dataclasses.replace(form, offset=False).others(refs[2 * PARTS + 1 :]))

        def read(part, window):
            # codes that there are not stand for zero
            codes = load(head.part(kept_refs[part], window, channels[part]), other=middle(BITS))
            return coded_rows(codes, load(head.steps(kept_refs[PARTS + part], window)), BITS).astype(g.dtype)

        def one(window, carry):
            of_bias, of_scale, of_offset = carry
            value, of_result = read(2, window), load(head.part(g_ref, window, channels[2]))
            units, inverses = zip(*(scores.unit(read(part, window).astype(jnp.float32)) for part in range(2)), strict=True)
            query, key = (unit.astype(g.dtype) for unit in units)
            products, weights, total = scores.weights(query, key, window)
            weights = weights / total
            of_weights = plgpu.dot(of_result, value, trans_b=True)
            of_scores = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
            narrow = of_scores.astype(g.dtype)
            of_units = plgpu.dot(narrow, key) * scores.factor, plgpu.dot(narrow, query, trans_a=True) * scores.factor
            of_parts = [scores.of_rows(*operands) for operands in zip(units, inverses, of_units, strict=True)]
            of_parts.append(plgpu.dot(weights.astype(g.dtype), of_result, trans_a=True))
            for part, of_part in enumerate(of_parts):
                group, first = form.place(part)
                store(head.part(dx_ref, window, channels[part], group, first=first), of_part)
            if form.cosine:
                of_scale += jnp.sum(of_scores * products, axis=1)
            if form.offset:
                of_offset = [total + jnp.sum(of_part, axis=0) for total, of_part in zip(of_offset, of_parts, strict=True)]
            return of_bias + of_scores, of_scale, of_offset

        start = jnp.zeros((head.block, head.block)), jnp.zeros(head.block), [jnp.zeros(filled(count)) for count in channels]
        of_bias, of_scale, of_offset = lax.fori_loop(head.first, head.end, one, start)
        where = head.image, head.split
        store(head.scores(bias_ref, *where, head.head), of_bias)
        if form.cosine:
            plgpu.store(results[2].at[(*where, head.head)], jnp.sum(of_scale))
        if form.offset:
            for part, of_part in enumerate(of_offset):
                group, first = form.place(part)
                store(head.offset(results[-1], channels[part], *where, group, first=first), of_part)

    sums = [(heads, tokens, tokens), *([(heads,)] if form.cosine else [])]
    sums += [(form.groups, heads, packed)] if form.offset else []
    parts = batch, splits(windows)
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
    scores = batch * windows * heads * filled(tokens) ** 2
    return call(
        program,
        f"{'cosine' if form.cosine else 'biased'}_attention_{name}",
        f"{windows}x{tokens}x{heads}x{channels}",
        (batch * splits(windows) * heads,),
        shapes,
        operands,
        flops=2 * products * scores,
        transcendentals=scores,
        interpret=interpret,
    )
