"""Attention with biases: all its forms, and the GPU's kernels, interpreted on CPU, against float64 head by head."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations import compiled_gradients

from lbpwht_jax import Residuals
from lbpwht_jax.ops.attention_biased import packed_biased_attention
from lbpwht_jax.ops.attention_biased_gpu import backward_kernel, forward_kernel
from lbpwht_jax.ops.attention_head_gpu import Form, Others
from lbpwht_jax.ops.residuals import RESIDUALS

LEAN = RESIDUALS["lean"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and which form of attention: cosine attention has a scale."""

    batch: int
    windows: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    form: Form

    @property
    def packed(self):
        channels = self.key_dim if self.form.groups == 3 else 2 * self.key_dim + self.value_dim
        return self.batch, self.windows, self.tokens, self.form.groups, self.heads, channels


def windows(batch, count, tokens, heads, channels, *, offset=True, mask=True):
    """Attention in windows, with everything it may have."""
    return Case(batch, count, tokens, heads, channels, channels, Form(channels, 3, cosine=True, offset=offset, mask=mask))


def whole_map(batch, tokens, heads, key_dim, value_dim):
    """Attention on a map, whose values are wider than its keys."""
    return Case(batch, 1, tokens, heads, key_dim, value_dim, Form(key_dim, 1, cosine=False, offset=False, mask=False))


# one window and several programs' windows; tokens that are no power of two; three heads; channels that are no power of two
CASES = {
    "windows": windows(2, 4, 16, 3, 16),
    "many windows": windows(1, 19, 9, 2, 24),
    "no mask": windows(2, 2, 64, 1, 32, mask=False),
    "no offset": windows(2, 1, 25, 2, 16, offset=False),
    "map": whole_map(2, 49, 2, 16, 40),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def standard_promotion():
    """Without it JAX's attention, which the plain form of cosine attention calls, takes no narrow dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


in_narrow_dtypes = pytest.mark.usefixtures("standard_promotion")


def sample(case):
    """Queries, keys and values in one array; bias, scale, offset and mask; the result's cotangent."""
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=case.packed)
    others = Others(
        rng.normal(size=(case.heads, case.tokens, case.tokens)),
        rng.uniform(2, 6, case.heads) if case.form.cosine else None,
        rng.normal(size=case.packed[3:]) if case.form.offset else None,
        np.where(rng.random((case.windows, case.tokens, case.tokens)) < 0.2, -100.0, 0.0) if case.form.mask else None,
    )
    return qkv, others, rng.normal(size=(*case.packed[:3], case.heads, case.value_dim))


def as_arrays(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def parts(case, qkv):
    """Queries, keys and values, each ``[batch, windows, tokens, heads, channels]``."""
    if case.form.groups == 3:
        return [qkv[:, :, :, part] for part in range(3)]
    return np.split(qkv[:, :, :, 0], [case.key_dim, 2 * case.key_dim], axis=-1)


def packed(case, three):
    return np.stack(three, 3) if case.form.groups == 3 else np.concatenate(three, -1)[:, :, :, None]


def normalised(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    inverses = np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1), 0)
    return rows * inverses, inverses


def slow(case, three, others, g):
    """Head by head in float64: the result; the cotangents of queries, keys and values; those of bias and scale."""
    result, of_parts = np.zeros(g.shape), [np.zeros(part.shape) for part in three]
    of_bias, of_scale = np.zeros(others.bias.shape), np.zeros(case.heads)
    for image, window, head in np.ndindex(case.batch, case.windows, case.heads):
        at = image, window, slice(None), head
        query, key, value = (part[at] for part in three)
        factor, lengths = case.key_dim**-0.5, (1, 1)
        if case.form.cosine:
            factor = others.scale[head]
            (query, key), lengths = zip(normalised(query), normalised(key), strict=True)
        products = query @ key.T
        scores = products * factor + others.bias[head] + (0 if others.mask is None else others.mask[window])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        result[at] = weights @ value
        of_weights = g[at] @ value.T
        of_scores = weights * (of_weights - (weights * of_weights).sum(1, keepdims=True))
        of_bias[head] += of_scores
        of_scale[head] += (of_scores * products).sum()
        cotangents = [of_scores @ key * factor, of_scores.T @ query * factor]
        for part, (rows, inverses) in enumerate(zip((query, key), lengths, strict=True)):
            if case.form.cosine:
                along = (rows * cotangents[part]).sum(1, keepdims=True)
                cotangents[part] = (cotangents[part] - rows * along) * inverses
        for part, cotangent in enumerate((*cotangents, weights.T @ g[at])):
            of_parts[part][at] = cotangent
    return result, of_parts, of_bias, of_scale


