"""Reads and writes only what training changed (LoRA's branches, the head, all else that was trained), in PEFT's layout."""

import collections
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.layer import Adaptation, Layer
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.resolution import Resolution
from lbpwht_jax.models import model_info
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.weights.adapter_config import AdapterConfig, read_config, write_config
from lbpwht_jax.weights.adapter_tree import filled, flat_variables, replaced, resolution, value
from lbpwht_jax.weights.differences import check_same
from lbpwht_jax.weights.files import read_safetensors
from lbpwht_jax.weights.timm_keys import describe, flat_to_timm, from_timm_array, timm_key
from lbpwht_jax.weights.write import write_safetensors

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LETTERS = {lora.A: "lora_A", lora.B: "lora_B"}
PLAIN = ModelInfo(nn.Module, {}, Images(0))

Model = str | ModelInfo | None


def save_adapter(
    folder: str | Path, adapted: AdaptedModule | nnx.Module, variables: Mapping[str, Any] | None = None, model: Model = None
) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``.

    The tensors are the parameters that were trained, and the other variables (running statistics) of modules that are not
    frozen. Their keys are ``base_model.model.`` and timm's key; for a branch timm's module path with ``lora_A.weight``,
    ``[rank, inputs]``, and ``lora_B.weight``, ``[outputs, rank]`` (for convolutions the window follows, ones in B; those of a
    stack of scanned layers have the stack's dimensions first). PEFT has one dropout for all branches: the largest. The
    configuration is PEFT's; the low-rank rules, which PEFT has not, stand in an entry of their own, which PEFT ignores with a
    warning.

    Args:
      folder: made if it does not exist; files of these two names are replaced.
      adapted: the adapted model, a Linen or an NNX one.
      variables: variables of ``adapted``; left out for an NNX model, which holds its own.
      model: the model's name in the registry or its ``ModelInfo``, for timm's keys and layouts. ``None`` for any other model:
        the keys then follow from the paths, ``blocks_0/fc1/kernel`` being ``blocks.0.fc1.weight``; variables that would
        share a key keep their whole path, joined with dots.

    Raises:
      TypeError: if a Linen model's variables are missing, or an NNX model's are given.
      ValueError: if the name is unknown, a branch is missing, or some LoRA rules have ``rslora`` and others not.
    """
    info, rules = info_of(model), resolution(adapted)
    flat = flat_variables(adapted, variables, "save_adapter")
    missing = [a.layer.path for a in rules.branches if _path(a, lora.A) not in flat]
    if missing:
        raise ValueError(f"save_adapter: the variables lack the LoRA branch of {missing[0]}; were they merged?")
    keys = _keys(info, _saved(rules, flat))
    tensors = {key: np.array(_to_file(info, rules, path, value(flat[path])), order="C") for path, key in keys.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    trained = [key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if ".lora_" not in key]
    write_config(folder, {module_key(info, a.layer.path): a for a in rules.adaptations}, trained)


def load_adapter(
    folder: str | Path, adapted: AdaptedModule | nnx.Module, variables: Mapping[str, Any] | None = None, model: Model = None
) -> Any:
    """Puts what ``save_adapter`` or PEFT wrote into variables.

    Args:
      folder: the folder that holds the two files.
      adapted: the model under the rules that it was trained with; ``adapt_from`` reads them from the folder instead.
      variables: variables of ``adapted`` or of the model that it adapts: the pretrained ones that training started from. Left
        out for an NNX model, which holds its own.
      model: see ``save_adapter``.

    Returns:
      Variables of ``adapted``; the arrays read are NumPy's, in the dtypes of ``variables`` (branches in their kernel's). For
      an NNX model a copy of it.

    Raises:
      TypeError: if a Linen model's variables are missing, or an NNX model's are given.
      ValueError: if the name is unknown, a file is damaged or not an adapter's (the text names the place), the branches' alphas
        are not ``adapted``'s, or tensors are missing, unexpected or mis-shaped, with lists of them.
      FileNotFoundError: if a file is missing.
    """
    info, folder, rules = info_of(model), Path(folder), resolution(adapted)
    config = read_config(folder)
    tensors, _ = read_safetensors(folder / TENSORS)
    flat = flat_variables(adapted, variables, "load_adapter")
    for adaptation in rules.branches:
        if _path(adaptation, "kernel") not in flat:
            raise ValueError(f"load_adapter: the variables have no {adaptation.layer.path}/kernel; give the model's own")
        dtype, stack = value(flat[_path(adaptation, "kernel")]).dtype, adaptation.layer.stack
        for name, shape in lora.shapes(adaptation).items():
            flat[_path(adaptation, name)] = lora.from_front(np.empty((*stack.sizes, *shape), dtype), stack.matrix_axes)
    keys = _keys(info, _saved(rules, flat))
    check_same(
        {key: describe(_to_file(info, rules, path, value(flat[path]))) for path, key in keys.items()},
        {key: describe(tensor) for key, tensor in tensors.items()},
        f"{folder}: the adapter does not fit the model and its rules",
    )
    _check_scales(info, rules, config)
    for path, key in keys.items():
        array = _from_file(info, rules, path, tensors[key]).astype(value(flat[path]).dtype)
        flat[path] = replaced(flat[path], array)
    return filled(adapted, flat)


def info_of(model: Model) -> ModelInfo:
    """What is known of the files of a model, by its name or ``ModelInfo``; ``None`` for a model of others."""
    if model is None:
        return PLAIN
    return model_info(model) if isinstance(model, str) else model


def module_key(info: ModelInfo, path: str) -> str:
    """timm's path of the module at a path here."""
    return timm_key(info, ("params", *filter(None, path.split("/")), "kernel")).removesuffix("weight").removesuffix(".")


