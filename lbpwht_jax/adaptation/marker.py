"""What tells variables with LoRA's branches from the model's own, which compute something else."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from flax import serialization

# The name of the marker among the collections of variables.
BRANCHES = "lora_branches"


class Branches(dict):
    """An empty collection of variables whose presence says: there are LoRA branches among the parameters.

    A Linen model's own ``apply`` and ``bind`` would leave the branches out without a word. Flax asks every collection for its
    keys first; this one answers with an error that says so. It holds no array, and is a node of JAX's trees.
    """

    def keys(self) -> NoReturn:
        raise ValueError(
            "apply: these variables have LoRA branches, which the model's own apply leaves out; call adapted.apply(variables, "
            "...), or give the model adapted.merge(variables)"
        )


jax.tree_util.register_pytree_node(Branches, lambda _: ((), None), lambda *_: Branches())
serialization.register_serialization_state(Branches, lambda _: {}, lambda *_: Branches())


def with_marker(variables: Mapping[str, Any], branches: Sequence[Any]) -> dict[str, Any]:
    """The variables with the marker, if there are any branches."""
    return {**variables, BRANCHES: Branches()} if branches else dict(variables)


def without_marker(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables without it."""
    return {name: tree for name, tree in variables.items() if not isinstance(tree, Branches)}
