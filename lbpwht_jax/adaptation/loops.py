"""Which blocks of a model may run as one loop: consecutive ones of equal shapes, rules and trainability."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lbpwht_jax.adaptation.resolution import Resolution
from lbpwht_jax.adaptation.shapes import abstract_call
from lbpwht_jax.models.blocks import Loop, Part, ResidualBlock

_PERIODS = (1, 2)  # SwinV2's blocks alternate
_OWN = ("parent", "name", "drop_path")  # what tells equal blocks apart


def with_loops(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model of the registry, under rules or not, whose equal blocks run as loops (``jax.lax.scan``), the others one by one.

    Variables, paths and rules are as before. Random numbers of drop path are drawn otherwise.

    Args:
      model: the model with all its rules.
      *args, **kwargs: an example call of it, as for ``adapt``; nothing is computed.
    """
    resolution = _resolution(model)
    keys = _keys(unrolled(model if resolution is None else model.module), args, kwargs, resolution)
    return _replaced(model, loops=_loops(keys))


def unrolled(model: Any) -> Any:
    """A Flax model, under rules or not, without the loops that ``with_loops`` made."""
    return _replaced(model, loops=()) if has_loops(model) else model


def told_apart(model: Any) -> Any:
    """A Flax model, under rules or not, whose modules each do their own work, where it is one of the registry's."""
    module = model if _resolution(model) is None else model.module
    return _replaced(model, loops=(), joins_norms=False) if isinstance(module, Part) else model


def has_loops(model: Any) -> bool:
    """Whether ``with_loops`` made loops in a Flax model, under rules or not."""
    module = model if _resolution(model) is None else model.module
    return isinstance(module, Part) and module.settings.loops != ()


def _resolution(model: Any) -> Resolution | None:
    resolution = getattr(model, "resolution", None)
    return resolution if isinstance(resolution, Resolution) else None


def _replaced(model: Any, **settings: Any) -> Any:
    if _resolution(model) is None:
        return model.clone(settings=dataclasses.replace(model.settings, **settings))
    module = _replaced(model.module, **settings)
    return model.clone(module=module) if isinstance(model, nn.Module) else dataclasses.replace(model, module=module)


def _keys(module: Part, args: Any, kwargs: Any, resolution: Resolution | None) -> dict[str, Hashable]:
    """What two blocks have in common that may take each other's place in a loop, by the blocks' paths in order."""
    fields: dict[str, Hashable] = {}

    def record(call, args, kwargs, context):
        block = context.module
        if isinstance(block, ResidualBlock) and context.method_name == "__call__":
            own = [(field.name, getattr(block, field.name)) for field in dataclasses.fields(block) if field.name not in _OWN]
            fields["/".join(block.path)] = (block.path[:-1], type(block), tuple(own))
        return call(*args, **kwargs)

    def init(*args, **kwargs):
        with nn.intercept_methods(record):
            return module.init(jax.random.key(0), *args, **kwargs)

    shapes: list[tuple[str, Hashable]] = [
        ("/".join(entry.key for entry in path[1:]), (path[0].key, leaf.shape, leaf.dtype))
        for path, leaf in jax.tree.leaves_with_path(abstract_call(init, args, kwargs))
    ]
    rules: list[tuple[str, Hashable]] = []
    if resolution is not None:
        rules += [
            (how.layer.path, dataclasses.replace(how, layer=dataclasses.replace(how.layer, path="")))
            for how in resolution.adaptations
        ]
        rules += [(path, "frozen") for path in resolution.frozen] + list(resolution.lean)

    def within(path: str, values: list[tuple[str, Hashable]]) -> Hashable:
        return frozenset((key.removeprefix(path), value) for key, value in values if f"{key}/".startswith(f"{path}/"))

    return {path: (own, within(path, shapes), within(path, rules)) for path, own in fields.items()}


def _loops(keys: Mapping[str, Hashable]) -> tuple[Loop, ...]:
    paths, loops = list(keys), []
    while paths:
        steps = {period: _steps(paths, keys, period) for period in _PERIODS}
        best = max(steps.values(), key=lambda loop: len(loop) * len(loop[0]) if len(loop) > 1 else 0)
        if len(best) > 1:
            loops.append(best)
        paths = paths[len(best) * len(best[0]) if len(best) > 1 else 1 :]
    return tuple(loops)


def _steps(paths: list[str], keys: Mapping[str, Hashable], period: int) -> Loop:
    """The longest loop of steps of ``period`` blocks at the beginning."""
    steps = [tuple(paths[i : i + period]) for i in range(0, len(paths), period)]
    first = [keys[path] for path in steps[0]]
    count = next((i for i, step in enumerate(steps) if [keys[path] for path in step] != first), len(steps))
    return tuple(steps[:count])
