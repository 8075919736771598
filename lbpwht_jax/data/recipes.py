"""The recipes of the paper's authors for its seven data sets."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lbpwht_jax.data.augmentation import Augmentation

_COMMON = {
    "epochs": 50,
    "batch_size": 64,
    "weight_decay": 1e-5,
    "clip": 5.0,
    "warmup_steps": 1000,
    "min_ratio": 0.01,
    "label_smoothing": 0.1,
    "seed": 233,
    "augmentation": Augmentation(crop_scale=(0.08, 1.0), flip=True),
}

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cifar10": _COMMON | {"lr": 1e-4},
        "cifar100": _COMMON | {"lr": 1e-4, "clip": 0.0},
        "cars196": _COMMON | {"lr": 5e-4},
        "oxford_flowers102": _COMMON | {"lr": 2e-4, "warmup_steps": 100, "min_ratio": 0.001},
        "food101": _COMMON | {"lr": 2e-4},
        "oxford_iiit_pet": _COMMON | {"lr": 1e-4},
        "places365_small": _COMMON | {"lr": 1e-4},
    }
)
"""The fields of a training recipe, by the data set's TFDS name; a ``clip`` of 0 means no clipping."""


def paper_recipe(dataset: str) -> Mapping[str, Any]:
    """The paper's recipe for a data set, as fields of ``Recipe``.

    Args:
      dataset: a name for ``open_dataset``; a folder or zip file is recognised by its own name, as in
        ``folder:data/cifar10.zip``.

    Raises:
      ValueError: if the paper has no such data set.
    """
    kind, _, rest = dataset.partition(":")
    name = rest.split(":")[0] if kind == "tfds" else rest.rstrip("/").rpartition("/")[2].removesuffix(".zip")
    if name not in RECIPES:
        raise ValueError(f"the paper has no recipe for {dataset}; it has one for {', '.join(RECIPES)}")
    return RECIPES[name]
