"""The exact map between parameters here and tensors in timm's state dicts, in both directions."""

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
from lbpwht_jax.weights.differences import check_same

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

Path = tuple[str, ...]
State = Mapping[str, np.ndarray]
Model = str | ModelInfo


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    Attributes:
      path: its place in the variables, such as ``("params", "blocks_0", "attn", "qkv", "kernel")``.
      key: its name in timm's state dict, such as ``"blocks.0.attn.qkv.weight"``.
      shape: its shape in timm's layout.
    """

    path: Path
    key: str
    shape: tuple[int, ...]


def entries(model: Model, module: nn.Module) -> list[Entry]:
    """The tensors of a module, read from the shapes of its initialisation; nothing is computed.

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
      Tensors by timm's keys, in timm's layouts and the variables' dtypes, with the buffers that ``strict=True`` asks for.

    Raises:
      ValueError: if the name is unknown, or if the variables are not the module's, with lists of the differences.
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
      ValueError: if the name is unknown, or if entries are missing, unexpected or mis-shaped, with lists of them.
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
    """A timm state dict, without buffers, from variables by path as ``flax.traverse_util.flatten_dict`` returns them."""
    state = {}
    for path, leaf in leaves.items():
        array = np.asarray(leaf, order="C")
        if path[-1] == "kernel":
            array = array.transpose(_to_timm_axes(array.ndim)).copy()
        state[timm_key(info, path)] = array.reshape(_timm_shape(info, path, np.shape(leaf)))
    return state


def assemble(info: ModelInfo, wanted: Iterable[Entry], state: State) -> dict[str, Any]:
    """Turns a checked timm state dict into nested variables, float32."""
    leaves = {entry.path: from_timm_array(info, entry.path, np.array(state[entry.key], np.float32)) for entry in wanted}
    return traverse_util.unflatten_dict(leaves)


def from_timm_array(info: ModelInfo, path: Path, array: np.ndarray) -> np.ndarray:
    """The variable at ``path`` from its tensor in timm's layout."""
    if path[-1] != "kernel":
        return array
    if _is_pointwise(info, path):
        array = array.reshape(array.shape[:2])
    return array.transpose(np.argsort(_to_timm_axes(array.ndim))).copy()


def check(wanted: Sequence[Entry], state: State, problem: str) -> None:
    """Refuses a timm state dict whose keys, shapes or kinds of dtype are not those of ``wanted``.

    Args:
      wanted: the model's tensors.
      state: tensors by timm's keys.
      problem: the first line of the message.

    Raises:
      ValueError: if there are differences, with lists of them.
    """
    check_same(
        {entry.key: str(list(entry.shape)) for entry in wanted},
        {key: describe(value) for key, value in state.items()},
        problem,
        "Check the model's name, num_classes and image_size",
    )


def describe(value: np.ndarray) -> str:
    """The shape of a tensor, and its dtype if that is not a floating one."""
    dtype = "" if jnp.issubdtype(value.dtype, jnp.floating) else f" {value.dtype}"
    return f"{list(value.shape)}{dtype}"


def _info(model: Model) -> ModelInfo:
    return model_info(model) if isinstance(model, str) else model


def _is_pointwise(info: ModelInfo, path: Path) -> bool:
    return path[-1] == "kernel" and re.search(info.files.pointwise, "/".join(path[1:])) is not None


def _to_timm_axes(ndim: int) -> tuple[int, ...]:
    """The axes of a kernel here in timm's order: outputs, inputs, then the window."""
    return (ndim - 1, ndim - 2, *range(ndim - 2)) if ndim > 1 else tuple(range(ndim))


def _timm_shape(info: ModelInfo, path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        shape = [shape[axis] for axis in _to_timm_axes(len(shape))]
    return (*shape, 1, 1) if _is_pointwise(info, path) else tuple(shape)
