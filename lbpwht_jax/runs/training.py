"""One training run in its folder, from where it starts, or was stopped, to what it came to."""

import dataclasses
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
from rich.console import Console

from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.weights.peft import save_adapter
from lbpwht_jax.train.checkpoint import Checkpoints, Facts
from lbpwht_jax.cost.backward import backward_flops, residual_bytes
from lbpwht_jax.data import Dataset
from lbpwht_jax.runs.metrics import MetricsFile, read_metrics
from lbpwht_jax.runs.progress import Reporter
from lbpwht_jax.runs.results import Result
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.train import Diverged, Placement, Snapshot, Trainer, TrainState
from lbpwht_jax.train.processes import is_first
from lbpwht_jax.train.stop import StopSignals
from lbpwht_jax.weights.files import save_weights


class Stopped(Exception):
    """A run that a signal stopped, after its state was saved; the text says where."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run that is ready to start or to go on.

    Attributes:
      config: what it is.
      folder: of the run.
      model: under the method's rules.
      trainer: of the model.
      variables: what it starts from, unless it goes on from a checkpoint.
      restored: the state it goes on from, and the checkpoint's facts.
    """

    config: RunConfig
    folder: Path
    model: AdaptedModule
    trainer: Trainer
    variables: Mapping[str, Any] | None
    restored: tuple[TrainState, Facts] | None

    def train(self, save_every: int, console: Console) -> Result:
        """Trains to the end, saving as it goes, and writes weights, plot and result.

        Args:
          save_every: steps between checkpoints, beside those at the end of each epoch; 0 for no others.
          console: to show progress on.

        Raises:
          Stopped: after a signal, once the state is saved.
          Diverged: if a loss or gradient is not finite, once the last good state is saved.
          ValueError: if training images cannot be read.
          OSError: if a checkpoint, or anything else, cannot be written.
        """
        with Checkpoints(self.folder, self.config.to_json()) as checkpoints:
            state = self._start(checkpoints)
            done = int(jax.device_get(state.step))
            self._announce(console, done)
            state = self._follow(state, done, save_every, checkpoints, console)
            checkpoints.wait()
            return self._finish(state, console)

    def _start(self, checkpoints: Checkpoints) -> TrainState:
        placement = self.trainer.placement
        if self.restored is not None:
            state, facts = self.restored
            checkpoints.begin(state, placement, facts)
            return state
        state = self.trainer.initial_state(self.variables)
        checkpoints.begin(state, placement)
        if is_first():
            made_by = {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()}
            device = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
            values = {**self.config.to_json(), "steps": self.trainer.steps, "versions": made_by, **device}
            run_folder.write_json(self.folder / run_folder.CONFIG, values)
        return state

    def _announce(self, console: Console, done: int) -> None:
        config, dataset = self.config, self.trainer.dataset
        parameters = jax.eval_shape(self.model.init, jax.random.key(0), self.config.images())["params"]
        console.print(
            f"[bold]{config.method}[/]: {config.model} ({_scalars(parameters):,} parameters) on {dataset.name} "
            f"({len(dataset.train)} training and {len(dataset.test)} test images, {len(dataset.classes)} classes)"
            + (f", going on after step {done}" if done else ""),
            soft_wrap=True,
        )

    def _follow(self, state: TrainState, done: int, save_every: int, checkpoints: Checkpoints, console: Console) -> TrainState:
        """The state after the last step; everything on the way is written and shown."""
        file = MetricsFile(self.folder, self.config.recipe.batch_size, done, write=is_first())
        with StopSignals() as stop, file as metrics, Reporter(console, self.trainer, done) as reporter:
            try:
                for event in self.trainer.fit(state, save_every, stop):
                    if isinstance(event, Snapshot):
                        state = event.state
                        self._save(event, checkpoints, metrics)
                    else:
                        metrics.write(event)
                        reporter.show(event)
            except Diverged as error:
                kept = self._keep(error.state, checkpoints)
                raise Diverged(f"{error}; the state after step {kept} is in {self.folder}", error.state) from None
            step = int(jax.device_get(state.step))
            if stop.received is not None and step < self.trainer.steps:
                checkpoints.wait()
                raise Stopped(
                    f"stopped by {stop.received.name} after step {step} of {self.trainer.steps}, which is saved; go on with "
                    f"lbpwht finetune --resume {self.folder}"
                )
        return state

    def _save(self, snapshot: Snapshot, checkpoints: Checkpoints, metrics: MetricsFile) -> None:
        metrics.sync()
        if is_first() and snapshot.skipped:
            run_folder.add_skipped(self.folder, snapshot.skipped)
        checkpoints.save(snapshot.state, snapshot.epoch)

    def _keep(self, state: TrainState, checkpoints: Checkpoints) -> int:
        step = int(jax.device_get(state.step))
        checkpoints.wait()
        if step not in checkpoints.steps:
            checkpoints.save(state)
            checkpoints.wait()
        return step

    def _finish(self, state: TrainState, console: Console) -> Result:
        config, folder, placement = self.config, self.folder, self.trainer.placement
        variables = placement.gather(state.averaged)
        if is_first():
            metadata = {"model": config.model, "classes": config.classes}
            save_weights(folder / run_folder.WEIGHTS, self.model.merge(variables), metadata)
            if "lora" in config.method:
                save_adapter(folder / run_folder.ADAPTER, self.model, variables, config.model)
        steps, epochs = read_metrics(folder)
        image = (config.image_size, config.image_size, config.channels)
        result = Result(
            config.method,
            epochs[-1].test_accuracy,
            _scalars(state.params),
            backward_flops(self.model, variables, image),
            residual_bytes(self.model, variables, image),
            statistics.median(step.seconds for step in steps[1:] or steps),
        )
        if is_first():
            run_folder.plot_curves(folder, steps, epochs, f"{config.model} on {config.dataset}, {config.method}")
            run_folder.write_json(folder / run_folder.RESULT, dataclasses.asdict(result))
        skipped = run_folder.add_skipped(folder, {})
        if skipped:
            name, reason = next(iter(skipped.items()))
            console.print(
                f"images that could not be read and count nowhere: {len(skipped)}, listed in {folder / run_folder.SKIPPED}; "
                f"the first is {name}: {reason}",
                style="yellow",
                soft_wrap=True,
            )
        return result


def prepare(
    config: RunConfig, folder: Path, dataset: Dataset, placement: Placement, workers: int | None, resume_step: int | None = None
) -> TrainingRun:
    """Checks a run and reads what it starts from; writes nothing.

    Args:
      config: what it is.
      folder: of the run.
      dataset: opened.
      placement: where the arrays live.
      workers: threads that load images; by default as many as there are cores, up to 16.
      resume_step: the checkpoint to go on from; by default the run starts with its pretrained weights.

    Raises:
      ValueError: if a name is unknown, the method trains nothing, the data has other classes or too few images, or the
        devices cannot share a batch; if the checkpoint is damaged, or not of this model.
      ValueError, FileNotFoundError, ImportError: if the pretrained weights cannot be had.
    """
    config.check_classes(dataset)
    model = config.adapted()
    trainer = Trainer(model, config.info, dataset, config.recipe, config.image_size, model.trainable, placement, workers)
    if resume_step is None:
        return TrainingRun(config, folder, model, trainer, config.start(model), None)
    with Checkpoints(folder, config.to_json(), write=False) as checkpoints:
        restored = checkpoints.restore(config.abstract_state(model, placement), placement, resume_step)
    return TrainingRun(config, folder, model, trainer, None, restored)


def finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / run_folder.RESULT).exists()


def _scalars(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
