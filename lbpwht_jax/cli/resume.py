"""Going on with a run: ``lbpwht finetune --resume``."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from lbpwht_jax.cli.run_flags import AUTO, RunFlags
from lbpwht_jax.data import Dataset, open_dataset, steps_per_epoch
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs import training as training_run
from lbpwht_jax.runs.config import RunConfig, differences
from lbpwht_jax.runs.training import TrainingRun
from lbpwht_jax.train import Placement
from lbpwht_jax.train.checkpoint import last_step
from lbpwht_jax.train.processes import is_first


def resumed_run(
    folder: Path,
    flags: RunFlags,
    step: int | None,
    data_dir: Path | None,
    placement: Placement,
    workers: int | None,
    locks: contextlib.ExitStack,
) -> TrainingRun:
    """A run that goes on from a checkpoint.

    Args:
      folder: the run's folder.
      flags: those given with ``--resume``; none may contradict the run.
      step: the checkpoint's step; None for the last one.
      data_dir: where the TFDS data sets are now; None for where the run found them.
      placement: where the arrays live.
      workers: threads that load images; None for as many as there are cores, up to 16.
      locks: takes the lock of the folder.

    Raises:
      ValueError: if the folder holds no run or a finished one, another process has it, a flag contradicts it, or the checkpoint
        is damaged or of another model.
      FileNotFoundError: if the data is not there.
    """
    config = run_folder.read_config(folder)
    check_agreement(flags, config, folder)
    if is_first():
        locks.callback(run_folder.lock(folder, create=False).release)
    epochs = config.recipe.epochs if flags.numbers.epochs is None else flags.numbers.epochs
    if training_run.finished(folder) and epochs == config.recipe.epochs:
        raise ValueError(f"{folder} is finished; there is nothing to resume, but --epochs with a larger total trains on")
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=str(data_dir))
    dataset = open_dataset(
        config.dataset, config.recipe.seed, None if config.data_dir is None else Path(config.data_dir), config.validation
    )
    step = last_step(folder) if step is None else step
    notes = []
    if step is not None and (epochs != config.recipe.epochs or any(at > step for at, _ in config.extended)):
        before, config = config, config.with_epochs(epochs, step)
        notes = [_explained(before, config, dataset, step)]
    return training_run.prepare(config, folder, dataset, placement, workers, step, notes)


def _explained(before: RunConfig, after: RunConfig, dataset: Dataset, step: int) -> str:
    """What another number of epochs means for the learning rate.

    Raises:
      ValueError: if there is no step left.
    """
    per_epoch = steps_per_epoch(dataset, after.recipe.batch_size)
    epochs = after.recipe.epochs
    if epochs * per_epoch <= step:
        raise ValueError(
            f"--epochs {epochs}: the run has done {step} steps of {per_epoch} an epoch, and --epochs is the total; give a "
            "larger one"
        )
    old, new = (each.recipe.schedule(each.recipe.epochs * per_epoch)(step) for each in (before, after))
    return (
        f"{epochs} epochs in all, until now {before.recipe.epochs}: from step {step} on, the learning rate follows the cosine "
        f"of all {epochs}. It is {np.asarray(new):.3g} now; it would have been {np.asarray(old):.3g}."
    )


def check_agreement(flags: RunFlags, config: RunConfig, folder: Path) -> None:
    """Checks that no flag that was given contradicts a run: what they make of its configuration is the same again.

    Raises:
      ValueError: if one does; names the flag, its value and the run's.
    """
    if flags.recipe is not None:
        raise ValueError(f"--recipe does not go with --resume: the run in {folder} keeps its configuration; leave it out")
    if flags.method == AUTO or flags.budget is not None:
        raise ValueError(
            f"--method auto and --budget do not go with --resume: the run in {folder} keeps its method, {config.method}; leave "
            "them out"
        )
    for name, wanted, recorded in differences(flags.over(config), config):
        if name == "recipe.epochs":  # the one that may change
            continue
        flag = name.rpartition(".")[2].replace("_", "-").replace("algorithm", "optimizer")
        raise ValueError(
            f"--{flag} {wanted}: the run in {folder} was started with {recorded}, and a resumed run keeps its configuration; "
            "leave the flag out, or start a new run"
        )