def kept(case, seed=1):
    """Codes and steps of queries, keys and values, one query and one key being zero, and what they stand for."""
    rng = np.random.default_rng(seed)
    shapes = [(*case.packed[:3], case.heads, count) for count in (case.key_dim, case.key_dim, case.value_dim)]
    codes = [rng.integers(0, 255, shape, np.uint8) for shape in shapes]
    steps = [np.float32(rng.uniform(0.01, 0.02, (*shape[:-1], 1))) for shape in shapes]
    codes[0][0, 0, 1, 0] = 127
    steps[1][0, 0, 2, 0] = 0
    return codes, steps, [decoded(*pair) for pair in zip(codes, steps, strict=True)]


def decoded(codes, steps):
    return (np.asarray(codes, np.float64) - 127) * np.asarray(steps, np.float64)


@each_case
def test_forward_kernel_equals_the_slow_reference(case):
    qkv, others, g = sample(case)
    result, *kept = forward_kernel(case.form, interpret=True)(*as_arrays([qkv, *others.given()]))
    three = parts(case, qkv if others.offset is None else qkv + others.offset)
    # float32 sums of up to 64 terms
    np.testing.assert_allclose(result, slow(case, three, others, g)[0], rtol=0, atol=5e-6)
    for part, codes, steps in zip(three, kept[:3], kept[3:], strict=True):
        np.testing.assert_allclose(steps, np.abs(part).max(-1, keepdims=True) / 127, rtol=1e-5)
        chex.assert_type(codes, jnp.uint8)
        # half a step, and float32 rounding
        assert np.all(np.abs(decoded(codes, steps) - part) < np.asarray(steps) * 0.5001)


