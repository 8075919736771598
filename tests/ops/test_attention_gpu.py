"""The GPU's attention kernels, interpreted on CPU, against float64 head by head; mapped and sharded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations import compiled_gradients

from lbpwht_jax import Residuals
from lbpwht_jax.ops.attention import attention, packed_attention
from lbpwht_jax.ops.attention_gpu import backward_kernel, forward_kernel

# batch, tokens, heads, head_dim: less than a block of 64 tokens; two blocks; channels that are no power of two
SHAPES = [(2, 5, 2, 16), (1, 70, 1, 32), (1, 65, 2, 24)]


def sample(shape):
    batch, tokens, heads, channels = shape
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(batch, tokens, 3, heads, channels))
    codes = rng.integers(0, 255, qkv.shape, np.uint8)
    steps = rng.uniform(0.01, 0.02, (*qkv.shape[:-1], 1))
    return qkv, codes, steps, rng.normal(size=shape)


def decoded(codes, steps):
    return (np.asarray(codes, np.float64) - 127) * np.asarray(np.float32(steps), np.float64)


def parts(packed):
    return [packed[:, :, part] for part in range(3)]


def slow(qkv, g=None):
    """Attention of each image and head; the cotangents of queries, keys and values as well, where the result's is given."""
    result, dx = np.zeros(qkv[:, :, 0].shape), np.zeros(qkv.shape)
    for image in range(len(qkv)):
        for head in range(qkv.shape[3]):
            query, key, value = (qkv[image, :, part, head] for part in range(3))
            scale = query.shape[-1] ** -0.5
            weights = np.exp(query @ key.T * scale)
            weights /= weights.sum(1, keepdims=True)
            result[image, :, head] = weights @ value
            if g is not None:
                of_weights = g[image, :, head] @ value.T
                of_scores = weights * (of_weights - (weights * of_weights).sum(1, keepdims=True))
                parts = of_scores @ key * scale, of_scores.T @ query * scale, weights.T @ g[image, :, head]
                for part, cotangent in enumerate(parts):
                    dx[image, :, part, head] = cotangent
    return result, dx


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_slow_reference(shape):
    qkv, *_ = sample(shape)
    result, *kept = forward_kernel(interpret=True)(jnp.asarray(qkv, jnp.float32))
    # float32 sums of up to 70 terms
    np.testing.assert_allclose(result, slow(qkv)[0], rtol=0, atol=3e-6)
    for part, (codes, steps) in enumerate(zip(kept[:3], kept[3:], strict=True)):
        largest = np.abs(np.float32(qkv[:, :, part])).max(-1, keepdims=True)
        np.testing.assert_allclose(steps, largest / 127, rtol=1e-6)
        chex.assert_type(codes, jnp.uint8)
        # half a step, and float32 rounding
        assert np.all(np.abs(decoded(codes, steps) - qkv[:, :, part]) < np.asarray(steps) * 0.50001)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_slow_reference(shape):
    _, codes, steps, g = sample(shape)
    (dx,) = backward_kernel(interpret=True)(*parts(codes), *parts(jnp.asarray(steps, jnp.float32)), jnp.asarray(g, jnp.float32))
    expected = slow(decoded(codes, steps), g)[1]
    np.testing.assert_allclose(dx, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("axes", [P("data"), P(None, None, "data")], ids=["batch", "heads"])
def test_sharded_along_batch_or_heads_nothing_is_gathered(axes):
    qkv, codes, steps, g = sample((4, 5, 4, 16))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    packed = P(*axes[:2], None, *axes[2:])

    def put(array, dtype, axes=axes):
        return jax.device_put(jnp.asarray(array, dtype), NamedSharding(mesh, axes))

    forward, backward = jax.jit(forward_kernel(interpret=True)), jax.jit(backward_kernel(interpret=True))
    operands = [put(part, dtype) for array, dtype in ((codes, jnp.uint8), (steps, jnp.float32)) for part in parts(array)]
    operands.append(put(g, jnp.float32))
    for program, arguments in ((forward, [put(qkv, jnp.float32, packed)]), (backward, operands)):
        assert "all-gather" not in program.lower(*arguments).compile().as_text()
    result = forward(put(qkv, jnp.float32, packed))[0]
    assert result.sharding.is_equivalent_to(NamedSharding(mesh, axes), result.ndim)
    np.testing.assert_allclose(result, slow(qkv)[0], rtol=0, atol=3e-6)
    expected = slow(decoded(codes, steps), g)[1]
    np.testing.assert_allclose(backward(*operands)[0], expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_vmap():
    qkv = jnp.asarray(sample((4, 5, 2, 16))[0], jnp.float32)
    mapped = jax.vmap(forward_kernel(interpret=True))(qkv.reshape(2, 2, *qkv.shape[1:]))
    flat = [array.reshape(-1, *array.shape[2:]) for array in mapped]
    chex.assert_trees_all_equal(flat, list(forward_kernel(interpret=True)(qkv)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("residuals", [None, Residuals(), Residuals(attention_bits=8), Residuals(attention_bits=4)])
def test_queries_keys_and_values_in_one_array(residuals, dtype):
    """The forward pass is exact; the cotangent is that at the rounded operands, whichever way they are kept."""
    qkv, _, _, g = sample((2, 5, 2, 16))
    qkv, g = jnp.asarray(qkv, dtype), jnp.asarray(g, dtype)
    result, cotangent = compiled_gradients(lambda qkv: packed_attention(qkv, residuals), [qkv], g)
    expected, *exact = compiled_gradients(attention, parts(qkv), g)
    chex.assert_trees_all_equal(result, expected)
    bits = None if residuals is None else residuals.attention_bits
    most = {4: 0.015, 8: 6e-5, None: 1e-6}[bits]  # rounding to 15 or 255 levels, and to bfloat16's 8 bits
    actual, wanted = (np.asarray(a, np.float64).ravel() for a in (cotangent, jnp.stack(exact, 2)))
    cosine = actual @ wanted / np.linalg.norm(actual) / np.linalg.norm(wanted)
    assert 1 - cosine < most


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_keeps_codes_by_its_kernels():
    lean = Residuals(slope_bits=8, norm_bits=8, attention_bits=8)
    qkv = jax.ShapeDtypeStruct((2, 5, 3, 2, 16), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda qkv: packed_attention(qkv, lean).astype(jnp.float32).sum()))
    program = gradient.trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_forward_5x2x16" in program and "attention_backward_5x2x16" in program
    assert "stablehlo.dot_general" not in program
