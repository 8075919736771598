"""Records and costs of single products, against XLA's count of the compiled backward pass and JAX's own residuals."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import LoRA, LowRankDense, adapt, lp_l1
from lbpwht_jax.cost.layers import matmul_flops, saved_bytes
from lbpwht_jax.cost.paper import paper_flops
from lbpwht_jax.cost.trace import Elementwise, Product, layer_records
from lbpwht_jax.ops.convolution import ConvProduct
from lbpwht_jax.ops.gelu import gelu


class Single(nn.Module):
    """One layer, of the image as it is, or of ``[batch, windows, tokens, channels]``."""

    layer: nn.Module
    tokens: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.layer(x.reshape(x.shape[0], *self.tokens, x.shape[-1]) if self.tokens else x)


class Scores(nn.Module):
    """The products of an attention of one head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x * self.param("gain", nn.initializers.ones, (x.shape[-1],)).reshape(1, 1, -1)
        return jnp.einsum("bqk,bkc->bqc", jnp.einsum("bqc,bkc->bqk", x, x), x)


def variables_of(module: Any, shape: tuple[int, int, int], batch: int = 1) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((batch, *shape), jnp.float32))


def records_of(module: Any, shape: tuple[int, int, int], *trained: Any) -> list:
    return layer_records(module, variables_of(module, shape), shape, *trained)


def only_product(module: Any, shape: tuple[int, int, int]) -> Product:
    (record,) = (record for record in records_of(module, shape) if isinstance(record, Product))
    return record


def backward(module, shape, batch=1):
    """Gradients of parameters and input, and the shapes of its arguments."""
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    variables = variables_of(module, shape, batch)
    y = jax.eval_shape(module.apply, variables, x)
    return (lambda v, x, g: jax.vjp(module.apply, v, x)[1](g)), (variables, x, y)


def dense(grid, rank, **fields):
    return LowRankDense(256, spec=rank and lp_l1(rank), grid=grid, use_bias=False, **fields)


LAYERS = {
    "dense": (Single(dense(None, None)), (7, 7, 192), None),
    "low-rank, whole block": (Single(dense(None, 4)), (8, 8, 192), lp_l1(4)),
    "low-rank, part of a block": (Single(dense(None, 8)), (7, 7, 192), lp_l1(8)),
    "low-rank, 14x14 and a class token": (Single(dense((14, 14), 4, prefix_tokens=1), (197,)), (1, 197, 192), lp_l1(4)),
    "low-rank, axis by axis": (Single(dense(None, 4)), (32, 32, 192), lp_l1(4)),
    "low-rank, windows": (Single(dense((8, 8), 4), (4, 64)), (16, 16, 192), lp_l1(4)),
    "conv, stride 2": (Single(nn.Conv(64, (3, 3), 2, padding=1, use_bias=False)), (14, 14, 48), None),
    "patches": (Single(nn.Conv(64, (4, 4), 4, padding="VALID", use_bias=False)), (16, 16, 3), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_matmul_flops_equal_xla_s_count(name):
    module, shape, spec = LAYERS[name]
    record = dataclasses.replace(only_product(module, shape), needs_dx=1)
    function, arguments = backward(module, shape)
    xla = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    assert matmul_flops(record, spec) == pytest.approx(xla, rel=0.03)


def test_matmul_flops_of_a_depthwise_convolution_equal_xla_s_count():
    module = Single(nn.Conv(32, (3, 3), 2, padding=1, feature_group_count=32, use_bias=False))
    record = dataclasses.replace(only_product(module, (14, 14, 32)), needs_dx=1)
    assert record.kind == "depthwise"
    function, arguments = backward(module, (14, 14, 32))
    # before compiling: XLA's CPU compiler turns the kernel's gradient into a convolution of all channels with all
    xla = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    assert matmul_flops(record, None) == pytest.approx(xla, rel=0.03)


def test_matmul_flops_of_attention_equal_xla_s_count():
    module, shape = Scores(), (8, 8, 256)
    records = [record for record in records_of(module, shape) if isinstance(record, Product)]
    assert [(record.kind, record.needs_dx, record.macs) for record in records] == [("attention", 2, 64 * 64 * 256)] * 2
    function, arguments = backward(module, shape)
    compiled = jax.jit(function).lower(*arguments).compile()
    # the scores are computed once more, for the gradient of the values
    xla = compiled.cost_analysis()["flops"] - 2 * records[0].macs
    assert sum(matmul_flops(record, None) for record in records) == pytest.approx(xla, rel=0.03)


def kept(module: Any, shape: tuple[int, int, int]) -> int:
    """Bytes an image that JAX keeps for the backward pass: of its residuals, those that grow with the batch."""
    sizes = []
    for batch in (2, 3):
        x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
        variables = variables_of(module, shape, batch)
        residuals = jax.eval_shape(lambda v, x: jax.vjp(module.apply, v, x)[1], variables, x)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)))
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("rank", [None, 2, 4, 8])
@pytest.mark.parametrize(
    ("grid", "tokens", "prefix_tokens", "shape"),
    [
        (None, (), 0, (7, 7, 12)),
        (None, (), 0, (56, 56, 12)),
        ((8, 8), (4, 64), 0, (16, 16, 12)),
        ((14, 14), (198,), 2, (1, 198, 20)),
    ],
    ids=["7x7", "56x56", "windows", "prefix"],
)
def test_saved_bytes_equal_jax_s_residuals(grid, tokens, prefix_tokens, shape, rank, bits):
    module = Single(dense(grid, rank, prefix_tokens=prefix_tokens, input_bits=bits), tokens)
    saved = saved_bytes(only_product(module, shape), rank and lp_l1(rank))
    assert saved == kept(module, shape)
    whole = 4 * shape[0] * shape[1] * shape[2]
    assert saved == whole if rank is bits is None else saved <= whole


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("size", [3, 4])  # of the second, patches fill the map
def test_saved_bytes_of_convolutions_equal_jax_s_residuals(size, bits):
    layer = nn.Conv(8, (size, size), size, padding="VALID", use_bias=False, conv_general_dilated=ConvProduct(bits))
    assert saved_bytes(only_product(Single(layer), (16, 16, 5)), None) == kept(Single(layer), (16, 16, 5))


