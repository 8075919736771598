"""Rules resolved on the layers that a model has.

Neither Flax nor arrays are needed here: layers are known by their paths and shapes.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

from lbpwht_jax.adaptation.rules import Freeze, LoRA, LowRank, Rule
from lbpwht_jax.adaptation.table import text_table
from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.spec import Grid, LowRankSpec
from lbpwht_jax.ops.validate import check_grid


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer or 1x1 convolution of a model.

    Attributes:
      path: the module's path, joined by "/".
      kind: the name of its class.
      input_shape: the shape of its input; the dimensions that the kernel contracts are joined into one, the last.
      kernel_shape: the kernel's shape as stored.
      outputs: number of output channels.
      contracted: how many dimensions of the input the kernel contracts.
      grid: tokens along each axis, if the layer knows them.
      prefix_tokens: leading tokens outside the grid, if the layer knows them.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    outputs: int
    contracted: int = 1
    grid: Grid | None = None
    prefix_tokens: int = 0

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.input_shape[-1]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How one layer is adapted.

    Attributes:
      layer: the layer.
      spec: the Walsh functions kept in its backward pass; ``None`` for an exact one.
      grid: tokens along each axis; ``None`` for channels-last maps and where ``spec`` is ``None``.
      prefix_tokens: leading tokens outside the grid.
      shown_grid: tokens along each axis, given for maps too.
      rank: rank of the LoRA branch, 0 without one.
      alpha: alpha of the LoRA branch.
      dropout: probability of zeros in the input of the LoRA branch while training.
      slower: whether the rule's spec, whose ``when`` is ``"faster"``, was left out because low rank is predicted to be slower.
    """

    layer: Layer
    spec: LowRankSpec | None
    grid: Grid | None = None
    prefix_tokens: int = 0
    shown_grid: Grid | None = None
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    slower: bool = False

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank`` of the LoRA branch."""
        return self.alpha / self.rank

    @property
    def branch_parameters(self) -> int:
        """Number of parameters in the LoRA branch, 0 without one."""
        return self.rank * (self.layer.inputs + self.layer.outputs)

    @property
    def method(self) -> str:
        """How the layer is adapted, for people to read."""
        parts = ["LoRA"] * bool(self.rank) + ["LowRank"] * (self.spec is not None)
        return " + ".join(parts + ["full: LowRank is slower"] * self.slower) or "full"

    @property
    def ranks(self) -> str:
        """The rank of the branch and the number of Walsh functions, those of them that there are, for people to read."""
        return " + ".join(str(rank) for rank in (self.rank, self.spec.rank if self.spec else 0) if rank)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Rules resolved on a model; ``print`` shows it as a table.

    Attributes:
      adaptations: the layers that ``LowRank`` and ``LoRA`` adapt.
      frozen: paths of the modules whose own parameters are frozen, those under ``LoRA`` among them.
      parameters: pairs of a module's path and the number of its own parameters, without those of branches.
    """

    adaptations: tuple[Adaptation, ...]
    frozen: frozenset[str]
    parameters: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        by_path = {adaptation.layer.path: adaptation for adaptation in self.adaptations}
        rows, total = [], 0
        for path, own in self.parameters:
            adaptation = by_path.get(path)
            trainable = (0 if path in self.frozen else own) + (adaptation.branch_parameters if adaptation else 0)
            if adaptation is None:
                method, grid, rank = "frozen" if path in self.frozen else "full", "", ""
            else:
                method, grid, rank = adaptation.method, "x".join(map(str, adaptation.shown_grid or ())), adaptation.ranks
            rows.append((path or "(top level)", method, grid, rank, f"{trainable:,}"))
            total += trainable
        return text_table(_COLUMNS, rows, ("total", "", "", "", f"{total:,}"))


_COLUMNS = {"path": "<", "method": "<", "grid": ">", "rank": ">", "trainable parameters": ">"}


