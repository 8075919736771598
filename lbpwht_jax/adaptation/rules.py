"""Rules that say how the layers of a model are adapted, and their resolution on the layers a model has.

Neither Flax nor arrays come in here: layers are known by their paths and shapes.
"""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.spec import Grid, LowRankSpec
from lbpwht_jax.ops.validate import check_grid

NOTHING = "(?!)"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Backpropagates dense layers at low rank, as ``low_rank_matmul`` does; the forward pass and the parameters stay.

    Attributes:
      pattern: regular expression searched in the layers' paths, such as ``"blocks_0/mlp/fc1"``.
      spec: the Walsh functions kept.
      grid: tokens along each axis of inputs ``[..., prefix_tokens + tokens, channels]``. ``None`` for layers that know
        their own (this library's) and for channels-last maps, ``[batch, height, width, channels]``.
      prefix_tokens: leading tokens outside the grid (class or register tokens).

    Raises:
      ValueError: if the pattern is no regular expression.
      TypeError: if ``spec`` is no ``LowRankSpec``.
    """

    pattern: str
    spec: LowRankSpec
    grid: Grid | None = None
    prefix_tokens: int = 0

    def __post_init__(self):
        _check_pattern(self, self.pattern)
        if not isinstance(self.spec, LowRankSpec):
            raise TypeError(f"LowRank({self.pattern!r}): spec must be a LowRankSpec, such as lp_l1(4), got {self.spec!r}")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Freezes dense layers and trains a low-rank branch beside each: ``y = x W + (alpha / rank) (x A) B`` (Hu et al., 2021).

    ``A`` begins random and ``B`` at zero, so that the output is at first unchanged. Kernel and bias are frozen.

    Attributes:
      pattern: regular expression searched in the layers' paths.
      rank: columns of ``A`` and rows of ``B``.
      alpha: the branch is multiplied by ``alpha / rank``.
      spec: the Walsh functions kept in the backward pass of the layer and its branch; ``None`` backpropagates exactly.
      grid: as for ``LowRank``; needed with ``spec`` only.
      prefix_tokens: as for ``LowRank``.
      fused: regular expression, searched in the paths, of layers that make query, key and value at once: three times the
        rank and alpha.

    Raises:
      ValueError: if a pattern is no regular expression, or rank or alpha is not positive.
      TypeError: if ``spec`` is neither a ``LowRankSpec`` nor ``None``, or rank is no integer.
    """

    pattern: str
    rank: int = 8
    alpha: float = 8
    spec: LowRankSpec | None = None
    grid: Grid | None = None
    prefix_tokens: int = 0
    fused: str = NOTHING

    def __post_init__(self):
        _check_pattern(self, self.pattern)
        _check_pattern(self, self.fused)
        where = f"LoRA({self.pattern!r})"
        if not (self.spec is None or isinstance(self.spec, LowRankSpec)):
            raise TypeError(f"{where}: spec must be a LowRankSpec, such as lp_l1(4), or None, got {self.spec!r}")
        try:
            operator.index(self.rank)
        except TypeError:
            raise TypeError(f"{where}: rank must be an integer, got {self.rank!r}") from None
        if not (self.rank > 0 and self.alpha > 0):
            raise ValueError(f"{where}: rank and alpha must be positive, got rank={self.rank} and alpha={self.alpha}")


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Keeps the parameters of modules as they are.

    Attributes:
      pattern: regular expression searched in the paths of modules that have parameters of their own, such as
        ``"blocks_0/norm1"``; that of the whole model is ``""``.

    Raises:
      ValueError: if the pattern is no regular expression.
    """

    pattern: str

    def __post_init__(self):
        _check_pattern(self, self.pattern)


Rule = LowRank | LoRA | Freeze


def _check_pattern(rule: Any, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{type(rule).__name__}: {pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer or 1x1 convolution of a model.

    Attributes:
      path: of the module, "/"-joined.
      kind: name of its class.
      input_shape: of the input it gets, the dimensions that the kernel contracts taken together, last.
      kernel_shape: as stored.
      outputs: output channels.
      contracted: how many dimensions of the input the kernel contracts.
      grid: tokens along each axis, where the layer knows them.
      prefix_tokens: leading tokens outside the grid, where the layer knows them.
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
        """Input channels."""
        return self.input_shape[-1]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How one layer is adapted.

    Attributes:
      layer: the layer.
      spec: of its backward pass; ``None`` for an exact one.
      grid: tokens along each axis, ``None`` for channels-last maps and where ``spec`` is ``None``.
      prefix_tokens: leading tokens outside the grid.
      shown_grid: tokens along each axis, known for maps too.
      rank: of the LoRA branch, 0 without one.
      alpha: of the LoRA branch.
      slower: whether the rule's spec, whose ``when`` is ``"faster"``, was left out because low rank is predicted to be slower.
    """

    layer: Layer
    spec: LowRankSpec | None
    grid: Grid | None = None
    prefix_tokens: int = 0
    shown_grid: Grid | None = None
    rank: int = 0
    alpha: float = 0.0
    slower: bool = False

    @property
    def scale(self) -> float:
        """What the LoRA branch is multiplied by."""
        return self.alpha / self.rank

    @property
    def branch_parameters(self) -> int:
        """Parameters of the LoRA branch."""
        return self.rank * (self.layer.inputs + self.layer.outputs)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Rules resolved on a model; prints as a table (with rich, or ``str``).

    Attributes:
      adaptations: of the layers that ``LowRank`` and ``LoRA`` took.
      frozen: paths of the modules whose own parameters are frozen, LoRA's among them.
      parameters: pairs of the path of a module and the number of its own parameters, branches not counted.
    """

    adaptations: tuple[Adaptation, ...]
    frozen: frozenset[str]
    parameters: tuple[tuple[str, int], ...]

    def __rich__(self) -> RenderableType:
        adaptations = {adaptation.layer.path: adaptation for adaptation in self.adaptations}
        table = Table()
        table.add_column("path")
        table.add_column("method")
        for heading in ("grid", "rank", "trainable parameters"):
            table.add_column(heading, justify="right")
        total = 0
        for path, count in self.parameters:
            adaptation, method, grid, rank = adaptations.get(path), "full", "", ""
            trainable = 0 if path in self.frozen else count
            if adaptation is None:
                method = "frozen" if path in self.frozen else "full"
            else:
                parts = [("LoRA", adaptation.rank)] * bool(adaptation.rank)
                parts += [("LowRank", adaptation.spec.rank)] if adaptation.spec else []
                parts += [("full: LowRank is slower", "")] * adaptation.slower
                method, rank = (" + ".join(str(part[i]) for part in parts) for i in (0, 1))
                grid = "x".join(map(str, adaptation.shown_grid or ()))
                trainable += adaptation.branch_parameters if adaptation.rank else 0
            total += trainable
            table.add_row(path or "(top level)", method, grid, rank, f"{trainable:,}")
        table.add_section()
        table.add_row("total", "", "", "", f"{total:,}")
        return table

    def __str__(self) -> str:
        console = Console(width=160, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def resolve_rules(layers: Sequence[Layer], parameters: Mapping[str, int], rules: Sequence[Rule]) -> Resolution:
    """Finds for every module the first rule that matches it.

    Args:
      layers: the model's dense layers.
      parameters: number of parameters of each module that has some, by path.
      rules: in the order in which they are tried.

    Raises:
      TypeError: if something else than a rule is among the rules.
      ValueError: if a rule matches nothing, with the nearest paths; if a layer's grid cannot be known.
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
    """Sorts ``blocks_10`` behind ``blocks_2``."""
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
        branch = {"rank": times * rule.rank, "alpha": times * rule.alpha}
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
