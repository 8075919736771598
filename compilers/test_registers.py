"""Kernels for GPUs fit the registers: what spills is read and written in memory once more, and no count of bytes sees it."""

import os
import re
import subprocess
import sys

import pytest

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
    code = COMPILE.format(kind=kind, operands=OPERANDS[kind])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", env=environment)
    assert "compiled" in done.stdout, done.stderr[-2000:]
    assert not re.findall(r"spilled to local memory in function 'walsh_\w+', .*", done.stderr)
