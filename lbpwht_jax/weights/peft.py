"""Reads and writes only what training changed (LoRA's branches, the head, all else that was trained), in PEFT's layout."""

import collections
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.resolution import Adaptation
from lbpwht_jax.models import model_info
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.weights.bounded import open_regular
from lbpwht_jax.weights.differences import check_same
from lbpwht_jax.weights.files import parse_json, read_safetensors
from lbpwht_jax.weights.patterns import compile_pattern
from lbpwht_jax.weights.timm_keys import describe, flat_to_timm, from_timm_array, timm_key
from lbpwht_jax.weights.write import write_safetensors

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_LETTERS = {lora.A: "lora_A", lora.B: "lora_B"}
_PLAIN = ModelInfo(nn.Module, {}, Images(0))

Model = str | ModelInfo | None


def save_adapter(folder: str | Path, adapted: AdaptedModule, variables: Mapping[str, Any], model: Model = None) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``.

    The tensors are the parameters that were trained, and the other variables (running statistics) of modules that are not
    frozen. Their keys are ``base_model.model.`` and timm's key; for a branch timm's module path with ``lora_A.weight``,
    ``[rank, inputs]``, and ``lora_B.weight``, ``[outputs, rank]`` (and two dimensions of 1 for 1x1 convolutions; those of a
    stack of scanned layers have the stack's dimensions first). PEFT has one dropout for all branches: the largest.

    Args:
      folder: made if it does not exist; files of these two names are replaced.
      adapted: the adapted model.
      variables: variables of ``adapted``.
      model: the model's name in the registry or its ``ModelInfo``, for timm's keys and layouts. ``None`` for any other model:
        the keys then follow from the paths, ``blocks_0/fc1/kernel`` being ``blocks.0.fc1.weight``; variables that would
        share a key keep their whole path, joined with dots.

    Raises:
      ValueError: if the name is unknown.
    """
    info = _info(model)
    flat = traverse_util.flatten_dict(dict(variables))
    keys = _keys(info, _saved(adapted, flat))
    tensors = {key: np.array(_to_file(info, adapted, path, flat[path]), order="C") for path, key in keys.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(info, adapted, tensors), indent=2) + "\n")


def load_adapter(
    folder: str | Path, adapted: AdaptedModule, variables: Mapping[str, Any], model: Model = None
) -> dict[str, Any]:
    """Puts what ``save_adapter`` wrote into variables.

    Args:
      folder: the folder that holds the two files.
      adapted: the model under the rules that it was trained with.
      variables: variables of ``adapted`` or of the model that it adapts: the pretrained ones that training started from.
      model: see ``save_adapter``.

    Returns:
      Variables of ``adapted``; the arrays read are NumPy's, in the dtypes of ``variables`` (branches in their kernel's).

    Raises:
      ValueError: if the name is unknown, a file is damaged or not an adapter's (the text names the place), the branches' alphas
        are not ``adapted``'s, or tensors are missing, unexpected or mis-shaped, with lists of them.
      FileNotFoundError: if a file is missing.
    """
    info, folder = _info(model), Path(folder)
    config = _read_config(folder / CONFIG)
    tensors, _ = read_safetensors(folder / TENSORS)
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(variables))
    for adaptation in _branches(adapted):
        kernel = flat[_path(adaptation, "kernel")]
        stack = kernel.shape[: kernel.ndim - len(adaptation.layer.kernel_shape)]
        for name, shape in lora.shapes(adaptation).items():
            flat[_path(adaptation, name)] = np.empty((*stack, *shape), kernel.dtype)
    keys = _keys(info, _saved(adapted, flat))
    check_same(
        {key: describe(_to_file(info, adapted, path, flat[path])) for path, key in keys.items()},
        {key: describe(tensor) for key, tensor in tensors.items()},
        f"{folder}: the adapter does not fit the model and its rules",
    )
    _check_scales(folder, info, adapted, config)
    for path, key in keys.items():
        flat[path] = _from_file(info, adapted, path, tensors[key]).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat)


def _info(model: Model) -> ModelInfo:
    if model is None:
        return _PLAIN
    return model_info(model) if isinstance(model, str) else model


def _branches(adapted: AdaptedModule) -> list[Adaptation]:
    return [adaptation for adaptation in adapted.resolution.adaptations if adaptation.rank]


def _path(adaptation: Adaptation, leaf: str) -> tuple[str, ...]:
    return ("params", *filter(None, adaptation.layer.path.split("/")), leaf)


def _is_pointwise(info: ModelInfo, adapted: AdaptedModule, path: tuple[str, ...]) -> bool:
    """Whether the branch at ``path`` is beside a 1x1 convolution."""
    layer = next(adaptation.layer for adaptation in _branches(adapted) if _path(adaptation, path[-1]) == path)
    return layer.kind == "Conv" or re.search(info.files.pointwise, f"{layer.path}/kernel") is not None


def _keys(info: ModelInfo, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Each variable's key in the file, by its path."""

    def key(path: tuple[str, ...]) -> str:
        if path[-1] not in _LETTERS:
            return timm_key(info, path)
        return f"{timm_key(info, (*path[:-1], 'kernel')).removesuffix('weight')}{_LETTERS[path[-1]]}.weight"

    keys = {path: key(path) for path in paths}
    uses = collections.Counter(keys.values())
    return {path: _PREFIX + (key if uses[key] == 1 else ".".join(path)) for path, key in keys.items()}


