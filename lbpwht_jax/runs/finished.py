"""Reading the model that a run made."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.train import Placement
from lbpwht_jax.train.checkpoint import Checkpoints
from lbpwht_jax.train.state import not_finite
from lbpwht_jax.weights.differences import check_same, describe_arrays
from lbpwht_jax.weights.files import load_weights

FINAL, LAST, BEST = "final", "last", "best"


@dataclasses.dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a run made.

    Attributes:
      config: what the run was.
      module: the plain model.
      variables: the model's, on the host; LoRA's branches are merged, and the moving average is taken where there is one.
    """

    config: RunConfig
    module: nn.Module
    variables: Any


def load_run(path: Path, which: str = FINAL) -> FinishedRun:
    """Reads a run folder.

    Args:
      path: the folder.
      which: ``"final"`` for what the run ended with; ``"last"``, ``"best"`` (of the best epoch) or the number of a step for
        a checkpoint, which also works for a run that is not finished.

    Raises:
      ValueError: if the folder holds no run or not what is asked for, or it is damaged.
    """
    config = run_folder.read_config(path)
    if which != FINAL:
        return _from_checkpoint(path, config, which)
    module, file = config.module(), path / run_folder.WEIGHTS
    if not file.exists():
        raise ValueError(
            f"{path} is not finished; go on with lbpwht finetune --resume {path}, or use a checkpoint of it: --checkpoint last"
        )
    variables, _ = load_weights(file)
    wanted = jax.eval_shape(module.init, jax.random.key(0), config.images())
    check_same(describe_arrays(wanted), describe_arrays(variables), f"{file} does not fit {path / run_folder.CONFIG}")
    return FinishedRun(config, module, variables)


def check_finite(variables: Any, what: str) -> None:
    """Checks that all numbers of a model are finite, as those of a run that diverged may not be.

    Raises:
      FloatingPointError: if one is not; names arrays that have such numbers.
    """
    if wrong := not_finite(variables):
        raise FloatingPointError(
            f"{what} holds numbers that are not finite, in {len(wrong)} arrays such as {wrong[0]}: the run diverged; use an "
            "earlier checkpoint, or train again with a lower learning rate"
        )


def _from_checkpoint(path: Path, config: RunConfig, which: str) -> FinishedRun:
    placement = Placement(devices=jax.local_devices()[:1])
    model = config.adapted()
    with Checkpoints(path, {}, write=False) as checkpoints:
        if not checkpoints.steps:
            raise ValueError(f"{path} has no checkpoint yet")
        if which in (LAST, BEST):
            step = checkpoints.steps[-1]
            best = checkpoints.facts(step).best
            if which == BEST:
                if best is None:
                    raise ValueError(f"no epoch of {path} has ended yet, so there is no best checkpoint; use --checkpoint last")
                step = best.step
        elif which.isdecimal():
            step = int(which)
        else:
            raise ValueError(f"--checkpoint must be final, last, best or the number of a step, got {which!r}")
        state, _ = checkpoints.restore(config.abstract_state(model, placement), placement, step)
    return FinishedRun(config, model.module, model.merge(jax.device_get(state.averaged)))