@pytest.mark.parametrize("rank", [None, 4])
def test_saved_bytes_of_a_branch_equal_jax_s_residuals(rank):
    spec = rank and lp_l1(rank)
    example = jax.ShapeDtypeStruct((1, 7, 7, 12), jnp.float32)
    model = adapt(Single(dense(None, rank)), [LoRA("layer", rank=8, spec=spec)], example)
    records = [r for r in records_of(model, (7, 7, 12), model.trainable) if isinstance(r, Product)]
    assert [(r.parameter, r.needs_dw) for r in records] == [("kernel", False), ("lora_a", True), ("lora_b", True)]
    tokens = 10 if rank else 49
    assert sum(saved_bytes(record, spec) for record in records) == kept(model, (7, 7, 12)) == 4 * tokens * (12 + 8)


class Block(nn.Module):
    """Everything that a record can be of, the first layer on the image itself."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(16, (3, 3), 2, padding=1, name="stem")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        x = x + nn.gelu(LowRankDense(16, lp_l1(2), name="fc1")(x), approximate=False)
        x = nn.Conv(16, (3, 3), padding=1, feature_group_count=16, name="mid")(x)
        x = nn.LayerNorm(name="norm")(nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_records_of_a_model_follow_what_is_trained():
    def summary(records):
        products = [(r.path, r.kind, r.needs_dx, r.needs_dw, r.needs_db) for r in records if isinstance(r, Product)]
        return products, [(r.path, r.kind, r.elements) for r in records if isinstance(r, Elementwise)]

    products, elements = summary(records_of(Block(), (16, 16, 3)))
    assert products == [
        ("stem", "conv", 0, True, True),
        ("fc1", "dense", 1, True, True),
        ("mid", "depthwise", 1, True, True),
        ("head", "dense", 1, True, True),
    ]
    size = 8 * 8 * 16
    assert elements == [
        ("bn", "batch_norm", size),
        ("", "gelu", size),
        ("", "add", size),
        ("", "pooling", size),
        ("norm", "layer_norm", size),
    ]
    products, elements = summary(records_of(Block(), (16, 16, 3), lambda path: path.startswith(("mid", "head/bias"))))
    assert products == [
        ("stem", "conv", 0, False, False),
        ("fc1", "dense", 0, False, False),
        ("mid", "depthwise", 0, True, True),
        ("head", "dense", 1, False, True),
    ]
    assert [kind for _, kind, _ in elements] == ["pooling", "layer_norm"]


def test_paper_flops_by_hand():
    records = {r.path: r for r in records_of(Block(), (16, 16, 3)) if isinstance(r, Product)}
    # one block, three functions; channels are multiples of 16; dx and dW; sums over 64 tokens; bias
    assert paper_flops(records["fc1"], lp_l1(2)) == 4 * 3 * 16 * 16 + 64 * 3 * (2 * 16 + 16) + 64 * 16
    assert paper_flops(records["fc1"]) == 4 * 64 * 16 * 16 + 64 * 16
    # windows along an axis: 7 of 3 and 1 of 2, where the kernel hangs over the edge
    assert paper_flops(records["stem"]) == 2 * 23 * 23 * 3 * 16 + 64 * 16
    # 5 classes round up to 16
    assert paper_flops(records["head"]) == 4 * 16 * 16 + 5
    assert paper_flops(Elementwise("", "gelu", 7)) == 120 * 7


class OwnNorm(nn.LayerNorm):
    """A norm by another name."""


NORMS = {
    "n1": nn.LayerNorm,
    "n2": nn.RMSNorm,
    "n3": functools.partial(nn.GroupNorm, num_groups=2),
    "n4": nn.InstanceNorm,
    "n5": OwnNorm,
    "n6": functools.partial(nn.BatchNorm, use_running_average=True),
}


class Normalised(nn.Module):
    """Norms of other sources under names that say nothing, behind one layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(4, name="layer")(x)
        for name, norm in NORMS.items():
            x = norm(name=name)(x)
        return x.mean((1, 2))


def test_every_norm_counts_once():
    norms = [(r.path, r.kind, r.elements) for r in records_of(Normalised(), (3, 3, 3)) if isinstance(r, Elementwise)]
    assert norms == [(name, "batch_norm" if name == "n6" else "layer_norm", 3 * 3 * 4) for name in NORMS]


class Shared(nn.Module):
    """Two layers whose calls JAX traces once, under recomputation and functions with derivatives of their own."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for name in ("a", "b"):
            x = nn.remat(Gelu)(name=name)(x)
        return x.mean((1, 2))


@jax.jit
def jitted_gelu(x: jax.Array) -> jax.Array:
    return gelu(x)


class Gelu(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jitted_gelu(LowRankDense(3, lp_l1(2), name="fc")(x))


def test_equations_inside_calls_belong_to_the_module_that_called():
    records = [(r.path, r.kind) for r in records_of(Shared(), (8, 8, 3))]
    assert records == [("a/fc", "dense"), ("a", "gelu"), ("b/fc", "dense"), ("b", "gelu")]


class Powers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.ones, (3, 3))
        return jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=2)[0]


def test_loops_are_refused():
    with pytest.raises(ValueError, match="inside a scan cannot be told apart"):
        records_of(Powers(), (4, 4, 3))
