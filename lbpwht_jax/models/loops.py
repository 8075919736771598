"""Blocks one after the other, equal ones as one loop over their stacked parameters (``jax.lax.scan``).

What a loop keeps for its backward pass is what the blocks keep and nothing else, on every platform: a compiler cannot hold on
to what the blocks compute again. It compiles one block instead of many.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.models.blocks import Loop, Part, ResidualBlock

_STACKED = ("params", "batch_stats")


def run_blocks(
    parent: Part, blocks: Mapping[str, Callable[..., ResidualBlock]], rates: Sequence[float], x: jax.Array, train: bool
) -> jax.Array:
    """Runs blocks within ``parent``, as its settings say: recomputed in the backward pass or not, looped or not.

    While parameters are made and while intermediates are captured, no block is looped.

    Args:
      parent: the module under construction, which has no other blocks.
      blocks: what makes each block, given ``drop_path``, ``name`` and ``parent``, by its name and in order.
      rates: each block's probability of dropping a residual branch while training.
      x: the first block's input; all inputs and outputs have its shape and dtype.
      train: whether the model is training.

    Returns:
      The last block's output.
    """
    drop_path = dict(zip(blocks, rates, strict=True))

    def step(parent: Part, x: jax.Array, names: Sequence[str], rates: Sequence[Any]) -> jax.Array:
        for name, rate in zip(names, rates, strict=True):
            block = blocks[name](drop_path=rate, name=name, parent=parent)
            call = nn.remat(_called, static_argnums=(2,)) if parent.settings.remat else _called
            x = call(block, x, train)
        return x

    for loop in _loops(parent, list(blocks)):
        if len(loop) == 1:
            x = step(parent, x, loop[0], [drop_path[name] for name in loop[0]])
        else:
            x = _looped(parent, loop, drop_path, x, step)
    return x


def _called(block: ResidualBlock, x: jax.Array, train: bool) -> jax.Array:
    return block(x, train)


def _loops(parent: Part, names: list[str]) -> list[Loop]:
    """The loops of the settings that are within ``parent``, with the blocks' names; other blocks as loops of one step."""
    loops = []
    unrolled = parent.is_initializing() or parent.is_mutable_collection("intermediates")
    within = {} if unrolled else {loop[0][0]: loop for loop in parent.settings.loops}
    prefix = "".join(f"{name}/" for name in parent.path)
    while names:
        loop = within.get(prefix + names[0], ((prefix + names[0],),))
        loops.append(tuple(tuple(path.removeprefix(prefix) for path in step) for step in loop))
        names = names[sum(map(len, loop)) :]
    return loops


def _looped(
    parent: Part, loop: Loop, drop_path: Mapping[str, float], x: jax.Array, step: Callable[..., jax.Array]
) -> jax.Array:
    names = loop[0]
    drops = any(drop_path[name] for names in loop for name in names)
    rates: Any = jnp.asarray([[drop_path[name] for name in names] for names in loop], jnp.float32) if drops else None

    def stack(variables: Mapping[str, Any]) -> dict[str, Any]:
        def of(tree: Mapping[str, Any], place: int) -> Any:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[names[place]] for names in loop))

        return {
            kind: {name: of(tree, place) for place, name in enumerate(names) if name in tree}
            for kind, tree in variables.items()
        }

    def unstack(variables: Mapping[str, Any]) -> dict[str, Any]:
        def of(kind: str, place: int, index: int) -> Any:
            return jax.tree.map(lambda leaf: leaf[index], variables[kind][names[place]])

        return {
            kind: {
                name: of(kind, place, index)
                for index, step in enumerate(loop)
                for place, name in enumerate(step)
                if names[place] in tree
            }
            for kind, tree in variables.items()
        }

    def body(parent: Part, x: jax.Array, rates: Any) -> tuple[jax.Array, None]:
        return step(parent, x, names, [0.0] * len(names) if rates is None else rates), None

    def scan(parent: Part, x: jax.Array) -> jax.Array:
        loop_of = nn.scan(body, variable_axes=dict.fromkeys(_STACKED, 0), split_rngs={"dropout": True}, length=len(loop))
        return loop_of(parent, x, rates)[0]

    return nn.map_variables(scan, list(_STACKED), stack, unstack, mutable=True)(parent, x)
