import chex
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import Freeze, LoRA, LowRank, create_model, lp_l1, lp_linf
from lbpwht_jax.adaptation import resolve
from lbpwht_jax.adaptation.presets import Method, adapted_model, parse_method
from lbpwht_jax.models import model_info

VIT = model_info("vit_micro_patch4_28")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("full", Method()),
        ("lp_l1-4", Method(lp_l1(4))),
        ("lp_linf-3", Method(lp_linf(3))),
        ("lora-8", Method(None, "attention", 8)),
        ("lora_all-4", Method(None, "all", 4)),
        ("lp_l1-4+lora_all-8", Method(lp_l1(4), "all", 8)),
        ("lora-8+lp_linf-2", Method(lp_linf(2), "attention", 8)),
    ],
)
def test_short_names(name, method):
    assert parse_method(name) == method


def test_fields_go_to_the_spec():
    assert parse_method("lp_l1-4+lora-8", projection="official").spec == lp_l1(4, projection="official")
    assert parse_method("lora-8", projection="official") == Method(None, "attention", 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lp_l1", r"unknown method 'lp_l1'; write full, lp_l1-R or lp_linf-R"),
        ("lp_l1-4+", "unknown method"),
        ("full+lora-8", "unknown method"),
        ("lora-x", "unknown method"),
        ("lora-8+lora_all-8", "names two of a kind"),
        ("lp_l1-4+lp_linf-2", "names two of a kind"),
        ("lora-0", "LoRA's rank must be at least 1"),
        ("lp_l1-16", "r must be from 1 to 15"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


def adapted(model, name, train="all"):
    """Adapted layers with rank of branch and whether low-rank, and the modules that are frozen, of a model."""
    info = model_info(model)
    images = jax.ShapeDtypeStruct((1, *info.images.shape), jnp.float32)
    resolution = resolve(create_model(model, frozen_batch_norm=True), parse_method(name).rules(info, train), images)
    return {a.layer.path: (a.rank, a.spec is not None) for a in resolution.adaptations}, resolution


def test_the_sum_serves_every_layer():
    layers, resolution = adapted("vit_micro_patch4_28", "lp_l1-4+lora_all-8")
    block = {"attn/qkv": (24, True), "attn/proj": (8, True), "mlp/fc1": (8, True), "mlp/fc2": (8, True)}
    assert layers == {f"blocks_{i}/{name}": value for i in range(6) for name, value in block.items()}
    assert resolution.frozen == layers.keys()
    assert {a.scale for a in resolution.adaptations} == {1.0}


def test_lora_on_attention_leaves_the_rest_to_low_rank():
    layers, resolution = adapted("vit_micro_patch4_28", "lp_l1-4+lora-8")
    assert layers["blocks_0/attn/qkv"] == (24, True) and layers["blocks_0/mlp/fc1"] == (0, True)
    assert resolution.frozen == {path for path, (rank, _) in layers.items() if rank}
    layers, _ = adapted("vit_micro_patch4_28", "lora-8")
    assert layers == {f"blocks_{i}/attn/{name}": (r, False) for i in range(6) for name, r in (("qkv", 24), ("proj", 8))}


def test_branches_have_the_rank_of_the_name_and_three_times_that_for_query_key_and_value():
    model = adapted_model("vit_micro_patch4_28", "lora-8", num_classes=10, lora_alpha=16, lora_dropout=0.1)
    assert {(each.scale, each.dropout) for each in model.resolution.adaptations} == {(2.0, 0.1)}
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *VIT.images.shape), jnp.float32))["params"]
    attention = params["blocks_0"]["attn"]
    chex.assert_shape([attention["qkv"]["lora_a"], attention["qkv"]["lora_b"]], [(96, 24), (24, 3 * 96)])
    chex.assert_shape([attention["proj"]["lora_a"], attention["proj"]["lora_b"]], [(96, 8), (8, 96)])


def test_what_is_trained():
    modules = [path for path, _ in adapted("vit_micro_patch4_28", "full")[1].parameters]

    def trained(method, train):
        layers, resolution = adapted("vit_micro_patch4_28", method, train)
        return {path for path in modules if path not in resolution.frozen}, layers

    assert trained("full", "all") == (set(modules), {})
    last = {path for path in modules if path.startswith(("blocks_5/", "norm", "head"))}
    assert trained("full", "last_stage") == (last, {})
    exact, layers = trained("lp_l1-2", "last_stage")
    assert exact == last and set(layers) == {path for path in last if "attn" in path or "mlp" in path}
    assert trained("full", "head") == ({"head"}, {})
    # training the head trains LoRA's branches, wherever they are
    exact, layers = trained("lp_l1-2+lora-8", "head")
    assert exact == {"head"} and len(layers) == 12


@pytest.mark.parametrize(
    ("model", "last", "adapted_layers", "attention"),
    [
        # the last of four stages: two blocks of four layers, and the merging before them
        ("swinv2_tiny_window8_256", {"layers_3", "norm", "head"}, 9, 4),
        # four blocks of fc1 and fc2, one of them with qkv and proj
        ("efficientformer_l1", {"stages_3", "norm", "head", "head_dist"}, 10, 2),
        # four blocks of fc1 and fc2, two with q, k, v, proj and two talking heads; four layers in the downsampling
        ("efficientformerv2_s0", {"stages_3", "norm", "head", "head_dist"}, 24, 16),
    ],
)
def test_the_last_stage_of_every_family(model, last, adapted_layers, attention):
    layers, resolution = adapted(model, "lp_l1-2+lora-8", "last_stage")
    trained = {path.split("/")[0] for path, _ in resolution.parameters if path not in resolution.frozen}
    assert trained == last
    assert len(layers) == adapted_layers
    assert sum(rank > 0 for rank, _ in layers.values()) == attention
    assert {rank for path, (rank, _) in layers.items() if path.endswith("qkv")} <= {24}


def test_mistakes():
    with pytest.raises(ValueError, match="the head alone leaves low-rank backpropagation no layer; use the method full"):
        parse_method("lp_l1-4").rules(VIT, "head")
    with pytest.raises(ValueError, match="train must be one of all, last_stage, head, got 'tail'"):
        parse_method("full").rules(VIT, "tail")


def test_rules_are_plain_rules():
    rules = parse_method("lp_l1-4+lora-8").rules(VIT, "last_stage")
    assert [type(rule) for rule in rules] == [Freeze, LoRA, LowRank]