def _to_file(info: ModelInfo, adapted: AdaptedModule, path: tuple[str, ...], value: Any) -> np.ndarray:
    """A variable as a tensor in the file's layout."""
    if path[-1] not in _LETTERS:
        [tensor] = flat_to_timm(info, {path: value}).values()
        return tensor
    matrix = np.asarray(value).swapaxes(-1, -2)
    return matrix.reshape(*matrix.shape, 1, 1) if _is_pointwise(info, adapted, path) else matrix


def _from_file(info: ModelInfo, adapted: AdaptedModule, path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Undoes ``_to_file``."""
    if path[-1] not in _LETTERS:
        return from_timm_array(info, path, tensor)
    return (tensor.reshape(tensor.shape[:-2]) if _is_pointwise(info, adapted, path) else tensor).swapaxes(-1, -2)


def _saved(adapted: AdaptedModule, paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    def saved(path: tuple[str, ...]) -> bool:
        if path[0] == "params":
            return adapted.trainable("/".join(path[1:]))
        return "/".join(path[1:-1]) not in adapted.resolution.frozen

    return [path for path in paths if saved(path)]


def _targets(info: ModelInfo, adapted: AdaptedModule) -> dict[str, Adaptation]:
    """The adaptations with a branch, by timm's module path."""
    keys = {timm_key(info, _path(adaptation, "kernel")): adaptation for adaptation in _branches(adapted)}
    return {key.removesuffix(".weight"): adaptation for key, adaptation in keys.items()}


def _config(info: ModelInfo, adapted: AdaptedModule, tensors: Iterable[str]) -> dict[str, Any]:
    targets = _targets(info, adapted)
    counts = collections.Counter((adaptation.rank, adaptation.alpha) for adaptation in targets.values())
    rank, alpha = max(counts, key=lambda pair: counts[pair]) if counts else (0, 0)
    dropout = max((adaptation.dropout for adaptation in targets.values()), default=0.0)
    trained = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in tensors if ".lora_" not in key}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "rank_pattern": {re.escape(key): a.rank for key, a in targets.items() if a.rank != rank},
        "alpha_pattern": {re.escape(key): a.alpha for key, a in targets.items() if a.alpha != alpha},
        "modules_to_save": sorted(trained - {""}),
        "bias": "none",
        "lora_dropout": dropout,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    """The adapter's configuration, as far as it is used; raises ValueError naming the file and what is wrong in it."""
    try:
        with open_regular(path) as file:
            text = file.read().decode()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from None
    config = parse_json(text, f"{path}", "file")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object such as PEFT writes, got {_kind(config)}")
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern must be an object of alphas by module, got {_kind(patterns)}")
    for place, value in {"lora_alpha": alpha, **{f"alpha_pattern {key!r}": value for key, value in patterns.items()}}.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise ValueError(f"{path}: {place} must be a number, got {_kind(value)}")
    return config


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _ends_with(key: str, pattern: re.Pattern) -> bool:
    """Whether a module's whole path, or what follows one of its dots, is what a pattern of PEFT's matches."""
    starts = [0, *(i + 1 for i, character in enumerate(key) if character == ".")]
    return any(pattern.fullmatch(key, start) for start in starts)


def _check_scales(folder: Path, info: ModelInfo, adapted: AdaptedModule, config: Mapping[str, Any]) -> None:
    patterns = {
        pattern: compile_pattern(pattern, f"{folder / CONFIG}: alpha_pattern") for pattern in config.get("alpha_pattern") or {}
    }
    for key, adaptation in _targets(info, adapted).items():
        matching = (config["alpha_pattern"][pattern] for pattern, compiled in patterns.items() if _ends_with(key, compiled))
        alpha = next(matching, config.get("lora_alpha"))
        if alpha != adaptation.alpha or config.get("use_rslora") or config.get("use_dora"):
            raise ValueError(
                f"{folder / CONFIG}: {key} has alpha {alpha}, use_rslora={bool(config.get('use_rslora'))} and "
                f"use_dora={bool(config.get('use_dora'))}; the model's rule has alpha {adaptation.alpha} and neither. "
                f"Make the rule LoRA(..., rank={adaptation.rank}, alpha={alpha}) if that is all that differs"
            )
