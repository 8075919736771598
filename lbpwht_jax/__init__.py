"""Low-rank backpropagation through the Walsh-Hadamard transform, for fine-tuning vision transformers in JAX and Flax.

Each public name is loaded from its room on first use, so that ``lbpwht_jax.ops`` runs without Flax, and the command line says
what it has to say without JAX.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbpwht_jax.adaptation import Freeze, Lean, LoRA, LowRank, adapt, create_model
    from lbpwht_jax.layers import LowRankDense, LowRankLinear
    from lbpwht_jax.models import list_models
    from lbpwht_jax.ops import LowRankSpec, Residuals, fast_walsh_hadamard, low_rank_matmul, lp_l1, lp_linf, walsh_matrix
    from lbpwht_jax.weights import adapt_from, load_adapter, load_pretrained, save_adapter

__version__ = version("lbpwht_jax")

__all__ = [
    "Freeze",
    "Lean",
    "LoRA",
    "LowRank",
    "LowRankDense",
    "LowRankLinear",
    "LowRankSpec",
    "Residuals",
    "__version__",
    "adapt",
    "adapt_from",
    "create_model",
    "fast_walsh_hadamard",
    "list_models",
    "load_adapter",
    "load_pretrained",
    "low_rank_matmul",
    "lp_l1",
    "lp_linf",
    "save_adapter",
    "walsh_matrix",
]

_NAMES = {
    "ops": ("LowRankSpec", "Residuals", "fast_walsh_hadamard", "low_rank_matmul", "lp_l1", "lp_linf", "walsh_matrix"),
    "layers": ("LowRankDense", "LowRankLinear"),
    "models": ("list_models",),
    "adaptation": ("Freeze", "Lean", "LoRA", "LowRank", "adapt", "create_model"),
    "weights": ("adapt_from", "load_adapter", "load_pretrained", "save_adapter"),
}
_ROOM = {name: room for room, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES})
