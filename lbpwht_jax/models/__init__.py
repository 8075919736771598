"""Vision transformers by timm's names: plain Linen modules, and what the registry knows of each."""

from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.registry import list_models, model_info, plain_model

__all__ = ["Images", "Layers", "ModelInfo", "TimmFiles", "list_models", "model_info", "plain_model"]
