"""``adapter_config.json``: PEFT's configuration of an adapter, written and read; and the low-rank rules that PEFT has not."""

import collections
import dataclasses
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbpwht_jax.adaptation.layer import Adaptation
from lbpwht_jax.ops.spec import LowRankSpec
from lbpwht_jax.weights.bounded import open_regular
from lbpwht_jax.weights.files import parse_json
from lbpwht_jax.weights.patterns import compile_pattern

CONFIG = "adapter_config.json"
_LOW_RANK = "lbpwht_jax"


def write_config(folder: Path, layers: Mapping[str, Adaptation], trained: Iterable[str]) -> None:
    """Writes the configuration.

    Args:
      folder: where.
      layers: the adapted layers by timm's module path.
      trained: the module paths of the parameters that are trained as they are.

    Raises:
      ValueError: if some branches are scaled by ``alpha / rank ** 0.5`` and others by ``alpha / rank``: PEFT has one or the
        other for all.
    """
    targets = {key: adaptation for key, adaptation in layers.items() if adaptation.rank}
    counts = collections.Counter((adaptation.rank, adaptation.alpha) for adaptation in targets.values())
    rank, alpha = max(counts, key=lambda pair: counts[pair]) if counts else (0, 0)
    dropout = max((adaptation.dropout for adaptation in targets.values()), default=0.0)
    scalings = {adaptation.rslora for adaptation in targets.values()}
    if len(scalings) > 1:
        raise ValueError("save_adapter: rslora must be the same in all LoRA rules, for PEFT's configuration has it once")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "rank_pattern": {re.escape(key): a.rank for key, a in targets.items() if a.rank != rank},
        "alpha_pattern": {re.escape(key): a.alpha for key, a in targets.items() if a.alpha != alpha},
        "modules_to_save": sorted({*trained} - {""}),
        "use_rslora": scalings == {True},
        "bias": "none",
        "lora_dropout": dropout,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
    groups: dict[Any, list[str]] = {}
    for key, a in layers.items():
        if a.spec is not None:
            groups.setdefault((a.spec, a.grid, a.prefix_tokens), []).append(key)
    if groups:
        config[_LOW_RANK] = [
            {"layers": keys, "spec": dataclasses.asdict(spec), "grid": grid, "prefix_tokens": prefix_tokens}
            for (spec, grid, prefix_tokens), keys in groups.items()
        ]
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a configuration says of the layers.

    Attributes:
      path: the file.
      alpha: LoRA's alpha, of all layers that no pattern names.
      alphas: pairs of a pattern of module paths and their alpha.
      dropout: probability of zeros in the branches' inputs.
      rslora: whether branches are multiplied by ``alpha / rank ** 0.5``.
      dora: whether the adapter is DoRA's, which is not read.
      low_rank: for layers with a low-rank backward pass, by module path: the fields of a rule.
    """

    path: Path
    alpha: Any
    alphas: Sequence[tuple[re.Pattern, Any]]
    dropout: float
    rslora: bool
    dora: bool
    low_rank: Mapping[str, Mapping[str, Any]]

    def alpha_of(self, key: str) -> Any:
        """The alpha of the layer at a module path; ``None`` if there is none."""
        return next((alpha for pattern, alpha in self.alphas if _ends_with(key, pattern)), self.alpha)


def read_config(folder: Path) -> AdapterConfig:
    """The adapter's configuration, as far as it is used.

    Raises:
      ValueError: if it is damaged or not PEFT's; the text names the file and what is wrong in it.
      FileNotFoundError: if it is missing.
    """
    path = folder / CONFIG
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
    alphas = [(compile_pattern(pattern, f"{path}: alpha_pattern"), value) for pattern, value in patterns.items()]
    dropout = config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout must be a number from 0 to less than 1, got {dropout!r}")
    flags: dict[str, Any] = {"dropout": dropout, "rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora"))}
    return AdapterConfig(path, alpha, alphas, low_rank=_low_rank(path, config.get(_LOW_RANK) or []), **flags)


def _low_rank(path: Path, groups: Any) -> dict[str, dict[str, Any]]:
    """The fields of a low-rank rule by module path."""
    try:
        found = {}
        for group in groups:
            grid = group["grid"] and tuple(map(operator.index, group["grid"]))
            spec = LowRankSpec(**{**group["spec"], "bases": tuple(map(tuple, group["spec"]["bases"]))})
            fields = {"spec": spec, "grid": grid, "prefix_tokens": operator.index(group["prefix_tokens"])}
            found |= dict.fromkeys(group["layers"], fields)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {_LOW_RANK} does not hold low-rank rules as save_adapter writes them: {error!r}") from None


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _ends_with(key: str, pattern: re.Pattern) -> bool:
    """Whether a module's whole path, or what follows one of its dots, is what a pattern of PEFT's matches."""
    starts = [0, *(i + 1 for i, character in enumerate(key) if character == ".")]
    return any(pattern.fullmatch(key, start) for start in starts)
