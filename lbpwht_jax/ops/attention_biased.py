"""Attention with a bias for every head and pair of tokens, over windows or whole maps, in the form that suits the machine."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.ops import attention_biased_gpu
from lbpwht_jax.ops.attention import attend, heads_first, kept_attention, takes_heads_first
from lbpwht_jax.ops.attention_biased_gpu import BITS
from lbpwht_jax.ops.attention_head_gpu import LEAST_SQUARE, Form, Others
from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.platforms import apart, by_platform
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.sharding import explicit_sharding, vary_alike


def biased_attention(query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array) -> jax.Array:
    """Scaled dot-product attention, head by head, with biases added to the scores.

    Args:
      query: ``[..., queries, heads, head_dim]``.
      key: ``[..., keys, heads, head_dim]``.
      value: ``[..., keys, heads, channels]``.
      *biases: each has as many axes as ``[..., queries, keys, heads]`` and is broadcast to it.

    Returns:
      ``[..., queries, heads, channels]``.
    """
    if takes_heads_first(query):
        return heads_first(query * query.shape[-1] ** -0.5, key, value, *(jnp.moveaxis(bias, -1, -3) for bias in biases))
    logits = jnp.einsum("...qhc,...khc->...qkh", query, key) * query.shape[-1] ** -0.5
    for bias in biases:
        logits = logits + bias.astype(logits.dtype)
    weights = jax.nn.softmax(logits.astype(accumulation_dtype(logits.dtype)), axis=-2).astype(logits.dtype)
    return jnp.einsum("...qkh,...khc->...qhc", weights, value)


def cosine_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: jax.Array, *biases: jax.Array) -> jax.Array:
    """Attention whose scores are cosines times a factor per head (Liu et al., 2022, equation 2), with biases added to them.

    A query or key of zeros has cosines of zero, with gradients of zero.

    Args:
      query: ``[batch, windows, tokens, heads, head_dim]``.
      key: the same shape.
      value: ``[batch, windows, tokens, heads, channels]``.
      scale: ``[heads]``.
      *biases: each is broadcast to ``[windows, heads, tokens, tokens]``, and has as many axes.

    Returns:
      ``[batch, windows, tokens, heads, channels]``, of the values' dtype.
    """
    by_heads = takes_heads_first(value)
    if by_heads:  # before they are normalised, which is then a pass over what the products read
        query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    query = _normalize(query)
    scale = scale.reshape(1, 1, -1, 1, 1) if by_heads else scale.reshape(1, 1, 1, -1, 1)
    query = (query * scale.astype(query.dtype)).astype(value.dtype)
    key = _normalize(key).astype(value.dtype)
    if by_heads:
        return jnp.swapaxes(attend(query, key, value, *biases), -3, -2)
    attention = functools.partial(jax.nn.dot_product_attention, scale=1.0)
    return jax.vmap(attention, in_axes=(0, 0, 0, None))(query, key, value, sum(biases[1:], biases[0]))


def _normalize(x: jax.Array) -> jax.Array:
    """``x`` over its length along the last axis, in at least float32; below a length of 1e-12 zero, with a gradient of zero.

    The keys of padding are zero vectors. Dividing by a small constant there, as is common, multiplies their cotangent by its
    inverse: harmless to exact backprop, which drops it, but a low-rank projection would spread it over the window.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    positive = square > LEAST_SQUARE
    return jnp.where(positive, x * lax.rsqrt(jnp.where(positive, square, 1)), 0)


def packed_biased_attention(
    qkv: jax.Array,
    bias: jax.Array,
    residuals: Residuals | None,
    *,
    key_dim: int,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    mask: np.ndarray | None = None,
) -> jax.Array:
    """Attention with biases of queries, keys and values in one array, keeping for the backward pass what the setting says.

    It is ``softmax(q k^T / sqrt(key_dim) + bias + mask) v`` or, with a scale, ``softmax(scale cos(q, k) + bias + mask) v``.
    On NVIDIA GPUs, with 8 bits, narrow dtypes and up to 64 tokens, it is a kernel that reads that array as it is and writes the
    codes in passing, and one that makes all cotangents from the codes.

    Args:
      qkv: ``[batch, windows, tokens, groups, heads, channels]``, floating point. Either there are three groups of ``key_dim``
        channels, queries, keys and values; or one, in which a head's first ``key_dim`` channels are its queries, the next its
        keys and all others its values.
      bias: ``[heads, tokens, tokens]``, queries by keys.
      residuals: the setting; ``None`` for what JAX keeps of itself.
      key_dim: channels of a head's queries and of its keys.
      scale: ``[heads]``, for cosine attention.
      offset: ``[groups, heads, channels]``, of qkv's dtype, added to qkv first.
      mask: ``[windows, tokens, tokens]``, a constant, added to the scores; kernels take it in qkv's dtype.

    Returns:
      ``[batch, windows, tokens, heads, channels]`` with the values' channels, of qkv's dtype.

    Raises:
      ValueError: when tracing, if the shapes do not fit.
    """
    _check(qkv, key_dim, bias=bias, scale=scale, offset=offset, mask=mask)
    coded = residuals is not None and residuals.attention_bits == BITS and explicit_sharding(qkv) is None
    form = Form(key_dim, qkv.shape[3], scale is not None, offset is not None, mask is not None)
    if coded and attention_biased_gpu.takes(qkv, form):
        wide = None if scale is None else scale.astype(jnp.float32)
        constant = None if mask is None else jnp.asarray(mask, qkv.dtype)
        leaves, tree = jax.tree.flatten((qkv, Others(bias.astype(jnp.float32), wide, offset, constant)))
        return _coded(form, *jax.tree.unflatten(tree, vary_alike(*leaves)))
    parts = _parts(_with_offset(qkv, offset), key_dim)
    if scale is None:
        return kept_attention(biased_attention, residuals, parts, *_heads_last(bias, mask))
    return kept_attention(cosine_attention, residuals, parts, scale, *_heads_in_front(bias, mask))


