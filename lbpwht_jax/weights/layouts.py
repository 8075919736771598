"""Renames the tensors of published weights, in the layouts they come in, to timm's names."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one source names its tensors.

    Attributes:
      name: the layout's name, for messages.
      sign: regular expression that some key matches, from its start, only in files of this layout.
      renames: regular expressions and replacements, applied in turn to every key.
      dropped: regular expression, matched from the start of a key, for entries that the models do not have (computed buffers).
      finish: a change that names alone cannot express, applied after the renames.
    """

    name: str
    sign: str
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    dropped: str = "(?!)"
    finish: Callable[[State], State] = dict


def to_timm_layout(state: Mapping[str, np.ndarray]) -> tuple[str, State]:
    """Renames a state dict of any known layout, which is recognised by its keys, to timm's.

    Args:
      state: tensors by name.

    Returns:
      The layout's name and the state dict under timm's names; a state dict of no known layout is taken to be timm's already.

    Raises:
      ValueError, IndexError: if two tensors get the same name, or those that timm has as one cannot be joined.
    """
    for layout in LAYOUTS:
        if any(re.match(layout.sign, key) for key in state):
            renamed = {}
            for key, value in state.items():
                if re.match(layout.dropped, key):
                    continue
                for pattern, replacement in layout.renames:
                    key = re.sub(pattern, replacement, key)
                if key in renamed:
                    raise ValueError(f"in the {layout.name} layout two tensors are timm's {key}")
                renamed[key] = value
            return layout.name, layout.finish(renamed)
    return "timm", dict(state)


def _fuse_qkv(state: State) -> State:
    """Joins ``attn.{query,key,value}`` into timm's ``attn.qkv``; SwinV2's biases of queries and values stay apart."""
    state = dict(state)
    for query in [key for key in state if key.endswith(".attn.query.weight")]:
        prefix = query.removesuffix("query.weight")
        for leaf in ("weight", "bias"):
            names = [f"{prefix}{part}.{leaf}" for part in ("query", "key", "value")]
            if all(name in state for name in names):
                state[f"{prefix}qkv.{leaf}"] = np.concatenate([state.pop(name) for name in names])
    return {re.sub(r"\.attn\.(q|v)(uery|alue)\.bias$", r".attn.\1_bias", key): value for key, value in state.items()}


def _flatten_layer_scales(state: State) -> State:
    """Reshapes layer scales from ``[channels, 1, 1]`` to ``[channels]``."""
    return {key: value.reshape(-1) if key.endswith(".gamma") else value for key, value in state.items()}


def _place_class_token(state: State) -> State:
    """Adds the class token's position to it where there are registers; timm's models with registers place patches alone."""
    if "reg_token" not in state or "cls_token" not in state or "pos_embed" not in state:
        return state
    positions = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def _after(match: re.Match) -> str:
    """Names the next stage: timm puts a downsampling into the stage after it, the authors into the stage before it."""
    return f"layers.{int(match[1]) + 1}.downsample"


_TRANSFORMERS = (
    (r"\.patch_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(attention|self)\.", ".attn."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_SNAP = (
    (r"^network\.(\d)\.(?=\d)", lambda match: f"stages.{int(match[1]) // 2}.blocks."),
    (r"^network\.(\d)\.", lambda match: f"stages.{int(match[1]) // 2 + 1}.downsample."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"^dist_head\.", "head_dist."),
)

LAYOUTS = (
    Layout(
        "transformers ViT or DeiT",
        r"(vit|deit)\.embeddings\.|embeddings\.cls_token$",
        (
            (r"^(?:(?:vit|deit)\.)?(?=embeddings|encoder|layernorm)", "."),
            *_TRANSFORMERS,
            (r"^\.embeddings(?=\.patch_embed)", ""),
            (r"^\.embeddings\.position_embeddings$", "pos_embed"),
            (r"^\.embeddings\.distillation_token$", "dist_token"),
            (r"^\.embeddings\.cls_token$", "cls_token"),
            (r"^\.encoder\.layer\.", "blocks."),
            (r"^\.layernorm\.", "norm."),
            (r"^(cls_)?classifier\.", "head."),
            (r"^distillation_classifier\.", "head_dist."),
            (r"^\.", ""),
        ),
        dropped=r"(vit\.|deit\.)?(pooler\.|embeddings\.mask_token$)",
        finish=_fuse_qkv,
    ),
    Layout(
        "transformers SwinV2",
        r"swinv2\.",
        (
            (r"^swinv2(?=\.)", ""),
            *_TRANSFORMERS,
            (r"^\.embeddings\.norm\.", "patch_embed.norm."),
            (r"^\.embeddings\.", ""),
            (r"^\.encoder\.", ""),
            (r"^\.layernorm\.", "norm."),
            (r"^classifier\.", "head.fc."),
            (r"layers\.(\d+)\.downsample", _after),
        ),
        dropped=r".*\.(relative_position_index|relative_coords_table)$|swinv2\.embeddings\.mask_token$",
        finish=_fuse_qkv,
    ),
    Layout(
        "Microsoft SwinV2",
        r"layers\.0\.downsample\.reduction\.",
        ((r"^layers\.(\d+)\.downsample", _after), (r"^head\.(?!fc\.)", "head.fc.")),
        dropped=r".*\.(relative_position_index|relative_coords_table|attn_mask)$",
    ),
    Layout(
        "Meta DINOv2",
        r"mask_token$",
        ((r"^register_tokens$", "reg_token"),),
        dropped=r"mask_token$",
        finish=_place_class_token,
    ),
    Layout(
        "Snap EfficientFormerV2",
        r"network\.0\.0\.mlp\.mid\.",
        (
            (r"^patch_embed\.0\.", "stem.conv1.conv."),
            (r"^patch_embed\.1\.", "stem.conv1.bn."),
            (r"^patch_embed\.3\.", "stem.conv2.conv."),
            (r"^patch_embed\.4\.", "stem.conv2.bn."),
            *_SNAP,
            (r"\.mlp\.(fc1|fc2|mid)\.", r".mlp.\1.conv."),
            (r"\.mlp\.norm(\d)\.", r".mlp.fc\1.bn."),
            (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
            (r"\.q\.local\.0\.", ".q.local."),
            (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.0\.", r".\1.conv."),
            (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.1\.", r".\1.bn."),
            (r"\.proj\.1\.", ".proj.conv."),
            (r"\.proj\.2\.", ".proj.bn."),
            (r"\.downsample\.(conv|proj)\.", ".downsample.conv.conv."),
            (r"\.downsample\.(bn|norm)\.", ".downsample.conv.bn."),
        ),
        dropped=r".*\.attention_bias_idxs$",
        finish=_flatten_layer_scales,
    ),
    Layout(
        "Snap EfficientFormer",
        r"network\.0\.0\.mlp\.",
        (
            (r"^patch_embed\.0\.", "stem.conv1."),
            (r"^patch_embed\.1\.", "stem.norm1."),
            (r"^patch_embed\.3\.", "stem.conv2."),
            (r"^patch_embed\.4\.", "stem.norm2."),
            *_SNAP,
            (r"\.downsample\.proj\.", ".downsample.conv."),
        ),
        dropped=r".*\.attention_bias_idxs$",
        finish=_flatten_layer_scales,
    ),
)
