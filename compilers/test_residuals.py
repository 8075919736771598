"""That a compiled program keeps coefficients or codes instead of x: needs the extra [compile], so not among the other tests."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lbpwht_jax import low_rank_matmul, lp_l1
from lbpwht_jax.compile.targets import parse_target
from lbpwht_jax.ops.exact import exact_matmul

LAYERS, BATCH, CHANNELS = 12, 128, 1024
SPEC, GRID = lp_l1(2), (14, 14)


@pytest.fixture(scope="module", autouse=True)
def environment():
    """A TPU's compiler need not ask a cloud, and may run beside others."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def temporaries(target, product, dtype):
    """Bytes of temporaries of the gradients of a chain of layers, which is linear: nothing but products keeps an x."""
    mesh = Mesh(np.array(target.open()), ("chip",))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(kernels, x):
        for kernel in kernels:
            x = product(x, kernel)
        return x.astype(jnp.float32).sum()

    x, kernels = array(BATCH, 196, CHANNELS), [array(CHANNELS, CHANNELS)] * LAYERS
    lowered = jax.jit(jax.grad(loss)).lower(kernels, x)
    return lowered.compile(compiler_options=target.compiler_options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["h100", "v5e:1x1"])
def test_coefficients_replace_x(name, dtype):
    target = parse_target(name)
    x = BATCH * 196 * CHANNELS * jnp.dtype(dtype).itemsize
    exact = temporaries(target, jnp.matmul, dtype)
    low_rank = temporaries(target, lambda x, kernel: low_rank_matmul(x, kernel, SPEC, GRID), dtype)
    # a TPU keeps float32 operands as bfloat16, half of x, and may hold some in its 128 MiB on the chip
    assert exact > LAYERS / 3 * x
    # coefficients are 12 of 196; a few arrays of x's size pass through, and 32 MiB are cuBLAS's own
    assert low_rank < exact / 2


@pytest.mark.parametrize("name", ["h100", "v5e:1x1"])
def test_codes_replace_x(name):
    target = parse_target(name)
    exact = temporaries(target, jnp.matmul, jnp.bfloat16)
    coded = temporaries(target, lambda x, kernel: exact_matmul(x, kernel, bits=8), jnp.bfloat16)
    assert coded < 0.75 * exact  # codes are half of x, and a few arrays of x's size pass through
