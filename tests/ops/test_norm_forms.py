"""A normalisation and GELU in front of a low-rank product: as one with it, against the same in steps; kernels and errors."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_near
from normed import running
from transformations import TRANSFORMS, compiled_gradients, gradients

from lbpwht_jax import LowRankDense, low_rank_matmul, lp_l1
from lbpwht_jax.ops.affine import apply
from lbpwht_jax.ops.matmul import Link

SPEC, GRID, HIDDEN = lp_l1(3), (7, 7), 24
NARROW = jnp.bfloat16


def sample(dtype=NARROW, batch=4):
    """x, two kernels with a bias each, the parameters of two norms, and the result's cotangent."""
    rng = np.random.default_rng(0)
    shapes = (batch, *GRID, 8), (8, HIDDEN), (HIDDEN,), (HIDDEN, 8), (8,)
    arrays = [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) == 2 else 1), dtype) for shape in shapes]
    norms = [tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for _ in range(2)) for size in (HIDDEN, 8)]
    return (*arrays, *norms), jnp.asarray(rng.normal(size=shapes[0]), dtype)


def mlp(x, kernel1, bias1, kernel2, bias2, norm1, norm2, *, joined=True, bits=8):
    link = Link() if joined else None
    h = low_rank_matmul(x, kernel1, SPEC, bias=bias1, link=link)
    before, behind = running(norm1, bits, h.dtype, "gelu"), running(norm2, bits, h.dtype)
    if not joined:
        return apply(low_rank_matmul(apply(h, before), kernel2, SPEC, bias=bias2), behind)
    return low_rank_matmul(h, kernel2, SPEC, bias=bias2, link=link, before=before, affine=behind)


def test_wide_dtypes_are_as_in_steps():
    operands, g = sample(jnp.float32)
    steps = compiled_gradients(functools.partial(mlp, joined=False, bits=None), operands, g)
    # the same sums in another order
    chex.assert_trees_all_close(compiled_gradients(functools.partial(mlp, bits=None), operands, g), steps, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.15), (8, 0.01)])
def test_wide_dtypes_keep_means_in_few_bits(bits, share):
    operands, g = sample(jnp.float32)
    exact = compiled_gradients(functools.partial(mlp, joined=False, bits=None), operands, g)
    own = compiled_gradients(functools.partial(mlp, bits=bits), operands, g)
    assert_near(own, exact, share)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_map_given_to_the_first_layer_is_left_to_the_second(bits):
    operands, g = sample(jnp.float32)

    def deferring(x, kernel1, bias1, kernel2, bias2, norm1, norm2):
        link, norm = Link(defers=True), running(norm1, bits, x.dtype, "gelu")
        h = low_rank_matmul(x, kernel1, SPEC, bias=bias1, link=link, affine=norm)
        assert (link.deferred is None) == (bits is None)
        behind = running(norm2, bits, x.dtype)
        return low_rank_matmul(h, kernel2, SPEC, bias=bias2, link=link, before=link.deferred, affine=behind)

    given = compiled_gradients(functools.partial(mlp, bits=bits), operands, g)
    # the same sums in another order
    chex.assert_trees_all_close(compiled_gradients(deferring, operands, g), given, rtol=0, atol=5e-5)


def test_no_map_is_left_to_a_layer_that_does_not_ask_for_it():
    (x, kernel1, bias1, *_, norm1, _), _ = sample(jnp.float32)
    norm, link = running(norm1, 8, x.dtype, "gelu"), Link()
    own = low_rank_matmul(x, kernel1, SPEC, bias=bias1, link=link, affine=norm)
    assert link.deferred is None
    chex.assert_trees_all_equal(own, low_rank_matmul(x, kernel1, SPEC, bias=bias1, affine=norm))


@pytest.mark.parametrize("spec", [SPEC, None], ids=["low rank", "exact"])
def test_a_map_left_behind_is_not_forgotten(spec):
    (x, kernel1, *_, norm1, _), _ = sample(jnp.float32)
    link = Link(defers=True)
    h = low_rank_matmul(x, kernel1, SPEC, link=link, affine=running(norm1, 8, x.dtype, "gelu"))
    with pytest.raises(
        ValueError, match=r"LowRankDense \(top level\): the layer in front has left .* give it before=link.deferred"
    ):
        LowRankDense(8, spec=spec).init(jax.random.key(0), h, link)