def _path(adaptation: Adaptation, leaf: str) -> tuple[str, ...]:
    return ("params", *filter(None, adaptation.layer.path.split("/")), leaf)


def _keys(info: ModelInfo, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Each variable's key in the file, by its path."""

    def key(path: tuple[str, ...]) -> str:
        if path[-1] not in _LETTERS:
            return timm_key(info, path)
        return f"{timm_key(info, (*path[:-1], 'kernel')).removesuffix('weight')}{_LETTERS[path[-1]]}.weight"

    keys = {path: key(path) for path in paths}
    uses = collections.Counter(keys.values())
    return {path: PREFIX + (key if uses[key] == 1 else ".".join(path)) for path, key in keys.items()}


def _branch(info: ModelInfo, rules: Resolution, path: tuple[str, ...]) -> tuple[Layer, tuple[int, ...]]:
    """The layer of the branch at ``path``, and the window of the tensor: none for a dense layer."""
    layer = next(adaptation.layer for adaptation in rules.branches if _path(adaptation, path[-1]) == path)
    is_conv = layer.convolution or re.search(info.files.pointwise, f"{layer.path}/kernel") is not None
    ones = (1,) * (len(layer.kernel_shape) - 2 or 2) if is_conv else ()
    return layer, (layer.window or ones) if path[-1] == lora.A else ones


def _to_file(info: ModelInfo, rules: Resolution, path: tuple[str, ...], array: Any) -> np.ndarray:
    """A variable as a tensor in the file's layout."""
    if path[-1] not in _LETTERS:
        [tensor] = flat_to_timm(info, {path: array}).values()
        return tensor
    layer, window = _branch(info, rules, path)
    matrix = lora.to_front(np.asarray(array), layer.stack.matrix_axes).swapaxes(-1, -2)
    if not window:
        return matrix
    tensor = matrix.reshape(*matrix.shape[:-1], *window, -1)  # the window's places come first here, last in the file
    return np.moveaxis(tensor, -1, -1 - len(window))


def _from_file(info: ModelInfo, rules: Resolution, path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Undoes ``_to_file``."""
    if path[-1] not in _LETTERS:
        return from_timm_array(info, path, tensor)
    layer, window = _branch(info, rules, path)
    if window:
        tensor = np.moveaxis(tensor, -1 - len(window), -1)
        tensor = tensor.reshape(*tensor.shape[: -1 - len(window)], -1)
    return lora.from_front(tensor.swapaxes(-1, -2), layer.stack.matrix_axes)


def _saved(rules: Resolution, paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    def saved(path: tuple[str, ...]) -> bool:
        if path[0] == "params":
            return rules.trainable("/".join(path[1:]))
        return "/".join(path[1:-1]) not in rules.frozen

    return [path for path in paths if saved(path)]


def _check_scales(info: ModelInfo, rules: Resolution, config: AdapterConfig) -> None:
    for adaptation in rules.branches:
        key = module_key(info, adaptation.layer.path)
        alpha = config.alpha_of(key)
        if alpha != adaptation.alpha or config.rslora != adaptation.rslora or config.dora:
            raise ValueError(
                f"{config.path}: {key} has alpha {alpha}, use_rslora={config.rslora} and use_dora={config.dora}; the model's "
                f"rule has alpha {adaptation.alpha}, rslora={adaptation.rslora} and no DoRA. Make the rule LoRA(..., "
                f"rank={adaptation.rank}, alpha={alpha}, rslora={config.rslora}) if that is all that differs"
            )
