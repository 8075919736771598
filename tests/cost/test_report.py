"""Costs of whole models, against JAX's program, XLA's count of the compiled backward pass and the command line."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import LowRank, adapt, lp_l1
from lbpwht_jax.adaptation.presets import adapted_model, parse_method
from lbpwht_jax.cli import main
from lbpwht_jax.cost.backward import abstract_variables, backward_flops, residual_bytes
from lbpwht_jax.cost.report import layer_costs, model_cost
from lbpwht_jax.models import model_info
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.ops.residuals import RESIDUALS

MICRO = "vit_micro_patch4_28"
# the same with two blocks, the second of which is the last stage
TWO_BLOCKS = VisionTransformer(10, 28, 4, dim=96, depth=2, heads=4)
SHAPE = (28, 28, 1)
INFO = model_info(MICRO)
INFO = dataclasses.replace(INFO, layers=dataclasses.replace(INFO.layers, last_stage=r"^(blocks_1|norm|head)(/|$)"))
METHODS = [
    ("full", "all"),
    ("full", "last_stage"),
    ("full", "head"),
    ("lp_l1-4", "all"),
    ("lp_linf-2", "last_stage"),
    ("lora-8", "head"),
    ("lora_all-8", "last_stage"),
    ("lp_l1-4+lora-8", "all"),
    ("lp_l1-4+lora_all-8", "last_stage"),
]


@functools.cache
def two_blocks(method="full", train="all", residuals="plain"):
    """The adapted model and the shapes of its variables."""
    settings = dataclasses.replace(TWO_BLOCKS.settings, residuals=RESIDUALS[residuals])
    adapted = adapt(
        TWO_BLOCKS.clone(settings=settings),
        parse_method(method).rules(INFO, train),
        jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32),
    )
    return adapted, abstract_variables(adapted, SHAPE)


@functools.cache
def two_blocks_costs(method="full", train="all", residuals="plain"):
    return layer_costs(*two_blocks(method, train, residuals), SHAPE)


@functools.cache
def two_blocks_residual_bytes(method, residuals):
    return residual_bytes(*two_blocks(method, residuals=residuals), SHAPE)


def costs(adapted, shape):
    return layer_costs(adapted, abstract_variables(adapted, shape), shape)


@pytest.mark.parametrize(("method", "train"), METHODS)
def test_matmul_flops_by_layer_add_up_to_the_program_s(method, train):
    layers = two_blocks_costs(method, train)
    assert sum(layer.backward_flops_matmul for layer in layers) == backward_flops(*two_blocks(method, train), SHAPE)


@pytest.mark.parametrize(
    ("name", "size", "method", "train"),
    [
        ("efficientformer_l1", 64, "lp_l1-4", "last_stage"),
        pytest.param("efficientformerv2_s0", 64, "lp_l1-4+lora-8", "all", marks=pytest.mark.heavy),
        pytest.param("swinv2_tiny_window8_256", 64, "lp_l1-4", "all", marks=pytest.mark.heavy),
    ],
)
def test_matmul_flops_of_every_family_add_up(name, size, method, train):
    adapted, shape = adapted_model(name, method, train, 10, size), (size, size, 3)
    layers = costs(adapted, shape)
    assert sum(layer.backward_flops_matmul for layer in layers) == backward_flops(
        adapted, abstract_variables(adapted, shape), shape
    )
    low_rank = sum("low-rank" in layer.method for layer in layers)
    assert low_rank == len(adapted.resolution.adaptations) > 0


@pytest.mark.parametrize("rank", [None, 8])
def test_matmul_flops_of_a_model_equal_xla_s_count(rank):
    # wide, so that element-wise work, which XLA counts too, is little
    module = VisionTransformer(10, 128, 16, dim=1024, depth=2, heads=8)
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    if rank is not None:
        module = adapt(module, [LowRank(model_info(MICRO).layers.low_rank, lp_l1(rank))], x)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def loss(variables, x):
        return nn.log_softmax(module.apply(variables, x, train=True))[0, 0]

    both, forward = (
        jax.jit(function).lower(variables, x).compile().cost_analysis()["flops"]
        for function in (jax.value_and_grad(loss), loss)
    )
    assert backward_flops(module, variables, (128, 128, 3)) == pytest.approx(both - forward, rel=0.03)


@pytest.mark.parametrize("method", ["lp_l1-2", "lp_l1-4", "lp_l1-8", "lora_all-8", "lp_l1-4+lora_all-8"])
@pytest.mark.parametrize("residuals", ["plain", "lean"])
def test_residual_bytes_by_layer_explain_the_whole_model_s(method, residuals):
    total, by_layer = [], []
    for each in ("full", method):
        total.append(two_blocks_residual_bytes(each, residuals))
        by_layer.append(sum(layer.saved_activation_bytes for layer in two_blocks_costs(each, residuals=residuals)))
    # all that differs between the methods is what the layers keep, and, in bytes, the slope between the two of an MLP: for each
    # of 384 channels that of 50 tokens, or of the prefix token and its mean over sub-blocks of 4x4 or 2x2 tokens
    rows = {"lp_l1-2": 5, "lp_l1-4": 17}.get(method, 50) if residuals == "lean" else 50
    assert total[0] - total[1] == by_layer[0] - by_layer[1] + 2 * 384 * (50 - rows)
    # a branch besides its layer's input keeps its own
    assert (total[1] < total[0]) == method.startswith("lp")


def test_trainable_parameters():
    dim, layers, classes = 96, 2, 10
    kernels = 12 * dim * dim
    block = kernels + 9 * dim + 4 * dim  # biases and norms
    head = (dim + 1) * classes
    rest = (16 + 1) * dim + (1 + 50) * dim  # patches, class token and positions
    branches = 24 * 4 * dim + 8 * (2 * dim + 2 * 5 * dim)  # three times the rank at qkv

    def count(method, train):
        return sum(layer.trainable_parameters for layer in two_blocks_costs(method, train))

    assert count("full", "all") == count("lp_l1-4", "all") == rest + layers * block + 2 * dim + head
    assert count("full", "last_stage") == block + 2 * dim + head
    assert count("full", "head") == head
    assert count("lora_all-8", "head") == layers * branches + head
    assert count("lora_all-8", "last_stage") == branches + 4 * dim + 2 * dim + head


@pytest.mark.heavy
def test_command_line(capsys):
    arguments = ["cost", MICRO, "--method", "lp_l1-4", "--train", "last_stage", "--num-classes", "10"]
    arguments += ["--when", "always"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    cost = model_cost(MICRO, "lp_l1-4", "last_stage", 10)
    assert result == {name: getattr(cost, name) for name in result} and "layers" not in result
    assert set(result) >= {
        "model",
        "method",
        "train",
        "image_size",
        "backward_flops_paper",
        "backward_flops_matmul",
        "saved_activation_bytes",
        "gradient_bytes",
        "trainable_parameters",
        "speedup_vs_full_paper",
    }
    assert result["image_size"] == 28 and result["speedup_vs_full_paper"] > 1
    assert cost.gradient_bytes == 4 * cost.trainable_parameters
    full = model_cost(MICRO, "full", "last_stage", 10)
    assert full.speedup_vs_full_paper == 1
    assert cost.speedup_vs_full_paper == full.backward_flops_paper / cost.backward_flops_paper
    assert main([*arguments, "--json", "--per-layer"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert sum(layer["backward_flops_paper"] for layer in layers) == cost.backward_flops_paper
    assert {"blocks_5/mlp/fc1": "low-rank", "blocks_0/mlp/fc1": "frozen", "head": "full"}.items() <= {
        layer["path"]: layer["method"] for layer in layers if layer["kind"] == "dense"
    }.items()
    assert main([*arguments, "--per-layer"]) == 0
    printed = capsys.readouterr().out
    assert "low-rank" in printed and "trainable parameters" in printed


@pytest.mark.heavy
def test_image_size_is_the_model_s_unless_given():
    assert model_cost(MICRO, num_classes=10).image_size == model_info(MICRO).images.size == 28
    assert model_cost(MICRO, num_classes=10, image_size=32).image_size == 32


@pytest.mark.parametrize("method", ["lp_l1", "lora-0", "lp_l1-4+lp_l1-2", "lora-8+lora_all-8", "full+lora-8", "lp_l1-16"])
def test_unknown_methods(method, capsys):
    assert main(["cost", MICRO, "--method", method]) == 2
    assert "lp_l1" in capsys.readouterr().err or "lora" in method
    with pytest.raises(ValueError, match=r"LoRA|write|r must|lp_l1"):
        adapted_model(MICRO, method)
