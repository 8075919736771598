"""What timm says of published weights in the ``config.json`` beside them: the model, and the images it was trained on."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lbpwht_jax.models import Images, list_models
from lbpwht_jax.weights.bounded import open_regular
from lbpwht_jax.weights.files import parse_json
from lbpwht_jax.weights.sources import download, hub_id, local_file

_CONFIG = "config.json"
_LARGEST = 2**20  # bytes; timm's have a few thousand


@dataclasses.dataclass(frozen=True)
class TimmConfig:
    """What a ``config.json`` of timm's says.

    Attributes:
      where: the file, for messages.
      architecture: the model's name.
      images: what timm calls ``pretrained_cfg``.
    """

    where: str
    architecture: str
    images: Mapping[str, Any]

    def over(self, images: Images) -> Images:
        """``images`` with what the file says of them.

        Raises:
          ValueError: if a value is not one that such images can have.
        """
        like = {"input_size": images.shape[::-1], "mean": images.mean, "std": images.std, "crop_pct": images.crop}
        found = {key: self.images.get(key, default) for key, default in like.items()}
        interpolation = self.images.get("interpolation", images.interpolation)
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"{self.where}: interpolation must be bicubic or bilinear, got {interpolation!r}")
        for key, default in like.items():
            given, wanted = (np.asarray(value) for value in (found[key], default))
            if given.shape != wanted.shape or given.dtype.kind not in "if" or not (key == "mean" or (given > 0).all()):
                raise ValueError(f"{self.where}: {key} must be like {self.architecture}'s, {default}, got {found[key]!r}")
        channels, height, width = found["input_size"]
        if channels != images.channels or height != width:
            wanted = f"square images of {images.channels} channels"
            raise ValueError(f"{self.where}: input_size must be that of {wanted}, got {found['input_size']}")
        mean, std = tuple(found["mean"]), tuple(found["std"])
        return Images(height, channels, mean, std, interpolation, found["crop_pct"])


def timm_config(source: str | os.PathLike, *, offline: bool = False) -> TimmConfig | None:
    """Reads the ``config.json`` beside weights.

    Args:
      source: as for ``read_weights``.
      offline: uses only the hub's local cache, without the network.

    Returns:
      What it says; ``None`` if there is none, or it is not timm's (transformers', or that of a run).

    Raises:
      ValueError: if it is damaged.
      FileNotFoundError: if the source is neither on this machine nor a hub id.
      ImportError: if the source is a hub id and huggingface_hub is missing.
    """
    weights = local_file(source)
    if weights is None:
        try:
            path = download(hub_id(source), offline, (_CONFIG,))
        except FileNotFoundError:
            return None
    else:
        path = weights.parent / _CONFIG
    if not path.is_file():
        return None
    with open_regular(path) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        return None
    known = parse_json(text.decode(errors="replace"), f"{path}", "file")
    if not isinstance(known, dict) or "pretrained_cfg" not in known:
        return None
    architecture, images = known.get("architecture"), known["pretrained_cfg"]
    if not isinstance(architecture, str) or not isinstance(images, dict):
        raise ValueError(f"{path}: architecture must be a name and pretrained_cfg an object")
    return TimmConfig(f"{path}", architecture, images)


def timm_model(source: str | os.PathLike, *, offline: bool = False) -> str | None:
    """The model that weights are of, by timm's names of them or what ``timm_config`` reads; ``None`` if neither tells."""
    if local_file(source) is None:
        name = hub_id(source).removeprefix("timm/").partition(".")[0]
        if name in list_models():
            return name
    found = timm_config(source, offline=offline)
    return None if found is None else found.architecture
