"""Parameters here and tensors in timm's state dicts: the map between them, both ways and exact."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lbpwht_jax.models import ModelInfo, model_info

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_SHOWN = 20

Path = tuple[str, ...]
State = Mapping[str, np.ndarray]
Model = str | ModelInfo


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    Attributes:
      path: in the variables, such as ``("params", "blocks_0", "attn", "qkv", "kernel")``.
      key: in timm's state dict, such as ``"blocks.0.attn.qkv.weight"``.
      shape: in timm's layout.
    """

    path: Path
    key: str
    shape: tuple[int, ...]


def entries(model: Model, module: nn.Module) -> list[Entry]:
    """The tensors of a module, from the shapes of its initialisation (nothing is computed).

    Args:
      model: the registry's name of the model, or its ``ModelInfo``.
      module: the model, as ``create_model`` returns it.

    Raises:
      ValueError: if the name is unknown.
    """
    info = _info(model)
    edge = module.image_size
    init = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, edge, edge, info.images.channels), jnp.float32)))
    leaves: dict[Path, Any] = traverse_util.flatten_dict(init)
    return [Entry(path, timm_key(info, path), _timm_shape(info, path, leaf.shape)) for path, leaf in leaves.items()]


def to_timm(model: Model, module: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A model's variables as timm's state dict.

    Args:
      model: the registry's name of the model, or its ``ModelInfo``.
      module: the model, as ``create_model`` returns it.
      variables: its ``{"params": ..., "batch_stats": ...}``.

    Returns:
      Tensors by timm's keys, in timm's layouts and the variables' dtypes, with the buffers timm's ``strict=True`` wants.

    Raises:
      ValueError: if the name is unknown, or if the variables are not the module's, with the list of differences.
    """
    info = _info(model)
    state = flat_to_timm(info, traverse_util.flatten_dict(variables))
    check(entries(info, module), state, "to_timm: the variables do not fit the module")
    return {**state, **(info.files.make_buffers(module) if info.files.make_buffers else {})}


def from_timm(model: Model, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model from timm's state dict.

    Args:
      model: the registry's name of the model, or its ``ModelInfo``.
      module: the model, as ``create_model`` returns it, of the state dict's number of classes and image size.
      state: tensors by timm's keys: NumPy arrays or what ``np.asarray`` takes.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` as the module's ``init`` nests them, in float32.

    Raises:
      ValueError: if the name is unknown, or if entries are missing, unexpected or mis-shaped, with the list of them.
    """
    info = _info(model)
    state = {key: np.asarray(value) for key, value in state.items() if not re.search(info.files.buffers, key)}
    wanted = entries(info, module)
    check(wanted, state, "from_timm: the state dict does not fit the module")
    return assemble(info, wanted, state)


def timm_key(info: ModelInfo, path: Path) -> str:
    """timm's name of the parameter at ``path``, which starts with the collection."""
    *parts, leaf = path[1:]
    key = ".".join([re.sub(r"_(\d+)$", r".\1", part) for part in parts] + [_LEAVES.get(leaf, leaf)])
    for pattern, replacement in info.files.renames:
        key = re.sub(pattern, replacement, key)
    return key


def flat_to_timm(info: ModelInfo, leaves: Mapping[Path, Any]) -> dict[str, np.ndarray]:
    """Variables by path, as ``flax.traverse_util.flatten_dict`` gives them, as a timm state dict without buffers."""
    state = {}
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        if path[-1] == "kernel":
            array = array.transpose(_to_timm_axes(array.ndim)).copy()
        state[timm_key(info, path)] = array.reshape(_timm_shape(info, path, np.shape(leaf)))
    return state


def assemble(info: ModelInfo, wanted: Iterable[Entry], state: State) -> dict[str, Any]:
    """Nests a checked timm state dict as variables, float32."""
    leaves = {}
    for entry in wanted:
        array = np.array(state[entry.key], np.float32)
        if entry.path[-1] == "kernel":
            if _is_pointwise(info, entry.path):
                array = array.reshape(array.shape[:2])
            array = array.transpose(np.argsort(_to_timm_axes(array.ndim))).copy()
        leaves[entry.path] = array
    return traverse_util.unflatten_dict(leaves)


def check(wanted: Sequence[Entry], state: State, problem: str) -> None:
    """Raises ``ValueError`` with the list of missing, unexpected and mis-shaped entries, unless there are none."""
    shapes = {entry.key: entry.shape for entry in wanted}
    missing = [f"- {key} {list(shape)}" for key, shape in shapes.items() if key not in state]
    unexpected = [f"+ {key} {_describe(value)}" for key, value in state.items() if key not in shapes]
    differing = [
        line
        for key, shape in shapes.items()
        if key in state and not (state[key].shape == shape and jnp.issubdtype(state[key].dtype, jnp.floating))
        for line in (f"- {key} {list(shape)}", f"+ {key} {_describe(state[key])}")
    ]
    if missing or unexpected or differing:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": differing}
        lines = [problem + ":"]
        for title, rows in lists.items():
            count = len(rows) // 2 if rows is differing else len(rows)
            lines += [f"{count} {title}"] * bool(rows) + [f"  {row}" for row in rows[:_SHOWN]]
            lines += [f"  and {len(rows) - _SHOWN} more lines"] * (len(rows) > _SHOWN)
        lines.append("- is what the model wants, + what there is. Check the model's name, num_classes and image_size")
        raise ValueError("\n".join(lines))


def _describe(value: np.ndarray) -> str:
    dtype = "" if jnp.issubdtype(value.dtype, jnp.floating) else f" {value.dtype}"
    return f"{list(value.shape)}{dtype}"


def _info(model: Model) -> ModelInfo:
    return model_info(model) if isinstance(model, str) else model


def _is_pointwise(info: ModelInfo, path: Path) -> bool:
    return path[-1] == "kernel" and re.search(info.files.pointwise, "/".join(path[1:])) is not None


def _to_timm_axes(ndim: int) -> tuple[int, ...]:
    """Axes of a kernel here in timm's order: outputs, inputs, then the window."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _timm_shape(info: ModelInfo, path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        shape = [shape[axis] for axis in _to_timm_axes(len(shape))]
    return (*shape, 1, 1) if _is_pointwise(info, path) else tuple(shape)
