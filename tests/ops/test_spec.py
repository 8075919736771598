import copy
import dataclasses
import pickle

import chex
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.spec_fields import SpecFields


@pytest.mark.parametrize(("r", "count"), [(1, 1), (2, 3), (4, 10), (6, 21), (7, 28), (8, 36), (15, 64)])
def test_lp_l1_counts(r, count):
    spec = lp_l1(r)
    assert spec.rank == count
    chex.assert_trees_all_equal(spec.mask, np.add.outer(np.arange(8), np.arange(8)) < r)
    assert spec.mask.sum() == count


@pytest.mark.parametrize("r", range(1, 9))
def test_lp_linf_keeps_a_square(r):
    chex.assert_trees_all_equal(lp_linf(r).mask, np.maximum.outer(np.arange(8), np.arange(8)) < r)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_function_is_kept_at_the_largest_r(ndim):
    every = np.ones((8,) * ndim, bool)
    chex.assert_trees_all_equal(lp_l1(7 * ndim + 1, ndim).mask, lp_linf(8, ndim).mask, every)
    assert lp_l1(1, ndim).bases == ((0,) * ndim,)


def test_fields_are_passed_on():
    spec = lp_l1(2, ndim=1, block=4, projection="official", dx="exact", dw="exact")
    assert spec == LowRankSpec([[0], [1]], block=4, projection="official", dx="exact", dw="exact")


def test_specs_are_hashable_and_equal_by_value():
    assert len({lp_l1(4), lp_l1(4), lp_l1(np.int64(4)), lp_linf(4)}) == 2
    assert LowRankSpec(np.argwhere(lp_l1(3).mask)) == lp_l1(3)
    assert lp_l1(3) != lp_l1(3, dx="exact") and lp_l1(3) != SpecFields(lp_l1(3).bases)


def test_a_spec_is_a_plain_dataclass():
    spec = lp_l1(2, when="faster")
    bases = ((0, 0), (0, 1), (1, 0))
    assert repr(spec) == (
        f"LowRankSpec(bases={bases}, block=8, projection='fitted', dx='low_rank', dw='low_rank', when='faster')"
    )
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    exact = dataclasses.replace(spec, dx="exact")
    assert type(exact) is LowRankSpec and exact == lp_l1(2, when="faster", dx="exact")
    assert [field.name for field in dataclasses.fields(spec)] == ["bases", "block", "projection", "dx", "dw", "when"]
    assert LowRankSpec(bases, 8, "fitted", "low_rank", "low_rank", "faster") == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dx = "exact"  # type: ignore[misc]


def test_stand_ins_are_equal_by_value():
    assert lp_l1(2).dot_general(grid=[7, 7]) == lp_l1(2).dot_general(grid=(7, 7)) != lp_l1(3).dot_general(grid=(7, 7))
    assert len({lp_l1(2).conv_general_dilated(), lp_l1(2).conv_general_dilated(), lp_linf(2).conv_general_dilated()}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bases": [(0, 0)], "block": 6}, r"block must be a power of two.*got 6"),
        ({"bases": [(0, 0)], "block": 0}, r"block must be a power of two.*got 0"),
        ({"bases": [(0, 0)], "block": 2048}, r"block of 2048 tokens along each of 2 axes is too large"),
        ({"bases": [(0, 0, 0)], "block": 64}, r"block of 64 tokens along each of 3 axes is too large.*65536 in all"),
        ({"bases": [(0, 8), (1, 1)]}, r"functions \[\(0, 8\)\] are outside the block.*0 to 7"),
        ({"bases": [(0, -1)]}, r"functions \[\(0, -1\)\] are outside the block"),
        ({"bases": []}, "selection is empty"),
        ({"bases": [(0, 0), (0, 1), (0, 0)]}, r"repeated functions \[\(0, 0\)\]"),
        ({"bases": [(0, 0), (0,)]}, r"tuples of lengths \[1, 2\]"),
        ({"bases": [()]}, r"tuples of lengths \[0\]"),
        ({"bases": [(0, 0)], "projection": "reflect"}, r"projection must be one of.*got 'reflect'"),
        ({"bases": [(0, 0)], "dx": "dense"}, r"dx must be one of.*got 'dense'"),
        ({"bases": [(0, 0)], "dw": None}, r"dw must be one of.*got None"),
        ({"bases": [(0, 0)], "when": "sometimes"}, r"when must be one of.*got 'sometimes'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        LowRankSpec(**fields)


@pytest.mark.parametrize("fields", [{"bases": [(0.5, 0)]}, {"bases": 3}, {"bases": [0, 1]}, {"bases": [(0, 0)], "block": "8"}])
def test_fields_of_a_wrong_type(fields):
    with pytest.raises(TypeError, match="bases must be tuples of integers"):
        LowRankSpec(**fields)


@pytest.mark.parametrize(("make", "r"), [(lp_l1, 0), (lp_l1, 16), (lp_linf, 9), (lp_linf, -1)])
def test_r_out_of_range(make, r):
    with pytest.raises(ValueError, match=rf"r must be from 1 to \d+.*got {r}"):
        make(r)


def test_r_of_a_wrong_type_or_no_axes():
    with pytest.raises(TypeError, match=r"r must be an integer, got 2\.5"):
        lp_l1(2.5)
    with pytest.raises(ValueError, match=r"ndim.*at least 1, got 0"):
        lp_linf(2, ndim=0)
    with pytest.raises(ValueError, match=r"block must be a power of two.*got 6"):
        lp_l1(4, block=6)


@pytest.mark.parametrize("make", [lp_l1, lp_linf])
def test_large_blocks_are_refused_before_their_functions_are_listed(make):
    for block, ndim in ((4096, 2), (512, 2), (2**40, 1), (2, 10**6)):
        with pytest.raises(ValueError, match=rf"block of {block} tokens along each of {ndim} axes is too large"):
            make(2, ndim, block=block)
    # the largest: in time linear in the number of functions
    assert make(256, block=256).rank == {lp_l1: 256 * 257 // 2, lp_linf: 256**2}[make]
