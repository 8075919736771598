"""The state that training changes from step to step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.adaptation.partition import join_params, split_params


class TrainState(NamedTuple):
    """What a step reads and writes.

    Attributes:
      params: the trained parameters.
      frozen: the parameters that stay as they are.
      others: the model's other variables.
      optimizer: the optimiser's state, for ``params`` only.
      ema: the moving average of ``params``; ``None`` without one.
      step: number of steps done, int32.
      diverged: whether a loss, gradient or updated number was not finite; the rest is then the state before that step, and no
        longer changes.
    """

    params: Any
    frozen: Any
    others: Any
    optimizer: Any
    ema: Any
    step: jax.Array
    diverged: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """All of the model's variables, as trained."""
        return {"params": join_params(self.params, self.frozen), **self.others}

    @property
    def averaged(self) -> dict[str, Any]:
        """All of the model's variables, with the moving average in place of the trained parameters if there is one."""
        return {"params": join_params(self.params if self.ema is None else self.ema, self.frozen), **self.others}


def everything(path: str) -> bool:
    """Trains every parameter."""
    return True


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays that hold numbers that are not finite; the arrays are copied to the host."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if not np.isfinite(np.asarray(jax.device_get(leaf), np.float32)).all()
    ]


def initial_state(
    variables: Mapping[str, Any], optimizer: Any, trainable: Callable[[str], bool] = everything, ema: bool = False
) -> TrainState:
    """The state before the first step, on copies of the variables.

    Args:
      variables: the model's variables.
      optimizer: the optimiser of the trained parameters.
      trainable: tells whether the parameter at a path, such as ``"blocks_0/mlp/fc1/kernel"``, is trained.
      ema: whether a moving average is kept.

    Raises:
      ValueError: if nothing is trained.
    """
    params, frozen = split_params(jax.tree.map(jnp.array, variables["params"]), trainable)
    others = {name: jax.tree.map(jnp.array, tree) for name, tree in variables.items() if name != "params"}
    average = jax.tree.map(jnp.array, params) if ema else None
    return TrainState(params, frozen, others, optimizer.init(params), average, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