def _check(qkv: jax.Array, key_dim: int, **others: Any) -> None:
    if qkv.ndim != 6 or qkv.shape[3] not in (1, 3):
        raise ValueError(
            "packed_biased_attention: qkv must be [batch, windows, tokens, 1 or 3 groups, heads, channels], "
            f"got {list(qkv.shape)}"
        )
    _, windows, tokens, groups, heads, channels = qkv.shape
    if key_dim < 1 or (channels != key_dim if groups == 3 else channels <= 2 * key_dim):
        wanted = "as many channels as qkv" if groups == 3 else "less than half of qkv's channels"
        raise ValueError(f"packed_biased_attention: key_dim must be {wanted}, {channels}, got {key_dim}")
    shapes = {
        "bias": (heads, tokens, tokens),
        "scale": (heads,),
        "offset": (groups, heads, channels),
        "mask": (windows, tokens, tokens),
    }
    for name, array in others.items():
        if array is not None and array.shape != shapes[name]:
            wanted, given = list(shapes[name]), list(array.shape)
            raise ValueError(f"packed_biased_attention: for qkv {list(qkv.shape)} {name} must be {wanted}, got {given}")


def _parts(qkv: jax.Array, key_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, each ``[batch, windows, tokens, heads, channels]``."""
    query, key, value = jnp.moveaxis(qkv, 3, 0) if qkv.shape[3] == 3 else jnp.split(qkv[:, :, :, 0], [key_dim, 2 * key_dim], -1)
    return query, key, value


def _heads_last(bias: jax.Array, mask: Any) -> list[jax.Array]:
    biases = [jnp.moveaxis(bias, 0, -1)[None, None]]
    return biases if mask is None else [*biases, jnp.asarray(mask, bias.dtype)[None, ..., None]]


def _heads_in_front(bias: jax.Array, mask: Any) -> list[jax.Array]:
    return [bias[None]] if mask is None else [bias[None], jnp.asarray(mask, bias.dtype)[:, None]]


def _with_offset(qkv: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Their sum, over all channels as one axis, in which XLA fuses it with the product in front."""
    if offset is None:
        return qkv
    return (qkv.reshape(*qkv.shape[:3], -1) + offset.reshape(1, 1, 1, -1)).reshape(qkv.shape)


def _plain(parts: Sequence[jax.Array], others: Others) -> jax.Array:
    query, key, value = parts
    bias, scale, _, mask = others
    if scale is None:
        return biased_attention(query, key, value, *_heads_last(bias, mask))
    return cosine_attention(query, key, value, scale, *_heads_in_front(bias, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _coded(form: Form, qkv: jax.Array, others: Others) -> jax.Array:
    def plain(qkv: jax.Array, others: Others) -> jax.Array:
        return _plain(_parts(_with_offset(qkv, others.offset), form.key_dim), others)

    def with_kernel(qkv: jax.Array, others: Others) -> jax.Array:
        return attention_biased_gpu.forward_kernel(form)(qkv, *others.given())[0]

    return by_platform(plain, qkv, others, cuda=with_kernel)


def _coded_forward(form: Form, qkv: jax.Array, others: Others) -> tuple[jax.Array, tuple[list[Rows], Others]]:
    def plain(qkv: jax.Array, others: Others) -> tuple[jax.Array, list[Rows]]:
        parts = _parts(_with_offset(qkv, others.offset), form.key_dim)
        kept, parts = apart(([Rows.of(part, BITS) for part in parts], parts))
        return _plain(parts, others), kept

    def with_kernel(qkv: jax.Array, others: Others) -> tuple[jax.Array, list[Rows]]:
        result, *kept = attention_biased_gpu.forward_kernel(form)(qkv, *others.given())
        pairs = zip(kept[:3], kept[3:], strict=True)
        return result, [Rows(codes, steps, BITS, codes.shape[-1], qkv.dtype) for codes, steps in pairs]

    result, kept = by_platform(plain, qkv, others, cuda=with_kernel)
    return result, (kept, others)


def _coded_backward(form: Form, saved: tuple[list[Rows], Others], g: jax.Array) -> tuple[jax.Array, Others]:
    def plain(kept: list[Rows], others: Others, g: jax.Array) -> tuple[jax.Array, Others]:
        kept, others, g = apart((kept, others, g))

        def of(parts: list[jax.Array], bias: jax.Array, scale: jax.Array | None) -> jax.Array:
            return _plain(parts, others._replace(bias=bias, scale=scale))

        pullback = jax.vjp(of, [rows.decoded() for rows in kept], others.bias, others.scale)[1]
        parts, bias, scale = pullback(g)
        packed = jnp.stack(parts, 3) if form.groups == 3 else jnp.concatenate(parts, -1)[:, :, :, None]
        offset = None if others.offset is None else packed.sum((0, 1, 2))
        return packed, Others(bias, scale, offset, None)

    def with_kernel(kept: list[Rows], others: Others, g: jax.Array) -> tuple[jax.Array, Others]:
        operands = [rows.codes for rows in kept] + [rows.steps for rows in kept]
        run = attention_biased_gpu.backward_kernel(form)
        packed, *sums = run(*operands, g, *others._replace(offset=None).given())
        of_others = dataclasses.replace(form, mask=False).others([array.sum((0, 1)) for array in sums])
        return packed, jax.tree.map(lambda total, x: total.astype(x.dtype), of_others, others._replace(mask=None))

    return by_platform(plain, *saved, g, cuda=with_kernel)


_coded.defvjp(_coded_forward, _coded_backward)
