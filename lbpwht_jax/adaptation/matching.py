"""Finds the rule of each module, and says what is wrong with rules that do not fit the model."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from lbpwht_jax.adaptation.layer import Adaptation, Layer
from lbpwht_jax.adaptation.lean import KINDS, LeanModule
from lbpwht_jax.adaptation.resolution import Resolution
from lbpwht_jax.adaptation.rules import ALL_LINEAR, Freeze, Lean, LoRA, LowRank, Rule
from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.spec import Grid
from lbpwht_jax.ops.validate import check_grid

_MOST_PREFIX_TOKENS = 16
_SHOWN = 5


class Found(NamedTuple):
    """What an example call shows of a model.

    Attributes:
      layers: the dense layers that it reaches, in the order of their first calls.
      parameters: the number of each module's own parameters by path, for modules that have some.
      maps: the sizes of the maps that convolutions return, each with the path of one such convolution.
      unreached: paths of dense layers that the call does not reach.
      lean: the norms, convolutions and attentions that the call reaches; ``None`` where the model is none of Linen's.
    """

    layers: Sequence[Layer]
    parameters: Mapping[str, int]
    maps: Mapping[Grid, str]
    unreached: frozenset[str] = frozenset()
    lean: Sequence[LeanModule] | None = None


def resolve_rules(found: Found, rules: Sequence[Rule]) -> Resolution:
    """Finds the first rule that matches each module.

    Args:
      found: the model's layers.
      rules: the rules, in the order in which they are tried.

    Raises:
      TypeError: if ``rules`` is no sequence of rules.
      ValueError: if a rule matches nothing, with the nearest paths, or only what rules before it match; if layers' grids
        cannot be known or do not fit, with all such layers.
    """
    layers = {layer.path: layer for layer in found.layers}
    others = [rule for rule in _checked(rules) if not isinstance(rule, Lean)]
    matches = [_matches(rule, found, _adaptable(rule, layers)) for rule in others]
    held: dict[str, Rule] = {}
    for rule, paths in zip(others, matches, strict=True):
        left = [path for path in paths if path not in held]
        if not left:
            raise ValueError(_nothing_left(rule, paths, held))
        held |= dict.fromkeys(left, rule)
    lean = _lean([rule for rule in rules if isinstance(rule, Lean)], found.lean, held)
    adaptations, problems = [], {}
    for path in found.parameters:
        rule = held.get(path)
        if isinstance(rule, LowRank | LoRA):
            try:
                adaptations.append(_adaptation(layers[path], rule, found.maps))
            except ValueError as error:
                problems.setdefault(str(error).replace(layers[path].shown, "{}"), []).append(path)
    if problems:
        raise ValueError("\n".join(_problem(text, paths) for text, paths in problems.items()))
    frozen = frozenset(path for path, rule in held.items() if isinstance(rule, Freeze | LoRA))
    ordered = sorted(found.parameters.items(), key=lambda item: _natural(item[0]))
    return Resolution(tuple(adaptations), frozen, tuple(ordered), lean)


def _lean(
    rules: Sequence[Lean], modules: Sequence[LeanModule] | None, held: Mapping[str, Rule]
) -> tuple[tuple[str, Residuals], ...]:
    """The setting of each module that a rule matches, the first one that does; ``held`` are the other rules' modules."""
    if rules and modules is None:
        raise ValueError(f"adapt: {_name(rules[0])} is for Linen models alone; leave it out for NNX")
    settings: dict[str, Residuals] = {}
    for rule in rules:
        matched = [module for module in modules or () if re.search(rule.pattern, module.path)]
        if not matched:
            nearest = difflib.get_close_matches(rule.pattern, [module.path for module in modules or ()], n=5, cutoff=0.0)
            raise ValueError(
                f"adapt: {_name(rule)} matches no {KINDS}; the nearest paths: {', '.join(nearest) or 'there are none'}"
            )
        refused = [module for module in matched if module.refusal]
        if refused:
            first = refused[0]
            raise ValueError(
                f"adapt: {_name(rule)} matches {first.path}, a {first.kind} that must stay as it is: {first.refusal}; leave "
                f"{_some([module.path for module in refused])} out of the pattern"
            )
        adapted = [module.path for module in matched if isinstance(held.get(module.path), LowRank | LoRA)]
        if adapted:
            raise ValueError(
                f"adapt: {_name(rule)} matches {adapted[0]}, which {_name(held[adapted[0]])} adapts: that says what it keeps; "
                f"leave {_some(adapted)} out of one of the patterns"
            )
        for module in matched:
            settings.setdefault(module.path, cast(Residuals, rule.setting))
    return tuple(settings.items())


