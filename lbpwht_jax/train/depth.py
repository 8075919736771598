"""Learning rates that fall from the head to the first block."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

_BLOCK = re.compile(r"(?:(?:layers|stages)_(\d+)/)?(?:blocks_(\d+))?")
_TOP = re.compile(r"(head|norm)")


def distances(paths: Iterable[str]) -> Mapping[str, int]:
    """How many blocks a module is below the head, by the path of its parameters.

    Blocks are ``blocks_0``, ``blocks_1`` and so on, in plain models or within ``layers_0`` or ``stages_0`` and so on; what
    else a stage has goes with its first block. The head and the norms outside blocks are at 0, the last block is at 1, and what
    comes before the first block is below it.
    """
    blocks: dict[str, tuple[int, int] | None] = {}
    for path in paths:
        stage, block = _BLOCK.match(path).groups()  # pyright: ignore[reportOptionalMemberAccess] - it matches anything
        blocks[path] = None if stage is None and block is None else (int(stage or 0), int(block or 0))
    order = sorted({block for block in blocks.values() if block is not None}, reverse=True)
    below = {block: 1 + number for number, block in enumerate(order)}
    return {
        path: below[block] if block is not None else 0 if _TOP.match(path) else 1 + len(order) for path, block in blocks.items()
    }


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by ``decay`` to the power of their distance from the head.

    Args:
      decay: in (0, 1].
    """

    def update(updates: Any, params: Any) -> Any:
        below = distances(_name(path) for path, _ in jax.tree.leaves_with_path(updates))
        return jax.tree.map_with_path(lambda path, leaf: leaf * decay ** below[_name(path)], updates)

    return optax.stateless(update)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
