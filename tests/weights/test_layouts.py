"""Other sources' names become timm's. The fixtures hold keys and shapes: timm's by timm 1.0.31, transformers' by saving with
transformers 4.57, Snap's from the constructors of their models."""

import json
from pathlib import Path

import numpy as np
import pytest

from lbpwht_jax.weights.layouts import to_timm_layout

KEYS = Path(__file__).parents[1] / "fixtures" / "keys"
BUFFERS = ("attention_bias_idxs",)


def shapes(path):
    return {key: tuple(shape) for key, shape in json.loads((KEYS / f"{path}.json").read_text()).items()}


def parameters(path):
    return {key: shape for key, shape in shapes(path).items() if not key.endswith(BUFFERS)}


@pytest.mark.parametrize(
    ("source", "model", "layout"),
    [
        ("timm", "vit_tiny_patch16_224", "timm"),
        ("timm", "deit_tiny_distilled_patch16_224", "timm"),
        ("timm", "efficientformer_l1", "timm"),
        ("timm", "efficientformerv2_s0", "timm"),
        ("timm", "swinv2_tiny_window8_256", "timm"),
        ("transformers", "vit_tiny_patch16_224", "transformers ViT or DeiT"),
        ("transformers", "swinv2_tiny_window8_256", "transformers SwinV2"),
        ("snap", "efficientformer_l1", "Snap EfficientFormer"),
        ("snap", "efficientformerv2_s0", "Snap EfficientFormerV2"),
    ],
)
def test_whole_models(source, model, layout):
    name, state = to_timm_layout({key: np.zeros(shape) for key, shape in shapes(f"{source}/{model}").items()})
    assert name == layout
    assert {k: v.shape for k, v in state.items() if not k.endswith(BUFFERS)} == parameters(f"timm/{model}")


def values(*keys, shape=(2, 3)):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape) for key in keys}


def test_queries_keys_and_values_are_joined_in_timms_order():
    prefix = "vit.encoder.layer.3.attention.attention."
    source = values(*(f"{prefix}{part}.weight" for part in ("value", "key", "query")), "vit.embeddings.cls_token")
    _, state = to_timm_layout(source)
    parts = [source[f"{prefix}{part}.weight"] for part in ("query", "key", "value")]
    np.testing.assert_array_equal(state["blocks.3.attn.qkv.weight"], np.concatenate(parts))
    assert state.keys() == {"blocks.3.attn.qkv.weight", "cls_token"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"deit.embeddings.distillation_token": "dist_token", "deit.embeddings.position_embeddings": "pos_embed"}, None),
        ({"deit.embeddings.cls_token": "cls_token", "cls_classifier.bias": "head.bias"}, None),
        ({"deit.embeddings.cls_token": "cls_token", "distillation_classifier.weight": "head_dist.weight"}, None),
        ({"embeddings.cls_token": "cls_token", "encoder.layer.0.output.dense.bias": "blocks.0.mlp.fc2.bias"}, None),
        ({"vit.embeddings.cls_token": "cls_token", "vit.pooler.dense.bias": None, "vit.embeddings.mask_token": None}, None),
        (
            {
                "swinv2.encoder.layers.2.downsample.norm.bias": "layers.3.downsample.norm.bias",
                "swinv2.encoder.layers.0.blocks.1.attention.self.value.bias": "layers.0.blocks.1.attn.v_bias",
                "swinv2.encoder.layers.0.blocks.1.attention.self.relative_position_index": None,
            },
            None,
        ),
        (
            {
                "layers.0.downsample.reduction.weight": "layers.1.downsample.reduction.weight",
                "layers.2.downsample.norm.weight": "layers.3.downsample.norm.weight",
                "layers.1.blocks.0.attn.q_bias": "layers.1.blocks.0.attn.q_bias",
                "layers.0.blocks.1.attn_mask": None,
                "layers.0.blocks.0.attn.relative_coords_table": None,
                "head.weight": "head.fc.weight",
            },
            "Microsoft SwinV2",
        ),
        (
            {"layers.0.downsample.reduction.weight": "layers.1.downsample.reduction.weight", "head.fc.bias": "head.fc.bias"},
            None,
        ),
    ],
)
def test_names(source, expected):
    """Each array arrives under its new name, unchanged; buffers and what the models lack are dropped."""
    state = values(*source)
    layout, renamed = to_timm_layout(state)
    assert renamed.keys() == {new for new in source.values() if new}
    for old, new in source.items():
        if new:
            np.testing.assert_array_equal(renamed[new], state[old])
    assert expected in (None, layout)


def test_layer_scales_lose_their_window():
    source = {
        "network.0.0.mlp.mid.weight": np.zeros((4, 1, 3, 3)),
        "network.0.0.layer_scale_2": np.arange(4.0).reshape(4, 1, 1),
    }
    np.testing.assert_array_equal(to_timm_layout(source)[1]["stages.0.blocks.0.ls2.gamma"], np.arange(4.0))


def test_meta_dinov2():
    """With registers, timm has no position of the class token: it is added to the token itself."""
    tensors = values("cls_token", "blocks.0.ls1.gamma", "norm.weight") | values("mask_token", shape=(1, 3))
    tensors |= values("pos_embed", shape=(1, 5, 3))
    layout, plain = to_timm_layout(tensors)
    assert layout == "Meta DINOv2"
    assert plain.keys() == tensors.keys() - {"mask_token"}
    np.testing.assert_array_equal(plain["pos_embed"], tensors["pos_embed"])
    registers = values("register_tokens", shape=(1, 4, 3)) | values("cls_token", shape=(1, 1, 3))
    _, state = to_timm_layout(tensors | registers)
    np.testing.assert_array_equal(state["reg_token"], registers["register_tokens"])
    np.testing.assert_array_equal(state["cls_token"], registers["cls_token"] + tensors["pos_embed"][:, :1])
    np.testing.assert_array_equal(state["pos_embed"], tensors["pos_embed"][:, 1:])