def check_mixing(adaptations: Sequence[Adaptation]) -> None:
    """Raises ValueError if a layer across tokens got a grid: its inputs have as many channels as the grid has tokens."""
    mixing = [a.layer.path for a in adaptations if a.grid is not None and a.layer.mixes_tokens]
    if mixing:
        raise ValueError(
            f"adapt: {_some(mixing)} mixes tokens: along the axis of its input that would be the grid's lie channels, of which "
            "there are as many as tokens. Leave it out of the rules with a grid"
        )


def _checked(rules: Any) -> Sequence[Rule]:
    if isinstance(rules, Rule) or not isinstance(rules, Sequence):
        raise TypeError(f"adapt: rules must be a list of rules, such as [LowRank(...)], got {rules!r}")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"adapt: rules are LowRank, LoRA, Freeze and Lean, got {rule!r}")
    return rules


def _natural(path: str) -> list[tuple[str, int]]:
    """A sorting key that puts ``blocks_10`` after ``blocks_2``."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", path)]


def _matches(rule: Rule, found: Found, layers: Mapping[str, Layer]) -> list[str]:
    """The paths that a rule matches; raises ValueError if there are none."""
    if rule.pattern == ALL_LINEAR and not isinstance(rule, Freeze):
        heads = _heads(list(layers.values()))
        candidates = [path for path in layers if path not in heads]
        paths = candidates
    else:
        candidates = [path for path in found.parameters if isinstance(rule, Freeze) or path in layers]
        paths = [path for path in candidates if re.search(rule.pattern, path)]
    if paths:
        return paths
    name = _name(rule)
    unreached = [path for path in found.unreached if re.search(rule.pattern, path)]
    others = [path for path in found.parameters if path not in layers and re.search(rule.pattern, path)]
    if unreached:
        raise ValueError(f"adapt: {name} matches {_some(unreached)}, which the example call does not reach; give one that does")
    if not isinstance(rule, Freeze) and others:
        raise ValueError(
            f"adapt: {name} matches {_some(others)}, but no dense layer or 1x1 convolution, which alone it adapts, if the "
            "example call reaches it outside nnx.bridge's modules"
        )
    what = "module with parameters" if isinstance(rule, Freeze) else "dense layer or 1x1 convolution"
    nearest = difflib.get_close_matches(rule.pattern, candidates, n=5, cutoff=0.0)
    raise ValueError(f"adapt: {name} matches no {what}; the nearest paths: {', '.join(nearest) or 'there are none'}")


def _adaptable(rule: Rule, layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """The layers that a rule can adapt: convolutions with a window or a stride only by LoRA with an exact backward pass."""
    if isinstance(rule, LoRA) and rule.spec is None and rule.pattern != ALL_LINEAR:
        return layers
    return {path: layer for path, layer in layers.items() if not layer.window}


def _heads(layers: Sequence[Layer]) -> set[str]:
    """The last layer, and those before it that follow the last layer on tokens or maps: heads beside each other."""
    order = list(layers)
    heads = {order[-1].path} if order else set()
    on_tokens = [i for i, layer in enumerate(order) if len(layer.input_shape) > 2]
    return heads | {layer.path for layer in order[on_tokens[-1] + 1 :]} if on_tokens else heads


def _nothing_left(rule: Rule, paths: Sequence[str], held: Mapping[str, Rule]) -> str:
    holders = {_name(held[path]): held[path] for path in paths}
    both = any(isinstance(holder, LowRank) for holder in holders.values()) and isinstance(rule, LoRA)
    hint = ". A layer has one rule; LoRA takes a spec for its backward pass: LoRA(..., spec=...)" if both else ""
    return (
        f"adapt: {_name(rule)} is left nothing: all that it matches, {_some(paths)}, is held by {', '.join(holders)} before "
        f"it; put it first or change a pattern{hint}"
    )


def _name(rule: Rule) -> str:
    return f"{type(rule).__name__}({rule.pattern!r})"


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(path or "the top level" for path in sorted(paths, key=_natural)[:_SHOWN]) + more


def _problem(text: str, paths: Sequence[str]) -> str:
    """What is wrong with the first of the layers, and the others with which the same is wrong."""
    others = f". The same holds for {_some(paths[1:])}" if len(paths) > 1 else ""
    return text.replace("{}", paths[0] or "the top level") + others


def _adaptation(layer: Layer, rule: LowRank | LoRA, maps: Mapping[Grid, str]) -> Adaptation:
    if layer.own_product:
        raise ValueError(f"adapt: {layer.shown} has a {layer.own_product} of its own; leave it out of the rules' patterns")
    branch: dict[str, Any] = {}
    if isinstance(rule, LoRA):
        times = 3 if re.search(rule.fused, layer.path) else 1
        branch = {"rank": times * rule.rank, "alpha": times * rule.alpha, "dropout": rule.dropout, "rslora": rule.rslora}
    if rule.spec is None:
        return Adaptation(layer, None, **branch)
    grid, prefix_tokens = rule.grid, rule.prefix_tokens
    if grid is None and not prefix_tokens:
        grid, prefix_tokens = layer.grid, layer.prefix_tokens
    name = f"adapt: {layer.shown}"
    ndim = rule.spec.ndim
    if grid is None and len(layer.input_shape) != ndim + 2:
        sizes = "height, width" if ndim == 2 else "length, " * ndim
        raise ValueError(
            f"adapt: the token grid of {layer.shown}, a {layer.kind} on an input {list(layer.input_shape)}, cannot be known; "
            f"say it in the rule: {type(rule).__name__}({rule.pattern!r}, ..., grid=({sizes}), prefix_tokens=...), or leave "
            "the layer out of the pattern"
        )
    shown = check_grid(layer.input_shape, rule.spec, grid, prefix_tokens, name)
    for shape in (layer.input_shape, *layer.other_shapes) if grid is not None else ():
        _check_tokens(layer, rule, shape, shown, prefix_tokens)
    if grid is not None and grid == rule.grid:
        _check_order(layer, rule, shown, maps)
    place = None if branch else layer.place  # the product beside a branch is not joined
    if chosen(rule.spec, shown, prefix_tokens, layer.inputs, layer.outputs, place) != rule.spec:
        return Adaptation(layer, None, shown_grid=shown, slower=True, **branch)
    return Adaptation(layer, rule.spec, grid if grid is None else shown, prefix_tokens, shown, **branch)


def _check_tokens(layer: Layer, rule: Rule, shape: tuple[int, ...], grid: Grid, prefix_tokens: int) -> None:
    tokens = math.prod(grid) + prefix_tokens
    if tokens == shape[-2]:
        return
    extra = shape[-2] - math.prod(grid)
    hint = (
        f"; {extra} of them may be class or register tokens: prefix_tokens={extra}" if 0 < extra <= _MOST_PREFIX_TOKENS else ""
    )
    calls = ""
    if layer.other_shapes:
        calls = f". It is called on {' and on '.join(str(list(s)) for s in (layer.input_shape, *layer.other_shapes))}"
    raise ValueError(
        f"adapt: {layer.shown}: grid {grid} with {prefix_tokens} prefix tokens makes {tokens} tokens, but the input "
        f"{list(shape)} has {shape[-2]}{hint}; change the rule {_name(rule)}{calls}"
    )


def _check_order(layer: Layer, rule: Rule, grid: Grid, maps: Mapping[Grid, str]) -> None:
    """Refuses a grid that is no map of the model's while another order of its axes is."""
    other = next((size for size in maps if sorted(size) == sorted(grid)), None)
    if grid not in maps and other is not None:
        raise ValueError(
            f"adapt: {layer.shown}: the model has no map of {grid}, but {maps[other] or 'its convolution'} returns one of "
            f"{other}; height comes first: write grid={other} in {_name(rule)}"
        )
