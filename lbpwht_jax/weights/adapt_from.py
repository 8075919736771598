"""``adapt_from``: a model under the rules that an adapter's folder tells, whether ``save_adapter`` or PEFT wrote it."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lbpwht_jax.adaptation.entry import adapt, find
from lbpwht_jax.adaptation.layer import Layer
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.matching import Found
from lbpwht_jax.adaptation.rules import Freeze, LoRA, LowRank, Rule
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.weights.adapter_config import AdapterConfig, read_config
from lbpwht_jax.weights.files import read_safetensors
from lbpwht_jax.weights.peft import PREFIX, TENSORS, Model, info_of, load_adapter, module_key

M = TypeVar("M", bound=nnx.Module)
_LARGEST_ALPHA = 1e9
_BRANCH = re.compile(r"(?:(.*)\.)?lora_A\.weight")


@overload
def adapt_from(
    folder: str | Path, model: nn.Module, *args: Any, variables: Any = None, name: Model = None, rngs: Any = None, **kwargs: Any
) -> tuple[AdaptedModule, dict[str, Any]]: ...


@overload
def adapt_from(folder: str | Path, model: M, *args: Any, name: Model = None, rngs: Any = None, **kwargs: Any) -> M: ...


def adapt_from(
    folder: str | Path,
    model: Any,
    *args: Any,
    variables: Mapping[str, Any] | None = None,
    name: Model = None,
    rngs: Any = None,
    **kwargs: Any,
) -> Any:
    """Adapts a model as the adapter in a folder was, and puts the adapter in.

    Ranks and trained modules are read from the tensors, alphas and low-rank rules from ``adapter_config.json``. What the
    folder holds nothing of is frozen, as PEFT has it.

    Args:
      folder: what ``save_adapter`` or PEFT's ``save_pretrained`` wrote.
      model: the Linen or NNX model that was adapted; PEFT's folders are read for timm's models.
      *args, **kwargs: an example call, as for ``adapt``.
      variables: a Linen model's variables, the pretrained ones that training started from. Without them, ``model.init`` draws
        all that the adapter does not hold.
      rngs: a key, or keys by name, for that ``model.init``; left out, key 0, the same values each time. For an NNX model as for
        ``adapt``: the keys of its dropout, and of the example call.
      name: the model's name in the registry or its ``ModelInfo``, for timm's keys, as for ``save_adapter``; ``None`` for a
        model of others, and for models whose timm keys follow from the paths (the vision transformers).

    Returns:
      For a Linen model ``(adapted, variables)``; for an NNX model the adapted copy, which holds its variables.

    Raises:
      TypeError: as ``adapt``; if ``rngs`` is given beside a Linen model's ``variables``, where nothing is drawn.
      ValueError: if a file is damaged or not an adapter's, if the adapter is DoRA's or has branches of layers that the model
        does not have, or a layer's alpha is missing; and as ``adapt`` and ``load_adapter`` do.
      FileNotFoundError: if a file is missing.
    """
    info, folder = info_of(name), Path(folder)
    config = read_config(folder)
    tensors, _ = read_safetensors(folder / TENSORS)
    if config.dora:
        raise ValueError(f"{config.path}: use_dora is set, and DoRA's magnitudes are not read; train with LoRA instead")
    if variables is not None and rngs is not None:
        raise TypeError("adapt_from: give variables or rngs, not both: with variables nothing is drawn")
    call = {**kwargs, "rngs": rngs} if isinstance(model, nnx.Module) else kwargs
    found = find(model, *args, **call)
    adapted = adapt(model, _rules(info, found, config, tensors), *args, **call)
    if not isinstance(adapted, AdaptedModule):
        return load_adapter(folder, adapted, model=info)
    if variables is None:
        variables = _initial(adapted.module, jax.random.key(0) if rngs is None else rngs, args, kwargs)
    return adapted, load_adapter(folder, adapted, variables, info)


def _rules(info: ModelInfo, found: Found, config: AdapterConfig, tensors: Mapping[str, np.ndarray]) -> list[Rule]:
    layers = {module_key(info, layer.path): layer for layer in found.layers}
    ranks = _ranks(config, layers, tensors)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, layer in layers.items():
        low = config.low_rank.get(key, {"spec": None, "grid": None, "prefix_tokens": 0})
        alpha = config.alpha_of(key) if key in ranks else 0
        if key in ranks and not (alpha is not None and 0 < alpha <= _LARGEST_ALPHA):
            raise ValueError(
                f"{config.path}: {key or 'the top level'} has alpha {alpha}; lora_alpha or alpha_pattern must give a positive "
                f"one, at most {_LARGEST_ALPHA:g}"
            )
        if key in ranks or low["spec"] is not None:
            groups.setdefault((ranks.get(key, 0), alpha, *low.values()), []).append(layer.path)
    rules: list[Rule] = []
    for (rank, alpha, spec, grid, prefix_tokens), paths in groups.items():
        at = {"grid": grid, "prefix_tokens": prefix_tokens}
        branch = LoRA(_exactly(paths), rank, alpha, spec, **at, dropout=config.dropout, rslora=config.rslora) if rank else None
        rules.append(branch or LowRank(_exactly(paths), spec, **at))
    names = [key.removeprefix(PREFIX).removeprefix("params.").replace("/", ".") for key in tensors]
    saved = {name.rpartition(".")[0] for name in names}
    branches = {layers[key].path for key in ranks}
    frozen = [path for path in found.parameters if path not in branches and _is_absent(info, path, saved)]
    return [*rules, Freeze(_exactly(frozen))] if frozen else rules


def _ranks(config: AdapterConfig, layers: Mapping[str, Layer], tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The ranks of the branches by timm's module path."""
    ranks = {}
    for key, tensor in tensors.items():
        if match := _BRANCH.fullmatch(key.removeprefix(PREFIX)):
            name = match[1] or ""
            axis = len(layers[name].stack.sizes) if name in layers else 0
            ranks[name] = tensor.shape[axis] if tensor.ndim > axis else 0
            if not ranks[name]:
                raise ValueError(f"{config.path.parent}: {key} {list(tensor.shape)} has no rank")
    unknown = sorted(ranks.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"{config.path.parent}: the adapter has branches of {', '.join(key or 'the top level' for key in unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}, which are no dense layers of the model that the "
            f"example call reaches; the model's are {', '.join(list(layers)[:5])}, ... For a model of the registry give name="
        )
    return ranks


def _is_absent(info: ModelInfo, path: str, saved: Collection[str]) -> bool:
    return module_key(info, path) not in saved and path.replace("/", ".") not in saved


def _exactly(paths: Iterable[str]) -> str:
    """A regular expression found in these paths alone."""
    return f"^(?:{'|'.join(map(re.escape, paths))})$"


def _initial(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> Any:
    """Fresh variables, for an example call that may hold shapes alone."""

    def filled(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    args, kwargs = jax.tree.map(filled, (tuple(args), dict(kwargs)))
    return jax.jit(lambda rngs: module.init(rngs, *args, **kwargs))(rngs)
