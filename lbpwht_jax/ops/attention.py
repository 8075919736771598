"""Attention in the form that suits the machine."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.ops import attention_gpu
from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.platforms import apart, by_platform, is_narrow, row_major
from lbpwht_jax.ops.recompute import recomputed
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.sharding import explicit_sharding

# cuDNN's attention gets its tokens padded to a multiple of this, and their number.
_CUDNN_TOKENS = 64


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention, ``softmax(q k^T / sqrt(head_dim)) v`` (Vaswani et al., 2017, equation 1), head by head.

    On NVIDIA GPUs it is cuDNN's fused attention, which keeps no scores, for bfloat16 and float16 where JAX finds cuDNN when
    tracing and takes the shapes; otherwise, and on all other platforms, products and a softmax.

    Args:
      query: ``[batch, tokens, heads, head_dim]``, floating point.
      key: the same shape and dtype.
      value: the same shape and dtype.

    Returns:
      ``[batch, tokens, heads, head_dim]``, of the values' dtype; the softmax is taken in at least float32.

    Raises:
      ValueError: when tracing, if shapes or dtypes differ, or the arrays do not have four axes.
    """
    if query.ndim != 4 or not query.shape == key.shape == value.shape or not query.dtype == key.dtype == value.dtype:
        given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in (query, key, value))
        raise ValueError(f"attention: query, key and value must be [batch, tokens, heads, head_dim] of one dtype, got {given}")
    if takes_heads_first(query):
        return heads_first(query * query.shape[-1] ** -0.5, key, value)
    if explicit_sharding(query) is not None:
        return _plain(query, key, value)
    if _cudnn_takes(query.shape, query.dtype):
        return by_platform(_plain, query, key, value, cuda=_cudnn)
    return _plain(query, key, value)


def takes_heads_first(query: jax.Array) -> bool:
    """Whether ``heads_first`` is the form for such queries.

    It is for wider dtypes alone, and not by platform: JAX would keep what every platform's form needs for its backward pass.
    """
    return not is_narrow(query.dtype) and explicit_sharding(query) is None


