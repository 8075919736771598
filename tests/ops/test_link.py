"""Two layers joined: the cotangent between them goes as coefficients, and no gradient changes."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformations import TRANSFORMS, compiled_gradients, gradients

from lbpwht_jax import low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.ops.matmul import Link

SPEC = lp_l1(3)
CASES = {
    "tokens": (SPEC, SPEC, (2, 50, 8), (7, 7), 1),
    "official": (lp_l1(3, projection="official"),) * 2 + ((2, 49, 8), (7, 7), 0),
    "maps": (SPEC, SPEC, (2, 7, 9, 8), None, 0),
    "windows": (SPEC, SPEC, (2, 3, 16, 8), (4, 4), 0),
    "other functions": (SPEC, lp_linf(2), (2, 49, 8), (7, 7), 0),
    "first exact in dx": (lp_l1(3, dx="exact"), SPEC, (2, 49, 8), (7, 7), 0),
    "second exact in dw": (SPEC, lp_l1(3, dw="exact"), (2, 49, 8), (7, 7), 0),
}


def sample(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = shape, (8, 24), (24,), (24, 8), (8,)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in shapes], jnp.asarray(rng.normal(size=shape), dtype)


def mlp(x, kernel1, bias1, kernel2, bias2, *, specs, grid, prefix, bits=None, joined=True):
    link = Link() if joined else None
    options = {"slope_bits": bits, "link": link}
    h = low_rank_matmul(x, kernel1, specs[0], grid, prefix, bias=bias1, **options)
    return low_rank_matmul(h, kernel2, specs[1], grid, prefix, bias=bias2, activation="gelu", **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_gradient_changes(case):
    *specs, shape, grid, prefix = case
    operands, g = sample(shape)
    of = functools.partial(mlp, specs=specs, grid=grid, prefix=prefix)
    joined = compiled_gradients(of, operands, g)
    apart = compiled_gradients(functools.partial(of, joined=False), operands, g)
    # the same sums in another order
    chex.assert_trees_all_close(joined, apart, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.04), (3, 0.004), (4, 0.004), (8, 0.004)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_from_few_bits(case, bits, share):
    """Means of slopes over sub-blocks, where the layers are joined, lose no more to rounding than slopes do."""
    *specs, shape, grid, prefix = case
    operands, g = sample(shape)
    of = functools.partial(mlp, specs=specs, grid=grid, prefix=prefix)
    exact = compiled_gradients(of, operands, g)
    joined, apart = (
        [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(jax.tree.leaves(found), exact, strict=True)]
        for found in (compiled_gradients(functools.partial(of, bits=bits, joined=j), operands, g) for j in (True, False))
    )
    assert max(joined) <= max(share, 1.001 * max(apart)), (joined, apart)


def test_joined_layers_keep_means():
    """Of the slope one byte for each channel of the prefix token and of 16 sub-blocks, where single layers keep 50."""
    operands, _ = sample((2, 50, 8))

    def kept(joined):
        of = functools.partial(mlp, specs=(SPEC, SPEC), grid=(7, 7), prefix=1, bits=8, joined=joined)
        leaves = jax.tree.leaves(jax.eval_shape(lambda *operands: jax.vjp(of, *operands)[1], *operands))
        return [leaf.shape for leaf in leaves if leaf.dtype == jnp.uint8]

    assert kept(joined=True) == [(2, 17, 24)]
    assert kept(joined=False) == [(2, 50, 24)]


@pytest.mark.parametrize("differentiated", [(0,), (1,), (2,), (3,), (4,), (1, 4), (0, 3)])
def test_frozen_operands(differentiated):
    operands, g = sample((2, 50, 8))

    def of(joined, *some):
        full = list(operands)
        for n, value in zip(differentiated, some, strict=True):
            full[n] = value
        return mlp(*full, specs=(SPEC, SPEC), grid=(7, 7), prefix=1, joined=joined)

    some = [operands[n] for n in differentiated]
    joined, apart = (compiled_gradients(functools.partial(of, joined), some, g) for joined in (True, False))
    chex.assert_trees_all_close(joined, apart, rtol=0, atol=2e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations(transform):
    # drawn so that no mean slope lies within a thousandth of a code's step of the border of two codes: it may get either there
    (x, *others), g = sample((4, 50, 8), seed=30)
    operands = 0.3 * x, *others
    of = functools.partial(mlp, specs=(SPEC, SPEC), grid=(7, 7), prefix=1, bits=8)
    transformed = gradients(functools.partial(transform, of), operands, g)
    chex.assert_trees_all_close(transformed, compiled_gradients(of, operands, g), rtol=0, atol=2e-5)


def test_a_result_that_is_used_twice():
    """What else uses the array between the layers adds its cotangent to that which goes as coefficients."""
    operands, g = sample((2, 50, 8))

    def of(x, kernel1, bias1, kernel2, bias2, joined):
        link = Link() if joined else None
        h = low_rank_matmul(x, kernel1, SPEC, (7, 7), 1, bias=bias1, link=link)
        y = low_rank_matmul(h, kernel2, SPEC, (7, 7), 1, bias=bias2, activation="gelu", link=link)
        return y + jnp.sum(h, -1, keepdims=True)

    joined, apart = (compiled_gradients(functools.partial(of, joined=joined), operands, g) for joined in (True, False))
    chex.assert_trees_all_close(joined, apart, rtol=0, atol=5e-5)


def test_what_is_made_of_the_result_is_not_joined():
    """The cotangent then has more to go through, such as a dropout between the layers."""
    operands, g = sample((2, 50, 8))

    def of(x, kernel1, bias1, kernel2, bias2, joined):
        link = Link() if joined else None
        h = low_rank_matmul(x, kernel1, SPEC, (7, 7), 1, bias=bias1, link=link)
        return low_rank_matmul(2 * h, kernel2, SPEC, (7, 7), 1, bias=bias2, activation="gelu", slope_bits=8, link=link)

    joined, apart = (compiled_gradients(functools.partial(of, joined=joined), operands, g) for joined in (True, False))
    chex.assert_trees_all_equal(joined, apart)


@pytest.mark.usefixtures("absent_gpu")
@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (None, ["project", "project", "gelu_backward_projected", "expand"]),
        (8, ["project", "gelu_coded", "project", "slope_projected", "expand"]),
    ],
)
def test_a_gpu_never_makes_the_cotangent_between(bits, expected):
    operands, g = sample((2, 50, 8), jnp.bfloat16)
    of = functools.partial(mlp, specs=(SPEC, SPEC), grid=(7, 7), prefix=1, bits=bits)
    program = jax.jit(lambda *a: gradients(of, a[:-1], a[-1])).trace(*operands, g).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r'name = "walsh_([a-z_]+)_\d', re.sub(r'\bir = "[^"]*"', "", program)) == expected
