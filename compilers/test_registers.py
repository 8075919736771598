"""Kernels for GPUs fit the registers: what spills is read and written in memory once more, and no count of bytes sees it."""

import os
import re
import subprocess
import sys

import pytest

NORM = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lbpwht_jax.compile.targets import parse_target
from lbpwht_jax.ops import norms_gpu

target, channels = parse_target("h100"), {channels}
replicated = NamedSharding(Mesh(target.open(), ("data",)), PartitionSpec())

def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

rows, vector, one = of(jnp.bfloat16, 2, 197, channels), of(jnp.float32, channels), of(jnp.float32, 2, 197, 1)
forward, backward = norms_gpu.forward_kernel(1e-6), norms_gpu.backward_kernel()
for run, operands in (
    (forward, (rows, vector, vector)),
    (backward, (of(jnp.uint8, 2, 197, channels), one, one, vector, rows)),
):
    jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).compile(compiler_options=target.compiler_options)
print("compiled")
"""
COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lbpwht_jax import lp_l1
from lbpwht_jax.compile.targets import parse_target
from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.kernels import kernel

target, kind, spec, grid, channels = parse_target("h100"), {kind!r}, lp_l1(4), (8, 8), 768
replicated = NamedSharding(Mesh(target.open(), ("data",)), PartitionSpec())
tokens, rows = grid[0] * grid[1], coefficient_count(spec, grid)
of = {{
    "norm": ((4, channels), jnp.float32),
    "tokens": ((8, tokens, channels), jnp.bfloat16),
    "coefficients": ((8, rows, channels), jnp.bfloat16),
    "codes": ((8, tokens, channels), jnp.uint8),
}}
operands = [jax.ShapeDtypeStruct(*of[name], sharding=replicated) for name in {operands!r}]
run = jax.jit(kernel("cuda", kind, spec, grid))
run.trace(*operands).lower(lowering_platforms=("cuda",)).compile(compiler_options=target.compiler_options)
print("compiled")
"""
OPERANDS = {
    "project": ["tokens"],
    "expand": ["coefficients"],
    "gelu_backward": ["coefficients", "tokens"],
    "gelu_backward_projected": ["coefficients", "tokens"],
    "gelu_coded": ["tokens"],
    "slope_projected": ["coefficients", "codes"],
    "norm_gelu_coded": ["norm", "tokens"],
    "norm_slope_projected": ["norm", "coefficients", "codes"],
}


@pytest.mark.parametrize("kind", OPERANDS)
def test_transforms_do_not_spill(kind):
    assert not spilled(COMPILE.format(kind=kind, operands=OPERANDS[kind]))


@pytest.mark.parametrize("channels", [768, 1024, 2048])
def test_layer_norms_do_not_spill(channels):
    assert not spilled(NORM.format(channels=channels))


def spilled(code):
    """What the compiler says of spills while the code runs in a Python of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", env=environment)
    assert "compiled" in done.stdout, done.stderr[-2000:]
    return re.findall(r"spilled to local memory in function '(?:walsh|layer_norm)_\w+', .*", done.stderr)
