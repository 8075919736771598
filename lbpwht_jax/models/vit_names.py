"""The vision transformers by timm's names; image settings are those of the weights that timm gives to a name by default."""

import dataclasses
import re

from lbpwht_jax.models.info import NOTHING, Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.vit import VisionTransformer, resample_positions
from lbpwht_jax.models.vit_options import Options

_SIZES = {
    "micro": {"dim": 96, "depth": 6, "heads": 4},
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "medium": {"dim": 512, "depth": 12, "heads": 8},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
    "so400m": {"dim": 1152, "depth": 27, "heads": 16, "mlp_ratio": 3.7362},
}


def _info(name: str, images: Images, options: Options) -> ModelInfo:
    """The model of the size and patches that its name says."""
    size, patch = re.findall(rf"_({'|'.join(_SIZES)})_(?:distilled_)?patch(\d+)_", name)[0]
    arguments = {**_SIZES[size], "patch_size": int(patch), "distilled": "_distilled_" in name, "options": options}
    # A plain transformer has no stages; the last quarter of its blocks stands in for the last one.
    depth = arguments["depth"]
    last = "|".join(str(i) for i in range(depth - max(depth // 4, 1), depth))
    attended = options.pooling == "attention"
    low_rank = r"blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$" + r"|^attn_pool/kv$" * attended
    last_stage = rf"^(blocks_({last})|norm|{'attn_pool|' * attended}head(_dist)?)(/|$)"
    # Files of models that average have the attention pooling of the weights they come from, which timm leaves out too.
    ignored = r"^attn_pool\." if options.pooling == "average" else NOTHING
    layers = Layers(low_rank=low_rank, last_stage=last_stage)
    return ModelInfo(VisionTransformer, arguments, images, layers, TimmFiles(resample=resample_positions, buffers=ignored))


def _half(size: int, crop: float) -> Images:
    return Images(size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=crop)


def _clip(crop: float) -> Images:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return Images(224, mean=mean, std=std, crop=crop)


_VIT = _half(224, 0.9)
_VIT_384 = _half(384, 1.0)
_DEIT = Images(224, crop=0.9)
_DEIT_3 = Options(prefix_positions=False, layer_scale=1e-6)

_PLAIN = {
    "vit_micro_patch4_28": Images(28, channels=1, mean=(0.5,), std=(0.5,)),
    "vit_tiny_patch16_224": _VIT,
    "vit_tiny_patch16_384": _VIT_384,
    "vit_small_patch8_224": _DEIT,  # DINO's weights
    "vit_small_patch16_224": _VIT,
    "vit_small_patch16_384": _VIT_384,
    "vit_small_patch32_224": _VIT,
    "vit_small_patch32_384": _VIT_384,
    "vit_base_patch8_224": _VIT,
    "vit_base_patch16_224": _VIT,
    "vit_base_patch16_384": _VIT_384,
    "vit_base_patch32_224": _VIT,
    "vit_base_patch32_384": _VIT_384,
    "vit_large_patch14_224": _VIT,
    "vit_large_patch16_224": _VIT,
    "vit_large_patch16_384": _VIT_384,
    "vit_large_patch32_224": _VIT,
    "vit_large_patch32_384": _VIT_384,
    **{f"deit_{size}_patch16_224": _DEIT for size in ("tiny", "small", "base")},
    **{f"deit_{size}_distilled_patch16_224": _DEIT for size in ("tiny", "small", "base")},
}
_CLIP = Options(pre_norm=True, epsilon=1e-5)
_QUICK = dataclasses.replace(_CLIP, activation="quick_gelu")
_DINO_V2 = Options(layer_scale=1e-5)
_DINO_V2_REGISTERS = Options(layer_scale=1e-5, registers=4, prefix_positions=False)

_WITH_OPTIONS = {
    **{f"deit3_{size}_patch16_224": (_DEIT, _DEIT_3) for size in ("small", "medium", "base", "large")},
    **{f"deit3_{size}_patch16_384": (Images(384), _DEIT_3) for size in ("small", "base", "large")},
    "deit3_huge_patch14_224": (_DEIT, _DEIT_3),
    "vit_base_patch16_clip_224": (_clip(0.95), _CLIP),
    "vit_base_patch16_clip_quickgelu_224": (_clip(1.0), _QUICK),
    "vit_base_patch32_clip_224": (_clip(0.9), _CLIP),
    "vit_base_patch32_clip_quickgelu_224": (_clip(0.9), _QUICK),
    "vit_large_patch14_clip_224": (_half(224, 1.0), _CLIP),
    "vit_large_patch14_clip_quickgelu_224": (_clip(1.0), _QUICK),
    **{f"vit_{size}_patch14_dinov2": (Images(518), _DINO_V2) for size in ("small", "base", "large")},
    **{f"vit_{size}_patch14_reg4_dinov2": (Images(518), _DINO_V2_REGISTERS) for size in ("small", "base", "large")},
    **{f"vit_{kind}_siglip_224": (_VIT, Options(pooling="attention")) for kind in ("base_patch16", "so400m_patch14")},
    **{f"vit_{kind}_siglip_gap_224": (_VIT, Options(pooling="average")) for kind in ("base_patch16", "so400m_patch14")},
}

MODELS = {name: _info(name, images, Options()) for name, images in _PLAIN.items()} | {
    name: _info(name, *rest) for name, rest in _WITH_OPTIONS.items()
}
