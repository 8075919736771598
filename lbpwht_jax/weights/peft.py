"""What training changed, alone, in a folder laid out as PEFT's: LoRA's branches, the head and all else that was trained."""

import collections
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy
from flax import traverse_util

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.rules import Adaptation
from lbpwht_jax.models import model_info
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.weights.files import read_safetensors
from lbpwht_jax.weights.timm_keys import Entry, assemble, check, flat_to_timm, timm_key

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_LETTERS = {lora.A: "lora_A", lora.B: "lora_B"}
_PLAIN = ModelInfo(nn.Module, {}, Images(0))

Model = str | ModelInfo | None


def save_adapter(folder: str | Path, adapted: AdaptedModule, variables: Mapping[str, Any], model: Model = None) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``.

    The tensors are those that were trained, and the other variables (running statistics) of modules that are not frozen.
    Their keys are ``base_model.model.`` and timm's key; for a branch timm's module path with ``lora_A.weight``,
    ``[rank, inputs]``, and ``lora_B.weight``, ``[outputs, rank]`` (and two dimensions of 1 for 1x1 convolutions).

    Args:
      folder: made if there is none; its files of these names are replaced.
      adapted: the adapted model.
      variables: of ``adapted``.
      model: the registry's name of the model or its ``ModelInfo``, for timm's keys and layouts. For models of other sources
        ``None``: keys follow from the paths, ``blocks_0/fc1/kernel`` being ``blocks.0.fc1.weight``.

    Raises:
      ValueError: if the name is unknown.
    """
    info = _info(model)
    flat = traverse_util.flatten_dict(dict(variables))
    tensors = {}
    for path in _saved(adapted, flat):
        if path[-1] in _LETTERS:
            adaptation, matrix = _branch(adapted, path), np.asarray(flat[path])
            tensors[_branch_key(info, path)] = matrix.T.reshape(_branch_shape(info, adaptation, path))
        else:
            tensors |= {_PREFIX + key: value for key, value in flat_to_timm(info, {path: flat[path]}).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.array(value, order="C") for key, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(info, adapted, tensors), indent=2) + "\n")


def load_adapter(
    folder: str | Path, adapted: AdaptedModule, variables: Mapping[str, Any], model: Model = None
) -> dict[str, Any]:
    """Variables with what ``save_adapter`` wrote put in.

    Args:
      folder: holding the two files.
      adapted: the model under the rules it was trained with.
      variables: of ``adapted`` or of the model it adapts; the same pretrained ones that training began with.
      model: as for ``save_adapter``.

    Returns:
      Variables of ``adapted``; the arrays read are NumPy's, float32.

    Raises:
      ValueError: if the name is unknown, a file is damaged, the branches are scaled otherwise than ``adapted``'s, or tensors
        are missing, unexpected or mis-shaped, with the list of them.
      FileNotFoundError: if a file is missing.
    """
    info, folder = _info(model), Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG}: no JSON file: {error}") from None
    tensors, _ = read_safetensors(folder / TENSORS)
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(variables))
    flat |= {_path(adaptation, name): None for adaptation in _branches(adapted) for name in _LETTERS}
    branches, others = [], []
    for path in _saved(adapted, flat):
        if path[-1] in _LETTERS:
            shape = _branch_shape(info, _branch(adapted, path), path)
            branches.append(Entry(path, _branch_key(info, path), shape))
        else:
            [(key, value)] = flat_to_timm(info, {path: flat[path]}).items()
            others.append(Entry(path, _PREFIX + key, value.shape))
    check([*branches, *others], tensors, f"{folder}: the adapter does not fit the model and its rules")
    _check_scales(folder, info, adapted, config)
    flat |= {entry.path: np.array(tensors[entry.key], np.float32).reshape(entry.shape[:2]).T for entry in branches}
    flat |= traverse_util.flatten_dict(assemble(info, others, tensors))
    return traverse_util.unflatten_dict(flat)


def _info(model: Model) -> ModelInfo:
    if model is None:
        return _PLAIN
    return model_info(model) if isinstance(model, str) else model


def _branches(adapted: AdaptedModule) -> list[Adaptation]:
    return [adaptation for adaptation in adapted.resolution.adaptations if adaptation.rank]


def _path(adaptation: Adaptation, leaf: str) -> tuple[str, ...]:
    return ("params", *filter(None, adaptation.layer.path.split("/")), leaf)


def _branch(adapted: AdaptedModule, path: tuple[str, ...]) -> Adaptation:
    return next(adaptation for adaptation in _branches(adapted) if _path(adaptation, path[-1]) == path)


def _branch_key(info: ModelInfo, path: tuple[str, ...]) -> str:
    kernel = timm_key(info, (*path[:-1], "kernel"))
    return f"{_PREFIX}{kernel.removesuffix('weight')}{_LETTERS[path[-1]]}.weight"


def _branch_shape(info: ModelInfo, adaptation: Adaptation, path: tuple[str, ...]) -> tuple[int, ...]:
    """Of the tensor in the file."""
    layer = adaptation.layer
    matrix = lora.shapes(adaptation)[path[-1]][::-1]
    pointwise = layer.kind == "Conv" or re.search(info.files.pointwise, f"{layer.path}/kernel")
    return (*matrix, 1, 1) if pointwise else matrix


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
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _check_scales(folder: Path, info: ModelInfo, adapted: AdaptedModule, config: Mapping[str, Any]) -> None:
    for key, adaptation in _targets(info, adapted).items():
        patterns = config.get("alpha_pattern") or {}
        matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key))
        alpha = next(matching, config.get("lora_alpha"))
        if alpha != adaptation.alpha or config.get("use_rslora") or config.get("use_dora"):
            raise ValueError(
                f"{folder / CONFIG}: {key} has alpha {alpha}, use_rslora={bool(config.get('use_rslora'))} and "
                f"use_dora={bool(config.get('use_dora'))}; the model's rule has alpha {adaptation.alpha} and neither. "
                f"Make the rule LoRA(..., rank={adaptation.rank}, alpha={alpha}) if that is all that differs"
            )
