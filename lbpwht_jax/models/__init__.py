"""Vision transformers by timm's names: plain Linen modules, and what the registry knows of each."""

from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.models.registry import create_model, list_models, model_info

__all__ = ["ModelInfo", "create_model", "list_models", "model_info"]
