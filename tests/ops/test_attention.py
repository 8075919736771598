import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lbpwht_jax.ops.attention import _cudnn_takes, attend, attention, softmax


def sample(dtype, shape=(3, 17, 4, 8)):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]


def slow(query, key, value):
    """Image by image, head by head, in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    result = np.zeros(value.shape)
    for image in range(len(query)):
        for head in range(query.shape[2]):
            scores = np.exp(query[image, :, head] @ key[image, :, head].T / np.sqrt(query.shape[-1]))
            result[image, :, head] = scores / scores.sum(1, keepdims=True) @ value[image, :, head]
    return result


# rounding of float32 sums of 17 terms; of bfloat16 weights
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_equals_the_slow_reference(dtype, tolerance):
    operands = sample(dtype)
    result = jax.jit(attention)(*operands)
    assert result.dtype == dtype
    np.testing.assert_allclose(np.asarray(result, np.float64), slow(*operands), rtol=0, atol=tolerance)


def test_float64_is_kept():
    with jax.enable_x64(True):
        operands = sample(jnp.float64)
        np.testing.assert_allclose(attention(*operands), slow(*operands), rtol=0, atol=1e-14)


def test_gradients():
    # central differences of float32 values of order 1
    check_grads(attention, sample(jnp.float32, (1, 5, 2, 4)), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_the_scores_of_one_form_alone(dtype):
    """The weights, in float32 for the softmax and in the values' dtype for the product; queries, keys and values."""
    operands = sample(dtype)
    if dtype == jnp.bfloat16 and _cudnn_takes(operands[0].shape, operands[0].dtype):
        pytest.skip("JAX finds cuDNN, whose form is kept beside the other where a program is traced for any platform")
    kept = jax.tree.leaves(jax.eval_shape(lambda *operands: jax.vjp(attention, *operands)[1], *operands))
    scores = [array for array in kept if array.size == 3 * 4 * 17 * 17]
    assert len(scores) <= 2
    assert sum(array.size for array in kept) < 2 * 3 * 4 * 17 * 17 + 4 * operands[0].size


def test_vmap():
    operands = sample(jnp.float32)
    mapped = jax.vmap(attention)(*(array[:, None] for array in operands))
    chex.assert_trees_all_close(mapped[:, 0], attention(*operands), atol=1e-6)


@pytest.mark.parametrize("shapes", [[], [(4, 17, 17)], [(4, 17, 17), (3, 1, 17, 17)]], ids=["none", "one", "two"])
def test_biases_are_added_to_the_scores(shapes):
    """Values and all gradients against JAX's attention, which takes one bias; float32 sums of 17 and of 51 terms."""
    rng = np.random.default_rng(1)
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in sample(jnp.float32))
    biases = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def reference(query, key, value, *biases):
        total = sum(jnp.broadcast_to(bias, (3, 4, 17, 17)) for bias in biases) if biases else None
        operands = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
        return jnp.swapaxes(jax.nn.dot_product_attention(*operands, total, scale=1.0), 1, 2)

    results = [jax.vjp(function, query, key, value, *biases) for function in (attend, reference)]
    chex.assert_trees_all_close(results[0][0], results[1][0], atol=2e-6)
    chex.assert_trees_all_close(*(pullback(jnp.cos(result)) for result, pullback in results), atol=2e-5)


def test_softmax_in_both_modes():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 7)), jnp.float32)
    chex.assert_trees_all_close(softmax(x), jax.nn.softmax(x), atol=1e-6)
    # central differences of float32 values below 1
    check_grads(softmax, (x,), order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)


def test_softmax_of_large_equal_and_left_out_scores():
    x = jnp.asarray([[1e30, 0, -1e30], [3, 3, 3], [0, -np.inf, 0]], jnp.float32)
    np.testing.assert_allclose(softmax(x), [[1, 0, 0], [1 / 3] * 3, [0.5, 0, 0.5]], atol=1e-7)
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: softmax(x)[:, 0].sum())(x)))


@pytest.mark.parametrize(
    "arguments",
    [
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q, k[:, 1:], v),
        lambda q, k, v: (q, k, v.astype(jnp.bfloat16)),
    ],
    ids=["three axes", "shapes", "dtypes"],
)
def test_operands_that_do_not_fit_are_an_error(arguments):
    with pytest.raises(ValueError, match=r"must be \[batch, tokens, heads, head_dim\] of one dtype, got float32"):
        attention(*arguments(*sample(jnp.float32)))


def test_a_gpu_gets_cudnn_where_jax_finds_it():
    operands = sample(jnp.bfloat16)
    try:
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), *sample(jnp.bfloat16, (1, 64, 1, 8))
        )
    except RuntimeError:
        pytest.skip("JAX does not find cuDNN here")
    check = jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")
    program = jax.export.export(jax.jit(attention), platforms=["cuda"], disabled_checks=[check])(*operands).mlir_module()
    assert "__cudnn$fmhaSoftmax" in program
    assert "tensor<3x64x4x8xbf16>" in program