def test_narrow_dtypes_are_as_exact_steps_in_float32():
    operands, g = sample()
    wide, wide_g = jax.tree.map(lambda a: a.astype(jnp.float32), (operands, g))
    exact = compiled_gradients(functools.partial(mlp, joined=False, bits=None), wide, wide_g)
    own = compiled_gradients(mlp, operands, g)
    # bfloat16's 8 bits, and the 8 of what is kept, whose errors add up over two layers
    assert_near(own, exact, 0.02)


@pytest.mark.parametrize("frozen", range(7))
def test_frozen_operands(frozen):
    operands, g = sample()

    def of(joined, *others):
        given = list(others)
        given.insert(frozen, operands[frozen])
        return mlp(*given, joined=joined)

    others = [operand for n, operand in enumerate(operands) if n != frozen]
    own, steps = (compiled_gradients(functools.partial(of, joined), others, g) for joined in (True, False))
    assert_near(own, steps, 0.02)


@pytest.mark.parametrize("differentiated", range(7))
def test_operands_one_by_one(differentiated):
    operands, g = sample()

    def of(joined, one):
        return mlp(*operands[:differentiated], one, *operands[differentiated + 1 :], joined=joined)

    one = [operands[differentiated]]
    own, steps = (compiled_gradients(functools.partial(of, joined), one, g) for joined in (True, False))
    assert_near(own, steps, 0.02)


# bfloat16's 8 bits, rounded at other places; float32's, after which a code may turn over
@pytest.mark.parametrize(("dtype", "share"), [(NARROW, 0.02), (jnp.float32, 0.001)], ids=["narrow", "wide"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations(transform, dtype, share):
    operands, g = sample(dtype)
    assert_near(gradients(functools.partial(transform, mlp), operands, g), compiled_gradients(mlp, operands, g), share)


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_never_makes_the_cotangent_between():
    operands, g = sample()
    step = jax.jit(lambda g, *operands: gradients(mlp, operands, g))
    program = step.trace(g, *operands).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r'name = "walsh_([a-z_]+)_\d', re.sub(r'\bir = "[^"]*"', "", program))
    assert names == ["project", "norm_gelu_coded", "project", "norm_slope_projected", "expand"]


def test_what_is_kept_between_the_layers_is_bytes():
    operands, _ = sample()
    kept = jax.tree.leaves(jax.eval_shape(lambda *operands: jax.vjp(mlp, *operands)[1], *operands))
    hidden = [leaf for leaf in kept if leaf.size >= operands[0].size // 8 * HIDDEN]
    assert [leaf.dtype for leaf in hidden] == [jnp.uint8]


def test_wide_dtypes_keep_two_bytes_for_each_subblock():
    operands, _ = sample(jnp.float32)
    kept = jax.tree.leaves(jax.eval_shape(lambda *operands: jax.vjp(mlp, *operands)[1], *operands))
    assert [leaf.shape for leaf in kept if leaf.dtype == jnp.uint16] == [(4, 16, HIDDEN)]
    assert not [leaf for leaf in kept if leaf.size >= operands[0].size // 8 * HIDDEN]


ERRORS = {
    "both": ({"activation": "gelu"}, lambda norm: norm, ValueError, "before and activation='gelu' are both given"),
    "shape": ({}, lambda norm: jax.tree.map(lambda a: a[1:], norm), ValueError, r"before.mean must be \[24\]"),
    "type": ({}, lambda norm: norm.scale, TypeError, "before must be a lbpwht_jax.ops.Affine"),
}


@pytest.mark.parametrize(("fields", "change", "kind", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("spec", [SPEC, None], ids=["low rank", "exact"])
def test_errors_name_the_layer(fields, change, kind, message, spec):
    (x, kernel1, *_, norm1, _), _ = sample()
    h, before = x @ kernel1, change(running(norm1, 8, NARROW, "gelu"))
    with pytest.raises(kind, match=rf"LowRankDense \(top level\): {message}"):
        LowRankDense(8, spec=spec, dtype=NARROW, **fields).init(jax.random.key(0), h, before=before)
    if spec is not None:
        with pytest.raises(kind, match=f"here: {message}"):
            low_rank_matmul(h, jnp.zeros((HIDDEN, 8), NARROW), spec, before=before, name="here", **fields)
