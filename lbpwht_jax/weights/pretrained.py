"""Reads published weights into a model's variables, and writes variables to files that timm loads."""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from flax import traverse_util

from lbpwht_jax.models import ModelInfo, model_info, plain_model
from lbpwht_jax.weights.files import save_weights
from lbpwht_jax.weights.layouts import to_timm_layout
from lbpwht_jax.weights.sources import read_weights
from lbpwht_jax.weights.timm_keys import Entry, assemble, check, entries, flat_to_timm, from_timm, to_timm
from lbpwht_jax.weights.write import write_safetensors

__all__ = ["export_weights", "from_timm", "load_pretrained", "number_of_classes", "read_weights", "to_timm"]

_LOG = logging.getLogger("lbpwht_jax")


def load_pretrained(
    name: str,
    source: str | os.PathLike,
    num_classes: int | None = None,
    image_size: int | None = None,
    *,
    offline: bool = False,
) -> dict[str, Any]:
    """Reads weights into the variables of a model.

    The layout is recognised by the keys: timm's; the authors' EfficientFormer and EfficientFormerV2; transformers' ViT, DeiT
    and SwinV2; Microsoft's SwinV2; Meta's DINOv2; or this library's own (``export_weights(..., format="flax")``). Every tensor
    of the model must be there with the model's shape, and no other; only the head may differ, if ``num_classes`` asks for
    another. (transformers' ViT normalises with epsilon 1e-12 where timm and this library use 1e-6: its logits differ in the
    last digits.)

    Args:
      name: the model's name, one of ``list_models()``.
      source: a ``.safetensors``, ``.pth`` or ``.bin`` file; a folder with ``model.safetensors`` or ``pytorch_model.bin``; or
        a Hugging Face hub id such as ``"timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"``, or timm's name of weights, which is
        the same without ``timm/``; both need the extra ``[hub]``.
      num_classes: outputs of the head; by default as many as the file has. If the file has another number, or no head, the
        head (both heads, if there are two) starts with zeros, and the log (INFO, ``"lbpwht_jax"``) says so.
      image_size: height and width of the images in pixels, by default the model's. What was made for another size is
        resampled, and the log says so: position embeddings as timm does, by antialiased bicubic interpolation;
        EfficientFormer's attention biases, for which timm has no rule, by this library's own: each offset keeps its share
        of the map, interpolated linearly.
      offline: uses only the hub's local cache, without the network.

    Returns:
      ``{"params": ...}``, with ``"batch_stats"`` where the model has batch normalisation: nested dictionaries of float32
      NumPy arrays, for ``create_model(name, num_classes=..., image_size=...).apply``.

    Raises:
      ValueError: if the name is unknown; the file is damaged, of an unknown kind, or would run code; the tensors do not fit,
        with lists of the missing, unexpected and mis-shaped ones.
      FileNotFoundError: if the file or folder is missing, or the hub (or its cache, if offline) has no such weights.
      ImportError: if the source is a hub id and huggingface_hub is missing.
    """
    info = model_info(name)
    where = f"load_pretrained({name!r}, {os.fspath(source)!r})"
    state = _timm_state(info, source, offline)
    module = plain_model(name, num_classes=1, image_size=image_size)
    wanted = entries(info, module)
    heads = _head_keys(wanted, entries(info, plain_model(name, num_classes=2, image_size=image_size)))
    in_file = _classes(state, heads)
    classes = next(count for count in (num_classes, in_file, 1000) if count is not None)
    wanted = [dataclasses.replace(e, shape=(classes, *e.shape[1:])) if e.key in heads else e for e in wanted]
    if num_classes not in (None, in_file):
        _LOG.info("%s: a new head for %d classes, zeros; the file's has %s: %s", where, classes, in_file, ", ".join(heads))
        state |= {e.key: np.zeros(e.shape, np.float32) for e in wanted if e.key in heads}
    state = _resampled(info, module, wanted, state, where)
    check(wanted, state, f"{where}: the file does not fit the model")
    return assemble(info, wanted, state)


