"""The exact product of what goes through a norm and GELU first, against the same in steps; what it keeps, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_near
from normed import running
from transformations import TRANSFORMS, compiled_gradients, gradients

from lbpwht_jax import LowRankDense, low_rank_matmul, lp_l1
from lbpwht_jax.ops.affine import apply
from lbpwht_jax.ops.exact import exact_matmul
from lbpwht_jax.ops.normed_product import takes

SHAPE, HIDDEN = (4, 4, 5), 24
NARROW = jnp.bfloat16
EXACT = lp_l1(3, dx="exact", dw="exact")


def sample(dtype=NARROW):
    """x, a kernel, a bias, the parameters of a norm, and the result's cotangent."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*SHAPE, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,))]
    norm = tuple(jnp.asarray(rng.normal(size=HIDDEN), jnp.float32) for _ in range(2))
    return (*arrays, norm), jnp.asarray(rng.normal(size=(*SHAPE, HIDDEN)), dtype)


def before(norm, bits, dtype, activation="gelu"):
    return running(norm, bits, dtype, activation)


def layer(x, kernel, bias, norm, *, bits=8):
    own = LowRankDense(HIDDEN, None, input_bits=bits)
    return own.apply({"params": {"kernel": kernel, "bias": bias}}, x, before=before(norm, bits, x.dtype))


def operation(x, kernel, bias, norm, *, bits=8):
    return low_rank_matmul(x, kernel, EXACT, bias=bias, before=before(norm, bits, x.dtype), input_bits=bits)


def steps(x, kernel, bias, norm):
    return exact_matmul(apply(x, before(norm, None, x.dtype)), kernel) + bias.reshape(1, 1, 1, -1)


SUBJECTS = {"layer": layer, "operation": operation}


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("bits, share", [(8, 0.02), (4, 0.2)])
def test_as_exact_steps_in_float32(subject, bits, share):
    operands, g = sample()
    wide, wide_g = jax.tree.map(lambda a: a.astype(jnp.float32), (operands, g))
    own = compiled_gradients(functools.partial(subject, bits=bits), operands, g)
    exact = compiled_gradients(steps, wide, wide_g)
    # bfloat16's 8 bits and those of what is kept: steps of 1/127 or 1/7 of (2 + |n|)^2 / 2
    assert_near(own, exact, share)
    assert_near(own[:1], exact[:1], 0.005)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("differentiated", range(4))
def test_operands_one_by_one(subject, differentiated):
    operands, g = sample()

    def of(function, one):
        return function(*operands[:differentiated], one, *operands[differentiated + 1 :])

    own, other = (compiled_gradients(functools.partial(of, f), [operands[differentiated]], g) for f in (subject, steps))
    assert_near(own, other, 0.02)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations(transform, subject):
    operands, g = sample()
    # bfloat16's 8 bits, rounded at other places
    assert_near(gradients(functools.partial(transform, subject), operands, g), compiled_gradients(subject, operands, g), 0.02)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_one_byte_a_number_is_kept(subject):
    operands, _ = sample()
    kept = jax.tree.leaves(jax.eval_shape(lambda *operands: jax.vjp(subject, *operands)[1], *operands))
    large = [leaf for leaf in kept if leaf.size >= np.prod(SHAPE) * HIDDEN]
    assert [(leaf.dtype, leaf.shape[-1]) for leaf in large] == [(jnp.uint8, HIDDEN)]


@pytest.mark.parametrize(
    "dtype, bits, input_bits, taken",
    [
        (NARROW, 8, 8, True),
        (jnp.float16, 8, 4, True),
        (NARROW, 4, 8, False),  # the input was to be kept finer than the norm
        (NARROW, None, 8, False),
        (NARROW, 8, None, False),
        (jnp.float32, 8, 8, False),
    ],
)
def test_where_it_is(dtype, bits, input_bits, taken):
    (x, kernel, _, norm), _ = sample(dtype)
    assert takes(x, kernel, before(norm, bits, x.dtype), input_bits) is taken


def test_not_for_other_dtypes_activations_or_single_rows():
    (x, kernel, _, norm), _ = sample()
    assert not takes(x, kernel.astype(jnp.float32), before(norm, 8, x.dtype), 8)
    assert not takes(x, kernel, before(norm, 8, jnp.float32), 8)
    assert not takes(x, kernel, before(norm, 8, x.dtype, "relu"), 8)
    assert not takes(x[:, 0, 0], kernel, before(norm, 8, x.dtype), 8)