def resolve_rules(layers: Sequence[Layer], parameters: Mapping[str, int], rules: Sequence[Rule]) -> Resolution:
    """Finds the first rule that matches each module.

    Args:
      layers: the model's dense layers.
      parameters: the number of each module's own parameters by path, for modules that have some.
      rules: the rules, in the order in which they are tried.

    Raises:
      TypeError: if one of ``rules`` is not a rule.
      ValueError: if a rule matches nothing, with the nearest paths; if a layer's grid cannot be known or does not fit.
    """
    by_path = {layer.path: layer for layer in layers}
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"adapt: rules are LowRank, LoRA and Freeze, got {rule!r}")
        _check_matches(rule, by_path, parameters)
    adaptations, frozen = [], set()
    for path in parameters:
        rule = next((r for r in rules if (isinstance(r, Freeze) or path in by_path) and re.search(r.pattern, path)), None)
        if isinstance(rule, Freeze | LoRA):
            frozen.add(path)
        if isinstance(rule, LowRank | LoRA):
            adaptations.append(_adaptation(by_path[path], rule))
    ordered = sorted(parameters.items(), key=lambda item: _natural(item[0]))
    return Resolution(tuple(adaptations), frozenset(frozen), tuple(ordered))


def _natural(path: str) -> list[tuple[str, int]]:
    """A sorting key that puts ``blocks_10`` after ``blocks_2``."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", path)]


def _check_matches(rule: Rule, layers: Mapping[str, Layer], parameters: Mapping[str, int]) -> None:
    candidates = list(parameters if isinstance(rule, Freeze) else layers)
    if any(re.search(rule.pattern, path) for path in candidates):
        return
    name = f"{type(rule).__name__}({rule.pattern!r})"
    others = [path for path in parameters if path not in layers and re.search(rule.pattern, path)]
    if not isinstance(rule, Freeze) and others:
        raise ValueError(
            f"adapt: {name} matches {', '.join(others[:3])}, but no dense layer or 1x1 convolution, which alone it adapts"
        )
    what = "module with parameters" if isinstance(rule, Freeze) else "dense layer or 1x1 convolution"
    nearest = difflib.get_close_matches(rule.pattern, candidates, n=5, cutoff=0.0)
    raise ValueError(f"adapt: {name} matches no {what}; the nearest paths: {', '.join(nearest) or 'there are none'}")


def _adaptation(layer: Layer, rule: LowRank | LoRA) -> Adaptation:
    branch = {}
    if isinstance(rule, LoRA):
        times = 3 if re.search(rule.fused, layer.path) else 1
        branch = {"rank": times * rule.rank, "alpha": times * rule.alpha, "dropout": rule.dropout}
    if rule.spec is None:
        return Adaptation(layer, None, **branch)
    grid, prefix_tokens = rule.grid, rule.prefix_tokens
    if grid is None and not prefix_tokens:
        grid, prefix_tokens = layer.grid, layer.prefix_tokens
    ndim = rule.spec.ndim
    if grid is None and len(layer.input_shape) != ndim + 2:
        sizes = "height, width" if ndim == 2 else "length, " * ndim
        raise ValueError(
            f"adapt: the token grid of {layer.path}, a {layer.kind} on an input {list(layer.input_shape)}, cannot be known; "
            f"say it in the rule: {type(rule).__name__}({rule.pattern!r}, ..., grid=({sizes}), prefix_tokens=...), or leave "
            "the layer out of the pattern"
        )
    name = f"adapt: {layer.path}"
    shown = check_grid(layer.input_shape, rule.spec, grid, prefix_tokens, name)
    tokens = math.prod(shown) + prefix_tokens
    if grid is not None and tokens != layer.input_shape[-2]:
        raise ValueError(
            f"{name}: grid {shown} with {prefix_tokens} prefix tokens makes {tokens} tokens, but the input "
            f"{list(layer.input_shape)} has {layer.input_shape[-2]}; change the rule {type(rule).__name__}({rule.pattern!r})"
        )
    if chosen(rule.spec, shown, prefix_tokens, layer.inputs, layer.outputs) != rule.spec:
        return Adaptation(layer, None, shown_grid=shown, slower=True, **branch)
    return Adaptation(layer, rule.spec, grid if grid is None else shown, prefix_tokens, shown, **branch)
