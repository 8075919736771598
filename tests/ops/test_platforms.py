"""The same trace lowered for each platform: what is in the program, and that CPUs keep theirs."""

import functools
import re
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import low_rank_matmul, lp_l1
from lbpwht_jax.ops import platforms
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.gelu import gelu

SPEC, GRID, PREFIX = lp_l1(4), (7, 7), 1


def operands(dtype, batch=2):
    rng = np.random.default_rng(0)
    shapes = ((batch, 50, 24), (24, 40), (batch, 50, 40))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def backward(x, kernel, g, activation=None):
    y, pullback = jax.vjp(lambda x, k: low_rank_matmul(x, k, SPEC, GRID, PREFIX, activation=activation), x, kernel)
    return y, *pullback(g)


def lowered(platform, function, *arguments):
    """The program for a platform, lowered here, without the kernels' own code."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return re.sub(r'\bir = "[^"]*"', "", program)


def kernels(program):
    """Names of the kernels in a lowered program, in its order."""
    return re.findall(r'name = "walsh_([a-z_]+)_\d', program)


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_gets_kernels_and_narrow_products():
    program = lowered("cuda", backward, *operands(jnp.bfloat16))
    assert kernels(program) == ["project", "project", "expand"]
    assert (
        len(re.findall(r"stablehlo.dot_general .*-> tensor<[0-9x]*bf16>", program))
        == program.count("stablehlo.dot_general ")
        == 3
    )


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_gets_gelu_inside_the_kernels():
    program = lowered("cuda", lambda *a: backward(*a, activation="gelu"), *operands(jnp.bfloat16))
    assert kernels(program) == ["project", "gelu_backward"]
    assert "exponential" not in program


def test_a_gpu_without_a_kernel_for_the_dtype_gets_plain_forms():
    program = lowered("cuda", backward, *operands(jnp.float32))
    assert kernels(program) == []
    assert "optimization_barrier" in program


def test_a_tpu_gets_one_matrix_for_the_grid():
    program = lowered("tpu", backward, *operands(jnp.bfloat16))
    # x and g are projected, dx is expanded: no repeated matrices, sums by blocks or concatenated prefix tokens
    assert len(re.findall(r"dot_general .*tensor<(11x50|50x11)xbf16>", program)) == 3
    assert "concatenate" not in program and "stablehlo.reduce" not in program


def test_a_tpu_keeps_what_gelu_takes():
    program = lowered("tpu", lambda *a: backward(*a, activation="gelu"), *operands(jnp.bfloat16))
    # x itself comes out of the backward pass's barrier, to be projected behind it
    assert "tensor<2x11x24xbf16>, tensor<2x50x24xbf16>" in re.findall(r"optimization_barrier .* : (.*)", program)
    assert len(re.findall(r"dot_general .*tensor<(11x50|50x11)xbf16>", program)) == 3


@pytest.mark.usefixtures("absent_gpu")
def test_exported_here_for_a_gpu():
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exported = jax.export.export(jax.jit(backward), platforms=["cuda"], disabled_checks=unchecked)(*operands(jnp.bfloat16))
    assert exported.platforms == ("cuda",) and "__gpu$xla.gpu.triton" in exported.mlir_module()


@pytest.mark.usefixtures("absent_gpu")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_product_reads_x_behind_the_projection(platform, dtype):
    program = lowered(platform, backward, *operands(dtype))
    kind = jnp.dtype(dtype).name.replace("float", "f")
    [types] = re.findall(r"optimization_barrier %\S+, %arg0 : (.*)", program)
    assert types == f"tensor<2x11x24x{kind}>, tensor<2x50x24x{kind}>"
    assert not re.search("dot_general %arg0,.*tensor<2x50x40", program)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cpu_gets_no_kernels_and_no_barriers_but_the_slope_s(dtype):
    program = jax.jit(lambda *a: backward(*a, activation="gelu")).lower(*operands(dtype))
    assert "custom_call" not in program.as_text()
    # one in front of the slope, which would otherwise be made of what the forward pass has
    assert program.as_text().count("optimization_barrier") == (dtype == jnp.float32)
    assert "conditional" not in (program.compile().as_text() or "")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_gelu_inside_equals_gelu_before(dtype, tolerance):
    x, kernel, g = operands(dtype)
    inside = jax.jit(lambda *a: backward(*a, activation="gelu"))(x, kernel, g)
    y, pullback = jax.vjp(lambda x, k: low_rank_matmul(gelu(x), k, SPEC, GRID, PREFIX), x, kernel)
    for a, b in zip(inside, (y, *pullback(g)), strict=True):
        chex.assert_trees_all_close(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("wanted", ["x", "kernel", "neither"])
def test_gelu_inside_with_one_operand_differentiated(wanted):
    x, kernel, _ = operands(jnp.bfloat16)

    def loss(x, kernel, activation):
        x = x if activation else gelu(x)
        return low_rank_matmul(x, kernel, SPEC, GRID, PREFIX, activation=activation).astype(jnp.float32).sum()

    function = {"x": jax.grad(loss), "kernel": jax.grad(loss, 1), "neither": loss}[wanted]
    inside, before = (jax.jit(function, static_argnums=2)(x, kernel, activation) for activation in ("gelu", None))
    # bfloat16: sums of 100 rounded terms
    chex.assert_trees_all_close(inside, before, rtol=0, atol=2e-2 * float(jnp.abs(before).max()))


def test_an_unknown_activation_is_an_error():
    x, kernel, _ = operands(jnp.float32)
    unknown: Any = "relu"
    with pytest.raises(ValueError, match="activation must be 'gelu' or None, got 'relu'"):
        low_rank_matmul(x, kernel, SPEC, GRID, PREFIX, activation=unknown)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_flops_do_not_depend_on_the_dtype_or_on_the_platform(activation):
    counts = {
        product_flops(lambda *a: backward(*a, activation=activation)[1:], *operands(d)) for d in (jnp.float32, jnp.bfloat16)
    }
    assert len(counts) == 1


def maps(kind):
    """The bfloat16 operation, mapped or sharded in some way, on four images."""
    run = lambda *a: backward(*a, activation="gelu")  # noqa: E731
    if kind == "vmap":
        return lambda x, k, g: jax.vmap(run, (0, None, 0))(x[:, None], k, g[:, None])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    batch, whole = jax.P("data"), jax.P()
    return jax.shard_map(run, mesh=mesh, in_specs=(batch, whole, batch), out_specs=(batch, batch, whole))


@pytest.mark.parametrize("kind", ["vmap", "shard_map"])
def test_maps(kind):
    x, kernel, g = operands(jnp.bfloat16, 4)
    y, dx, dw = jax.jit(maps(kind))(x, kernel, g)
    expected = backward(x, kernel, g, activation="gelu")
    actual = (y.reshape(g.shape), dx.reshape(x.shape), dw.astype(jnp.float32).sum(0) if kind == "vmap" else dw)
    for a, b in zip(actual, expected, strict=True):
        chex.assert_trees_all_close(a.astype(b.dtype), b, rtol=0, atol=3e-2 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("first", [1.0, jnp.nan, jnp.inf, 0.0])
def test_what_cpus_make_by_itself(first):
    x = jnp.arange(24.0).reshape(4, 6).at[0, 0].set(first)
    function = lambda x: (jnp.exp(x), (x > 3).astype(jnp.uint8))  # noqa: E731
    by_itself = functools.partial(platforms.by_itself, function)
    chex.assert_trees_all_equal(jax.jit(by_itself)(x), jax.jit(function)(x))
    chex.assert_trees_all_equal(jax.vmap(by_itself)(x), jax.vmap(function)(x))
    chex.assert_trees_all_equal(jax.jit(by_itself)(x[:0]), function(x[:0]))
    # XLA does not merge what a branch returns with what reads it
    assert "conditional" in (jax.jit(lambda x: by_itself(x)[0] + 1).lower(x).compile().as_text() or "")
    assert re.search("compare +EQ", lowered("cpu", by_itself, x))
    assert not re.search("compare +EQ", lowered("cuda", by_itself, x) + lowered("tpu", by_itself, x))