@each_case
def test_backward_kernel_equals_the_slow_reference(case):
    _, others, g = sample(case)
    codes, steps, three = kept(case)
    given = as_arrays([*steps, g, *others._replace(offset=None).given()])
    packed_cotangent, *sums = backward_kernel(case.form, interpret=True)(*map(jnp.asarray, codes), *given)
    _, of_parts, of_bias, of_scale = slow(case, three, others, g)
    wanted = packed(case, of_parts)
    # float32 sums of up to 64 terms, over windows of up to 19 of them
    np.testing.assert_allclose(packed_cotangent, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    expected = [of_bias]
    if case.form.cosine:
        expected.append(of_scale)
        assert not np.any(packed_cotangent[0, 0, 1, 0, 0]) and not np.any(packed_cotangent[0, 0, 2, 1, 0])
    if case.form.offset:
        expected.append(wanted.sum((0, 1, 2)))
    for found, one in zip(sums, expected, strict=True):
        chex.assert_shape(found, (case.batch, -(-case.windows // 8), *one.shape))
        np.testing.assert_allclose(found.sum((0, 1)), one, rtol=0, atol=1e-5 * np.abs(one).max())


@in_narrow_dtypes
@each_case
@pytest.mark.parametrize("residuals", [None, Residuals(), LEAN, Residuals(attention_bits=4)], ids=["plain", "exact", "8", "4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_whatever_is_kept_the_result_is_exact_and_gradients_are_near(case, residuals, dtype):
    qkv, others, g = sample(case)
    offset = None if others.offset is None else jnp.asarray(others.offset, dtype)

    def attention(qkv, bias, scale, offset):
        how = {"key_dim": case.key_dim, "scale": scale, "offset": offset, "mask": others.mask}
        return packed_biased_attention(qkv, bias, residuals, **how)

    given = jnp.asarray(qkv, dtype), *as_arrays(others[:2]), offset
    result, *cotangents = compiled_gradients(attention, given, jnp.asarray(g, dtype))
    three = parts(case, qkv if offset is None else qkv + others.offset)
    wanted, of_parts, of_bias, of_scale = slow(case, three, others, g)
    chex.assert_type(result, dtype)
    narrow = dtype == jnp.bfloat16
    # float32 sums; scores of up to 6 and offsets in bfloat16's 8 bits
    np.testing.assert_allclose(np.asarray(result, np.float64), wanted, rtol=0, atol=0.1 if narrow else 5e-6)
    of_qkv = packed(case, of_parts)
    expected = [of_qkv, of_bias]
    if case.form.cosine:
        expected.append(of_scale)
    if case.form.offset:
        expected.append(of_qkv.sum((0, 1, 2)))
    bits = None if residuals is None else residuals.attention_bits
    most = {4: 0.03, 8: 2e-4, None: 1e-9}[bits] + (2e-4 if narrow else 0)  # rounding to 15 or 255 levels, and to bfloat16
    for found, one in zip(cotangents, expected, strict=True):
        found, one = np.asarray(found, np.float64).ravel(), one.ravel()
        assert 1 - found @ one / np.linalg.norm(found) / np.linalg.norm(one) < most


def operands(case, dtype=jnp.bfloat16):
    qkv, others, _ = sample(case)
    return jnp.asarray(qkv, dtype), *as_arrays(others[:2]), None if others.offset is None else jnp.asarray(others.offset, dtype)


def lean_sum(case, others):
    """A function of ``operands`` that gives a number."""

    def of(qkv, bias, scale, offset):
        how = {"key_dim": case.key_dim, "scale": scale, "offset": offset, "mask": others.mask}
        result = packed_biased_attention(qkv, bias, LEAN, **how).astype(jnp.float32)
        return jnp.sum(result * jnp.cos(jnp.arange(result.shape[-1], dtype=jnp.float32)).reshape(1, 1, 1, 1, -1))

    return of


@pytest.mark.parametrize("axes", [P("data"), P(None, None, None, "data")], ids=["batch", "heads"])
def test_kernels_sharded_along_batch_or_heads_gather_nothing(axes):
    case = windows(4, 2, 9, 4, 16)
    qkv, others, g = sample(case)
    codes, steps, three = kept(case)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def put(array, dtype=jnp.float32, axes=axes):
        return jax.device_put(jnp.asarray(array, dtype), NamedSharding(mesh, axes))

    by_head = P(axes[-1]) if len(axes) > 1 else P()
    shared = Others(by_head, by_head, P(None, *by_head), P())
    shared = Others(*(put(array, axes=own) for array, own in zip(others, shared, strict=True)))
    forward, backward = (jax.jit(kernel(case.form, interpret=True)) for kernel in (forward_kernel, backward_kernel))
    given = put(qkv, axes=P(*axes[:3], None, *axes[3:])), *shared.given()
    saved = *(put(part, jnp.uint8) for part in codes), *map(put, steps), put(g), *shared._replace(offset=None).given()
    for program, arguments in ((forward, given), (backward, saved)):
        assert "all-gather" not in program.lower(*arguments).compile().as_text()
    result = forward(*given)[0]
    assert result.sharding.is_equivalent_to(NamedSharding(mesh, axes), result.ndim)
    wanted = slow(case, parts(case, qkv + others.offset), others, g)[0]
    np.testing.assert_allclose(result, wanted, rtol=0, atol=5e-6)
    _, of_parts, of_bias, _ = slow(case, three, others, g)
    found, of_bias_found, *_ = backward(*saved)
    np.testing.assert_allclose(found, packed(case, of_parts), rtol=0, atol=1e-4)
    np.testing.assert_allclose(of_bias_found.sum((0, 1)), of_bias, rtol=0, atol=1e-5 * np.abs(of_bias).max())


def test_kernels_under_vmap():
    case = windows(4, 2, 9, 2, 16)
    qkv, others, _ = sample(case)
    qkv, *given = as_arrays([qkv, *others.given()])
    kernel = forward_kernel(case.form, interpret=True)
    mapped = jax.vmap(kernel, in_axes=(0, *(None for _ in given)))(qkv.reshape(2, 2, *qkv.shape[1:]), *given)
    flat = [array.reshape(-1, *array.shape[2:]) for array in mapped]
    chex.assert_trees_all_equal(flat, list(kernel(qkv, *given)))


@in_narrow_dtypes
@pytest.mark.parametrize("case", [windows(4, 2, 9, 2, 16), whole_map(4, 9, 2, 16, 32)], ids=["windows", "map"])
def test_under_shard_map_gradients_are_summed_over_devices(case):
    others = sample(case)[1]
    of, given = lean_sum(case, others), operands(case)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def shard(qkv, *rest):
        return jax.lax.psum(of(qkv, *rest), "i")

    whole = [None if array is None else P() for array in given[1:]]
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P("i"), *whole), out_specs=P())
    gradients = [jax.jit(jax.grad(function, argnums=(0, 1)))(*given) for function in (sharded, of)]
    for pair in zip(*gradients, strict=True):
        found, wanted = (array.astype(jnp.float32) for array in pair)
        # bfloat16's 8 bits, rounded at other places
        assert float(jnp.linalg.norm(found - wanted)) < 0.01 * float(jnp.linalg.norm(wanted))


@pytest.mark.usefixtures("absent_gpu")
@in_narrow_dtypes
@each_case
def test_a_gpu_keeps_codes_by_its_kernels(case):
    others = sample(case)[1]
    gradient = jax.jit(jax.grad(lean_sum(case, others), argnums=(0, 1)))
    program = gradient.trace(*operands(case)).lower(lowering_platforms=("cuda",)).as_text()
    name, sizes = "cosine" if case.form.cosine else "biased", f"{case.windows}x{case.tokens}x{case.heads}x{case.value_dim}"
    assert f"{name}_attention_forward_{sizes}" in program and f"{name}_attention_backward_{sizes}" in program
    assert "stablehlo.dot_general" not in program


@in_narrow_dtypes
@pytest.mark.parametrize(
    "case",
    [windows(1, 1, 65, 1, 16), windows(1, 1, 4, 1, 8), whole_map(1, 4, 1, 16, 144)],
    ids=["many tokens", "few channels", "many channels"],
)
def test_what_kernels_do_not_take_has_the_plain_form(case):
    others = sample(case)[1]
    gradient = jax.jit(jax.grad(lean_sum(case, others)))
    assert "_attention_forward" not in gradient.trace(*operands(case)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": jnp.zeros((1, 4, 3, 1, 16))},
            r"must be \[batch, windows, tokens, 1 or 3 groups, heads, channels\], got \[1",
        ),
        ({"qkv": jnp.zeros((1, 1, 4, 2, 1, 16))}, r"1 or 3 groups, heads, channels\], got \[1, 1, 4, 2, 1, 16\]"),
        ({"key_dim": 8}, "key_dim must be as many channels as qkv, 16, got 8"),
        ({"qkv": jnp.zeros((1, 1, 4, 1, 1, 16)), "key_dim": 8}, "key_dim must be less than half of qkv's channels, 16, got 8"),
        ({"bias": jnp.zeros((2, 4, 4))}, r"bias must be \[1, 4, 4\], got \[2, 4, 4\]"),
        ({"scale": jnp.zeros(3)}, r"scale must be \[1\], got \[3\]"),
        ({"offset": jnp.zeros((1, 16))}, r"offset must be \[3, 1, 16\], got \[1, 16\]"),
        ({"mask": np.zeros((2, 4, 4))}, r"mask must be \[1, 4, 4\], got \[2, 4, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(change, message):
    given = {"qkv": jnp.zeros((1, 1, 4, 3, 1, 16)), "bias": jnp.zeros((1, 4, 4)), "residuals": LEAN, "key_dim": 16}
    with pytest.raises(ValueError, match=f"packed_biased_attention: .*{message}"):
        packed_biased_attention(**{**given, **change})
