import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from lbpwht_jax import fast_walsh_hadamard, walsh_matrix

ORDERS = (1, 2, 4, 8, 16, 64)


@pytest.mark.parametrize("n", ORDERS)
def test_matrix_is_the_hadamard_matrix_sorted_by_sign_changes(n):
    matrix = walsh_matrix(n)
    chex.assert_trees_all_equal(matrix.astype(np.float64), reference.walsh(n))
    chex.assert_trees_all_equal((np.diff(matrix, axis=1) != 0).sum(1), np.arange(n))
    chex.assert_trees_all_equal(matrix, matrix.T)
    chex.assert_trees_all_equal(matrix @ matrix, n * np.eye(n, dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.float64, jnp.bfloat16])
def test_matrix_dtype(dtype):
    chex.assert_type(walsh_matrix(8, dtype), dtype)


@given(log_n=st.integers(0, 6), axis=st.integers(-3, 2), seed=st.integers(0, 100))
def test_fast_transform_equals_the_matrix(log_n, axis, seed):
    shape = [3, 2, 5]
    shape[axis] = 2**log_n
    x = np.random.default_rng(seed).normal(size=shape)
    expected = np.moveaxis(np.tensordot(walsh_matrix(2**log_n, np.float64), x, axes=([1], [axis])), 0, axis)
    # float32 sums of up to 64 terms of order 1
    actual = jax.jit(fast_walsh_hadamard, static_argnums=1)(x.astype(np.float32), axis)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=2e-5)


class EveryWay(chex.TestCase):
    @chex.all_variants
    def test_fast_transform(self):
        x = np.random.default_rng(0).normal(size=(3, 16, 2)).astype(np.float32)
        transform = self.variant(lambda x: fast_walsh_hadamard(x, axis=1))
        # float32 sums of 16 terms of order 1
        chex.assert_trees_all_close(transform(x), np.einsum("kn,bnc->bkc", walsh_matrix(16), x), rtol=0, atol=1e-5)
        # applied twice, it multiplies by its order
        chex.assert_trees_all_close(transform(transform(x)), 16 * x, rtol=0, atol=1e-4)


def test_fast_transform_makes_n_log_n_additions():
    program = jax.make_jaxpr(fast_walsh_hadamard)(jax.ShapeDtypeStruct((1024,), jnp.float32))
    additions = [e for e in program.jaxpr.eqns if e.primitive.name in ("add", "sub")]
    assert sum(e.outvars[0].aval.size for e in additions) == 1024 * 10
    assert not any(e.primitive.name == "dot_general" for e in program.jaxpr.eqns)


@pytest.mark.parametrize("n", [0, 3, 12, -8])
def test_order_that_is_no_power_of_two(n):
    with pytest.raises(ValueError, match=rf"power of two.*got {n}"):
        walsh_matrix(n)


def test_order_that_is_no_integer():
    with pytest.raises(TypeError, match=r"must be an integer, got 8\.0"):
        walsh_matrix(8.0)


def test_fast_transform_of_a_wrong_axis():
    with pytest.raises(ValueError, match=r"power of two.*got 6"):
        fast_walsh_hadamard(jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"axis 2 is out of range.*\(4, 8\)"):
        fast_walsh_hadamard(jnp.zeros((4, 8)), axis=2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int16, np.bool_])
def test_sums_that_would_overflow_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"sums of {np.dtype(dtype)} overflow.*cast it to int32"):
        fast_walsh_hadamard(np.full(8, 1, dtype))


def test_integers_wide_enough_stay_what_they_are():
    x = np.arange(8, dtype=np.int32)
    chex.assert_trees_all_equal(fast_walsh_hadamard(x), walsh_matrix(8, np.int32) @ x)