def heads_first(query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array) -> jax.Array:
    """``softmax(q k^T + biases) v`` by ``attend``: XLA's CPU backend is slower where heads are an inner axis.

    Args:
      query: ``[..., queries, heads, head_dim]``, scaled.
      key: ``[..., keys, heads, head_dim]``.
      value: ``[..., keys, heads, channels]``.
      *biases: as ``attend`` takes them.

    Returns:
      ``[..., queries, heads, channels]``, of the values' dtype.
    """
    query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    return jnp.swapaxes(attend(query, key, value, *biases), -3, -2)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array) -> jax.Array:
    """``softmax(q k^T + biases) v`` with heads beside the batch, which are one axis: so XLA's CPU backend fuses best.

    Args:
      query: ``[..., heads, queries, head_dim]``, scaled.
      key: ``[..., heads, keys, head_dim]``.
      value: ``[..., heads, keys, channels]``.
      *biases: each is broadcast to ``[..., heads, queries, keys]``. What is added in parts gets its gradients in parts: summed
        at once, and not at all for constants.

    Returns:
      ``[..., heads, queries, channels]``, of the values' dtype; the softmax is taken in at least float32.
    """
    shape = *query.shape[:-1], key.shape[-2]
    query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    each = ((0,), (0,))
    logits = lax.dot_general(query, key, (((2,), (2,)), each))
    logits = logits.astype(accumulation_dtype(logits.dtype))
    for bias in biases:
        logits = logits + jnp.broadcast_to(bias, shape).reshape(logits.shape).astype(logits.dtype)
    weights = softmax(logits).astype(value.dtype)
    return lax.dot_general(weights, value, (((2,), (1,)), each)).reshape(*shape[:-1], -1)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Softmax along the last axis, in x's dtype.

    It has one factor per row, so that XLA's CPU backend fuses it with the products around it. For the backward pass it keeps
    its result alone, where ``jax.nn.softmax`` keeps two such arrays.
    """
    exponentials = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    return exponentials * (1 / jnp.sum(exponentials, -1, keepdims=True))


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights = softmax(*primals)
    [tangent] = tangents
    return weights, weights * (tangent - jnp.sum(weights * tangent, -1, keepdims=True))


def kept_attention(
    function: Callable[..., jax.Array], residuals: Residuals | None, operands: Sequence[jax.Array], *others: jax.Array
) -> jax.Array:
    """``function(*operands, *others)``, keeping for the backward pass what the setting says.

    Args:
      function: attention, a pure function of arrays; hashable.
      residuals: the setting; ``None`` for what JAX keeps of itself.
      operands: queries, keys and values, ``[batch, ..., channels]``.
      *others: what is small, such as tables of biases, and kept whole.

    Returns:
      What ``function`` returns.
    """
    if residuals is None or not residuals.recompute_scores:
        return function(*operands, *others)
    bits = (residuals.attention_bits,) * len(operands) + (None,) * len(others)
    return recomputed(function, *operands, *others, bits=bits)


def packed_attention(qkv: jax.Array, residuals: Residuals | None) -> jax.Array:
    """``attention`` of queries, keys and values in one array, keeping for the backward pass what the setting says.

    On NVIDIA GPUs, with 8 bits and narrow dtypes, it is a kernel that reads that array as it is and writes the codes in
    passing, and one that makes all three cotangents from the codes.

    Args:
      qkv: ``[batch, tokens, 3, heads, head_dim]``, floating point.
      residuals: the setting; ``None`` for what JAX keeps of itself.

    Returns:
      ``[batch, tokens, heads, head_dim]``.
    """
    coded = residuals is not None and residuals.attention_bits == attention_gpu.BITS
    if coded and explicit_sharding(qkv) is None and attention_gpu.takes(qkv.dtype, qkv.shape[-1]):
        return _coded(qkv)
    return kept_attention(attention, residuals, _parts(qkv))


def _parts(qkv: jax.Array) -> tuple[jax.Array, ...]:
    if takes_heads_first(qkv):  # channels as one axis: joining cotangents along it is the least work on a CPU
        batch, tokens, parts, heads, _ = qkv.shape
        return tuple(x.reshape(batch, tokens, heads, -1) for x in jnp.split(qkv.reshape(batch, tokens, -1), parts, -1))
    return tuple(jnp.moveaxis(qkv, 2, 0))


_Kept = tuple[list[jax.Array], list[jax.Array]]  # codes and steps of queries, keys and values


@jax.custom_vjp
def _coded(qkv: jax.Array) -> jax.Array:
    return attention(*_parts(qkv))


def _coded_forward(qkv: jax.Array) -> tuple[jax.Array, _Kept]:
    def plain(qkv: jax.Array) -> tuple[jax.Array, _Kept]:
        rows, parts = apart(([Rows.of(part, attention_gpu.BITS) for part in _parts(qkv)], _parts(qkv)))
        kept, parts = apart((_in_rows([r.codes for r in rows], [r.steps for r in rows]), parts))
        return attention(*parts), kept

    def with_kernel(qkv: jax.Array) -> tuple[jax.Array, _Kept]:
        result, *kept = attention_gpu.forward_kernel()(qkv)
        return result, _in_rows(kept[:3], kept[3:])

    return by_platform(plain, qkv, cuda=with_kernel)


def _coded_backward(kept: _Kept, g: jax.Array) -> tuple[jax.Array]:
    def by_heads(codes: list[jax.Array], steps: list[jax.Array]) -> _Kept:
        return [c.reshape(g.shape) for c in codes], [s.reshape(*g.shape[:3], 1) for s in steps]

    def plain(codes: list[jax.Array], steps: list[jax.Array], g: jax.Array) -> tuple[jax.Array]:
        kept, g = apart(((codes, steps), g))
        kept, g = apart((by_heads(*kept), g))
        rows = [Rows(c, s, attention_gpu.BITS, g.shape[-1], g.dtype) for c, s in zip(*kept, strict=True)]
        return (jnp.stack(jax.vjp(attention, *(r.decoded() for r in rows))[1](g), axis=2),)

    def with_kernel(codes: list[jax.Array], steps: list[jax.Array], g: jax.Array) -> tuple[jax.Array, ...]:
        codes, steps = by_heads(codes, steps)
        return attention_gpu.backward_kernel()(*codes, *steps, g)

    return by_platform(plain, *kept, g, cuda=with_kernel)


def _in_rows(codes: list[jax.Array], steps: list[jax.Array]) -> _Kept:
    """Codes and steps as they are kept: the heads' channels, and the steps of an image, as one axis.

    TPUs are told so. Attention has tokens along the lanes there, where 197 of them lie as 256.
    """
    batch, tokens, heads, head_dim = codes[0].shape
    in_rows = [row_major(c.reshape(batch, tokens, heads * head_dim)) for c in codes]
    return in_rows, [row_major(s.reshape(batch, tokens * heads)) for s in steps]


_coded.defvjp(_coded_forward, _coded_backward)


def _plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    weights = jax.nn.softmax(logits.astype(accumulation_dtype(logits.dtype))).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    batch, tokens = query.shape[:2]
    missing = -tokens % _CUDNN_TOKENS
    if not missing:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    padded = [jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) for array in (query, key, value)]
    lengths: Any = jnp.full(batch, tokens, jnp.int32)
    result = jax.nn.dot_product_attention(
        *padded, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return result[:, :tokens]


@functools.cache
def _cudnn_takes(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether JAX finds cuDNN, and cuDNN takes such arrays: JAX raises these errors when tracing if not."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(_cudnn, array, array, array)
    except (RuntimeError, NotImplementedError):
        return False
    return True