def export_weights(
    name: str,
    module: nn.Module,
    variables: Mapping[str, Any],
    path: str | os.PathLike,
    format: Literal["timm", "flax"] = "timm",
    classes: Sequence[str] | None = None,
) -> None:
    """Writes a model's variables as ``.safetensors``.

    Args:
      name: the model's name, one of ``list_models()``.
      module: the model, as ``create_model`` returns it.
      variables: its ``{"params": ..., "batch_stats": ...}``.
      path: the file; an existing one is replaced.
      format: ``"timm"`` for keys and layouts that timm's ``load_state_dict(..., strict=True)`` takes; ``"flax"`` for the
        variables as they are, under keys such as ``"params/blocks_0/attn/qkv/kernel"``.
      classes: the names of the model's outputs in order, written as JSON under ``"classes"`` in the file's header.

    Raises:
      ValueError: if the name or format is unknown, the variables are not the module's, or there are not as many classes as
        outputs; if the path is that of no file, or its folder is not there.
      OSError: if the file cannot be written; one that was there is as it was.
    """
    if format not in ("timm", "flax"):
        raise ValueError(f"export_weights: format must be 'timm' or 'flax', got {format!r}")
    outputs = getattr(module, "num_classes", None)
    if classes is not None and len(classes) != outputs:
        raise ValueError(f"export_weights: {len(classes)} classes are named, and {name} has {outputs} outputs")
    tensors = to_timm(name, module, variables)
    known = {} if classes is None else {"classes": list(classes)}
    if format == "flax":
        save_weights(path, variables, {"model": name, **known})
    else:
        header = {"format": "pt"} | {key: json.dumps(value) for key, value in known.items()}
        write_safetensors(path, tensors, header)


def number_of_classes(name: str, variables: Mapping[str, Any]) -> int:
    """The number of classes of the head in a model's variables.

    Raises:
      ValueError: if the name is unknown or the variables have no head.
    """
    info = model_info(name)
    wanted = entries(info, plain_model(name, num_classes=1))
    heads = _head_keys(wanted, entries(info, plain_model(name, num_classes=2)))
    classes = _classes(flat_to_timm(info, traverse_util.flatten_dict(variables)), heads)
    if classes is None:
        raise ValueError(f"number_of_classes({name!r}): the variables have no head ({', '.join(heads)})")
    return classes


def _timm_state(info: ModelInfo, source: str | os.PathLike, offline: bool) -> dict[str, np.ndarray]:
    state = read_weights(source, offline=offline)
    if any(key.startswith("params/") for key in state):
        renamed = flat_to_timm(info, {tuple(key.split("/")): value for key, value in state.items()})
        if len(renamed) < len(state):
            raise ValueError(f"{os.fspath(source)}: {len(state)} tensors have only {len(renamed)} names in timm's layout")
        return renamed
    try:
        layout, state = to_timm_layout(state)
    except (ValueError, IndexError) as error:  # from NumPy: what must be joined or reshaped has shapes that do not fit
        raise ValueError(f"{os.fspath(source)}: the tensors do not fit together: {error}") from None
    _LOG.info("%s: %s layout", source, layout)
    return {key: value for key, value in state.items() if not re.search(info.files.buffers, key)}


def _head_keys(one: list[Entry], two: list[Entry]) -> list[str]:
    """The keys whose shape depends on the number of classes, found by comparing two numbers."""
    return [a.key for a, b in zip(one, two, strict=True) if a.shape != b.shape]


def _classes(state: Mapping[str, np.ndarray], heads: list[str]) -> int | None:
    return next((state[key].shape[0] for key in heads if key in state and state[key].ndim), None)


def _resampled(
    info: ModelInfo, module: nn.Module, wanted: list[Entry], state: dict[str, np.ndarray], where: str
) -> Mapping[str, np.ndarray]:
    """The state at the module's image size; unchanged if keys or numbers of axes are not the model's: ``check`` reports it."""
    ndims = {e.key: len(e.shape) for e in wanted}
    if info.files.resample is None or ndims != {key: value.ndim for key, value in state.items()}:
        return state
    try:
        result = info.files.resample(state, module)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for key in state:
        if result[key].shape != state[key].shape:
            _LOG.info("%s: resampled %s %s to %s", where, key, list(state[key].shape), list(result[key].shape))
    return result
