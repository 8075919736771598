"""LoRA's branches in the variables of a Linen model: added, merged into the kernels, taken out again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.layer import Adaptation
from lbpwht_jax.adaptation.marker import with_marker, without_marker

Variables = Mapping[str, Any]
Path = tuple[str, ...]


def flat_params(variables: Variables, name: str) -> dict[Path, Any]:
    """The parameters by path.

    Args:
      variables: ``{"params": ..., ...}``.
      name: the function that was called; it opens the message.

    Raises:
      TypeError: if there is no ``"params"``.
    """
    if not (isinstance(variables, Mapping) and isinstance(variables.get("params"), Mapping)):
        keys = (
            f"keys {', '.join(map(str, list(variables)[:5]))}" if isinstance(variables, Mapping) else type(variables).__name__
        )
        raise TypeError(f'{name}: variables must be a dictionary with "params", as init returns it, got {keys}')
    return traverse_util.flatten_dict(dict(variables["params"]))


def with_params(variables: Variables, flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The variables with these parameters instead."""
    return {**variables, "params": traverse_util.unflatten_dict(dict(flat))}


def leaf_path(adaptation: Adaptation, name: str) -> Path:
    """The path of a layer's parameter."""
    return (*filter(None, adaptation.layer.path.split("/")), name)


def add_branches(key: jax.Array, variables: Variables, adaptations: Sequence[Adaptation]) -> dict[str, Any]:
    """Adds fresh branches, each from a key of its own.

    Raises:
      TypeError: if ``variables`` has no ``"params"``.
      ValueError: if there are branches already, or a kernel is missing.
    """
    flat = flat_params(variables, "with_branches")
    taken = [adaptation.layer.path for adaptation in adaptations if leaf_path(adaptation, lora.A) in flat]
    if taken:
        raise ValueError(
            f"with_branches: the variables have branches already, such as {taken[0]}'s; give the model's own variables"
        )
    for adaptation in adaptations:
        key, own = jax.random.split(key)
        kernel = nn.meta.unbox(_kernel(flat, adaptation, "with_branches"))
        flat |= {leaf_path(adaptation, name): matrix for name, matrix in lora.fresh(adaptation, own, kernel.dtype).items()}
    return with_marker(with_params(variables, flat), adaptations)


def check_branches(variables: Variables, adaptations: Sequence[Adaptation], name: str) -> None:
    """Raises ValueError if variables lack a branch; ``name`` is the function that was called."""
    params = variables.get("params") if isinstance(variables, Mapping) else None
    if not isinstance(params, Mapping):
        flat_params(variables, name)
    for adaptation in adaptations:
        module: Any = params
        for part in filter(None, adaptation.layer.path.split("/")):
            module = module.get(part, {})
        if lora.A not in module or lora.B not in module:
            raise ValueError(
                f"{name}: the variables lack the LoRA branch of {adaptation.layer.path or 'the top level'}: they are the "
                "model's own, or merged ones; with_branches(key, variables) adds branches"
            )


def merge_branches(variables: Variables, adaptations: Sequence[Adaptation]) -> dict[str, Any]:
    """Adds the branches to the kernels and takes them out.

    Raises:
      ValueError: if a branch is missing, or a layer computes its kernel before it is used.
    """
    check_branches(variables, adaptations, "merge")
    check_plain(adaptations, "merge")
    flat = flat_params(variables, "merge")
    for adaptation in adaptations:
        a, b = (flat.pop(leaf_path(adaptation, name)) for name in (lora.A, lora.B))
        _change_kernel(flat, adaptation, lambda kernel, change: kernel + change, a, b)
    return without_marker(with_params(variables, flat))


def unmerge_branches(variables: Variables, branches: Variables, adaptations: Sequence[Adaptation]) -> dict[str, Any]:
    """Takes the branches from the kernels and puts them beside.

    Raises:
      ValueError: if ``variables`` have branches, ``branches`` lack one, or a layer computes its kernel before it is used.
    """
    check_branches(branches, adaptations, "unmerge")
    check_plain(adaptations, "unmerge")
    flat, source = flat_params(variables, "unmerge"), flat_params(branches, "unmerge")
    for adaptation in adaptations:
        own = {name: leaf_path(adaptation, name) for name in (lora.A, lora.B)}
        if own[lora.A] in flat:
            raise ValueError(f"unmerge: the variables have the branch of {adaptation.layer.path} beside its kernel: not merged")
        a, b = (source[path] for path in own.values())
        _change_kernel(flat, adaptation, lambda kernel, change: kernel - change, a, b)
        flat |= {own[lora.A]: a, own[lora.B]: b}
    return with_marker(with_params(variables, flat), adaptations)


def merge_weighted(
    variables: Variables, adapters: Mapping[str, Variables], weights: Mapping[str, float], adaptations: Sequence[Adaptation]
) -> dict[str, Any]:
    """Adds to the parameters the weighted sum of what several adapters change in them.

    Args:
      variables: the model's own variables.
      adapters: variables of the adapted model by the adapters' names.
      weights: the weights by name.
      adaptations: the layers with a branch.

    Raises:
      TypeError: if variables have no ``"params"``.
      ValueError: if a name is unknown, if an adapter's parameters are not those of the model, in names and shapes, and as
        ``merge_branches`` does.
    """
    base = flat_params(variables, "merge_weighted")
    total = dict(base)
    for name, weight in weights.items():
        if name not in adapters:
            raise ValueError(f"merge_weighted: no adapter is called {name!r}; there are {', '.join(map(repr, adapters))}")
        own = flat_params(merge_branches(adapters[name], adaptations), "merge_weighted")
        for path in base.keys() | own.keys():
            shapes = [jax.tree.map(np.shape, tree.get(path)) for tree in (base, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"merge_weighted: {'/'.join(path)} is {shapes[0]} in the model and {shapes[1]} in the adapter {name!r}; "
                    "adapters of different heads cannot be added"
                )
        for path, old in base.items():
            total[path] = jax.tree.map(
                lambda sum_, new, old, weight=weight: (sum_ + weight * (new - old)).astype(old.dtype),
                *(total[path], own[path], old),
            )
    return with_params(variables, total)


def _kernel(flat: Mapping[Path, Any], adaptation: Adaptation, name: str) -> Any:
    path = leaf_path(adaptation, "kernel")
    if path not in flat:
        raise ValueError(f"{name}: the variables have no {'/'.join(path)}; give those of the model that was adapted")
    return flat[path]


def _change_kernel(flat: dict[Path, Any], adaptation: Adaptation, combine: Callable[..., Any], a: Any, b: Any) -> None:
    """Adds the branch to the kernel or takes it away; a kernel boxed with its partitioning stays boxed."""
    path = leaf_path(adaptation, "kernel")
    boxed = flat[path]
    kernel = nn.meta.unbox(boxed)
    change = lora.delta(adaptation, nn.meta.unbox(a), nn.meta.unbox(b))
    flat[path] = nn.meta.replace_boxed(boxed, combine(kernel, change.astype(kernel.dtype)))


def check_plain(adaptations: Sequence[Adaptation], name: str) -> None:
    """Raises ValueError if a layer computes its kernel before it is used; ``name`` is the function that was called."""
    computed = [adaptation.layer.path for adaptation in adaptations if not adaptation.layer.plain]
    if computed:
        raise ValueError(
            f"{name}: {', '.join(computed)} computes its kernel from the stored one before it is used, by weight "
            "standardisation for instance: no stored kernel does what kernel and branch do together. Keep the branch"
        )
