"""One training run in its folder, from where it starts, or was stopped, to what it came to."""

import dataclasses
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
from rich.console import Console

import lbpwht_jax
from lbpwht_jax.adaptation import AdaptedModule, layer_counts
from lbpwht_jax.cost import backward_flops, residual_bytes
from lbpwht_jax.data import Dataset, training_batches
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.config import RunConfig, check_unchanged
from lbpwht_jax.runs.folder import writing
from lbpwht_jax.runs.metrics import METRICS, MetricsFile, read_metrics
from lbpwht_jax.runs.plot import plot_curves
from lbpwht_jax.runs.progress import Reporter
from lbpwht_jax.runs.results import Result
from lbpwht_jax.screen import say
from lbpwht_jax.train import Diverged, Epoch, Placement, Snapshot, Trainer, TrainState
from lbpwht_jax.train.checkpoint import Checkpoints, Facts, has_checkpoint
from lbpwht_jax.train.processes import is_first
from lbpwht_jax.train.stop import StopSignals
from lbpwht_jax.weights import save_adapter, save_weights


class Stopped(Exception):
    """Raised when a signal stopped a run, after its state was saved; the text says where."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run that is ready to start or to go on.

    Attributes:
      config: what the run is.
      folder: the run's folder.
      model: the model under the method's rules.
      trainer: what trains it.
      variables: what training starts from, unless it goes on from a checkpoint.
      restored: the state that training goes on from, and the checkpoint's facts.
      notes: what the user should know before it starts, such as what is wrong with other checkpoints; a message for each.
    """

    config: RunConfig
    folder: Path
    model: AdaptedModule
    trainer: Trainer
    variables: Mapping[str, Any] | None
    restored: tuple[TrainState, Facts] | None
    notes: Sequence[str] = ()

    def train(self, save_every: int, console: Console) -> tuple[Result, bool]:
        """Trains to the end, saving as it goes, and writes weights, plot and result.

        Args:
          save_every: steps between checkpoints, beside those at the end of each epoch; 0 for no others.
          console: to show progress on.

        Returns:
          The result, and whether a signal came too late to stop the run.

        Raises:
          Stopped: after a signal, once the state is saved.
          Diverged: if a loss, a gradient or an updated parameter is not finite, once the last good state is saved.
          ValueError: if training images cannot be read.
          OSError: if a checkpoint, or anything else, cannot be written.
        """
        with Checkpoints(self.folder, self.config.to_json()) as checkpoints:
            state = self._start(checkpoints)
            done = int(jax.device_get(state.step))
            self._announce(console, state, done)
            with StopSignals(self.folder, lambda: has_checkpoint(self.folder)) as stop:
                state = self._follow(state, done, save_every, checkpoints, console, stop)
                checkpoints.wait()
                return self._finish(state, checkpoints.best, console), stop.received is not None

    def stepping(self) -> Callable[[], Any]:
        """Returns a function that makes another step on the first batch each time, from where the run started.

        For timing: it returns the step's metrics, which may still be on their way. Nothing is saved.
        """
        trainer = self.trainer
        with training_batches(trainer.dataset, trainer.loading) as batches:
            batch = trainer.placement.put_batch(next(batches))
        held = [trainer.initial_state(self.variables)]

        def step() -> Any:
            held[0], metrics = trainer.train_step(held[0], batch)
            return metrics

        return step

    def _start(self, checkpoints: Checkpoints) -> TrainState:
        placement = self.trainer.placement
        if self.restored is not None:
            state, facts = self.restored
            checkpoints.begin(state, placement, facts)
            if is_first() and run_folder.read_config(self.folder).extended != self.config.extended:
                with writing(self.folder / run_folder.CONFIG, self.folder):
                    run_folder.extend(self.folder, self.config, self.trainer.steps)
            return state
        state = self.trainer.initial_state(self.variables)
        checkpoints.begin(state, placement)
        if is_first():
            made_by = {"lbpwht_jax": lbpwht_jax.__version__, "jax": jax.__version__, "flax": flax.__version__}
            made_by["python"] = platform.python_version()
            device = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
            values = {**self.config.to_json(), "steps": self.trainer.steps, "versions": made_by, **device}
            with writing(self.folder / run_folder.CONFIG, self.folder):
                run_folder.write_json(self.folder / run_folder.CONFIG, values)
        return state

    def _announce(self, console: Console, state: TrainState, done: int) -> None:
        config, dataset = self.config, self.trainer.dataset
        validation = 0 if dataset.validation is None else len(dataset.validation)
        trained, parameters = _scalars(state.params), _scalars((state.params, state.frozen))
        say(
            console,
            f"{config.method}: {config.model} on {dataset.name} ({len(dataset.train)} training, {validation} validation and "
            f"{len(dataset.test)} test images are listed, {len(dataset.classes)} classes)"
            + (f", going on after step {done}" if done else ""),
            style="bold",
        )
        say(
            console,
            f"Trained ({config.train}): {trained:,} of {parameters:,} parameters, {trained / parameters:.2%}. "
            f"Layers that low rank can adapt: {layer_counts(config.info, self.model)} (--when {config.when}).",
        )
        say(
            console,
            "Each epoch and the choice of the best one use the validation images alone; the test images are measured once, at "
            "the end."
            if validation
            else "No validation images: each epoch measures the test images, and the best checkpoint is the last epoch's.",
        )
        if config.recipe.loss_parts:
            say(console, f"Training losses contain {' and '.join(config.recipe.loss_parts)}; the others do not.")
        for message in self.notes:
            say(console, message, style="yellow")

    def _follow(
        self, state: TrainState, done: int, save_every: int, checkpoints: Checkpoints, console: Console, stop: StopSignals
    ) -> TrainState:
        """Trains, writing and showing all on the way; returns the state after the last step."""
        with writing(self.folder / METRICS, self.folder):
            file = MetricsFile(self.folder, self.config.recipe.batch_size, done, write=is_first())
        for note in file.notes:
            say(console, note, style="yellow")
        started = done - done % self.trainer.steps_per_epoch
        losses = [step.loss for step in read_metrics(self.folder)[0] if started < step.number <= done]
        unread: set[str] = set()
        with file as metrics, Reporter(console, self.trainer, done, losses) as reporter:
            try:
                for event in (
                    () if self._without_progress(done, checkpoints.best) else self.trainer.fit(state, save_every, stop)
                ):
                    checkpoints.check()
                    if isinstance(event, Snapshot):
                        state = event.state
                        self._save(event, checkpoints, metrics)
                        if new := event.skipped.keys() - unread:
                            unread |= new
                            say(console, f"{len(new)} listed images could not be read and count nowhere", style="yellow")
                        if event.epoch is not None and self._without_progress(event.epoch.step, checkpoints.best):
                            break
                    else:
                        with writing(self.folder / METRICS, self.folder):
                            metrics.write(event)
                        reporter.show(event)
            except Diverged as error:
                kept = self._keep(error.state, checkpoints)
                raise Diverged(f"{error}; the state after step {kept}, all finite, is in {self.folder}", error.state) from None
            step, best = int(jax.device_get(state.step)), checkpoints.best
            if best is not None and self._without_progress(step, best):
                say(
                    console,
                    f"Stopped after step {step} of {self.trainer.steps}: none of the last {self.config.recipe.patience} epochs "
                    f"beat epoch {best.number}, {best.accuracy:.2%} on the validation images; --checkpoint best has it.",
                )
            elif stop.received is not None and step < self.trainer.steps:
                checkpoints.wait()
                raise Stopped(
                    f"stopped by {stop.received.name} after step {step} of {self.trainer.steps}, which is saved; go on with "
                    f"lbpwht finetune --resume {self.folder}"
                )
        return state

    def _without_progress(self, step: int, best: Epoch | None) -> bool:
        """Whether as many epochs as the recipe's patience have ended by this step since the best one."""
        patience, per_epoch = self.config.recipe.patience, self.trainer.steps_per_epoch
        return patience > 0 and best is not None and step % per_epoch == 0 and step // per_epoch - best.number >= patience

    def _save(self, snapshot: Snapshot, checkpoints: Checkpoints, metrics: MetricsFile) -> None:
        with writing(self.folder / METRICS, self.folder):
            metrics.sync()
        if is_first() and snapshot.skipped:
            with writing(self.folder / run_folder.SKIPPED, self.folder):
                run_folder.add_skipped(self.folder, snapshot.skipped)
        checkpoints.save(snapshot.state, snapshot.epoch)

    def _keep(self, state: TrainState, checkpoints: Checkpoints) -> int:
        step = int(jax.device_get(state.step))
        checkpoints.wait()
        if step not in checkpoints.steps:
            checkpoints.save(state)
            checkpoints.wait()
        return step

    def _finish(self, state: TrainState, best: Epoch | None, console: Console) -> Result:
        config, folder = self.config, self.folder
        variables = self.trainer.placement.gather(state.averaged)
        if is_first():
            metadata = {"model": config.model, "classes": config.classes}
            with writing(folder / run_folder.WEIGHTS, folder):
                save_weights(folder / run_folder.WEIGHTS, self.model.merge(variables), metadata)
            if "lora" in config.method:
                with writing(folder / run_folder.ADAPTER, folder):
                    save_adapter(folder / run_folder.ADAPTER, self.model, variables, config.model)
        steps, epochs = read_metrics(folder)
        image = (config.image_size, config.image_size, config.channels)
        result = Result(
            config.method,
            self._test_accuracy(state, best),
            _scalars(state.params),
            backward_flops(self.model, variables, image),
            residual_bytes(self.model, variables, image),
            statistics.median(step.seconds for step in steps[1:] or steps) if steps else None,
        )
        if is_first():
            with writing(folder / run_folder.PLOT, folder):
                title, contains = f"{config.model} on {config.dataset}, {config.method}", " and ".join(config.recipe.loss_parts)
                training = f"training, with {contains}" if contains else "training"
                plot_curves(folder / run_folder.PLOT, steps, epochs, title, training)
            with writing(folder / run_folder.RESULT, folder):
                run_folder.write_json(folder / run_folder.RESULT, dataclasses.asdict(result))
        self._tell_skipped(console)
        return result

    def _test_accuracy(self, state: TrainState, best: Epoch | None) -> float:
        """The accuracy of the last state on the test images; measured now, unless the last epoch measured it."""
        if best is not None and best.step == self.trainer.steps and best.test_accuracy is not None:
            return best.test_accuracy
        found = self.trainer.evaluator(state.averaged, self.trainer.dataset.test)
        if is_first() and found.skipped:
            run_folder.add_skipped(self.folder, found.skipped)
        return found.accuracy

    def _tell_skipped(self, console: Console) -> None:
        skipped = run_folder.add_skipped(self.folder, {})
        if skipped:
            name, reason = next(iter(skipped.items()))
            say(
                console,
                f"images that could not be read and count nowhere: {len(skipped)}, listed in "
                f"{self.folder / run_folder.SKIPPED}; the first is {name}: {reason}",
                style="yellow",
            )


def prepare(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    placement: Placement,
    workers: int | None,
    resume_step: int | None = None,
    notes: Sequence[str] = (),
) -> TrainingRun:
    """Checks a run and reads what it starts from; writes nothing.

    Args:
      config: what the run is.
      folder: the run's folder.
      dataset: its data.
      placement: where the arrays live.
      workers: threads that load images; by default as many as there are cores, up to 16.
      resume_step: the checkpoint to go on from; by default the run starts with its pretrained weights.
      notes: what the user should know before training starts, a message for each.

    Raises:
      ValueError: if a name is unknown, the method trains nothing, the data has other classes or too few images, or the
        devices cannot share a batch; if the checkpoint is damaged, or not of this model.
      ValueError, FileNotFoundError, ImportError: if the pretrained weights cannot be had.
    """
    config.check_classes(dataset)
    model = config.adapted()
    trainer = Trainer(model, config.info, dataset, config.recipe, config.image_size, model.trainable, placement, workers)
    if resume_step is None:
        return TrainingRun(config, folder, model, trainer, config.start(model), None, notes)
    with Checkpoints(folder, config.to_json(), write=False) as checkpoints:
        check_unchanged(config, checkpoints.facts(resume_step).config, folder, resume_step)
        restored = checkpoints.restore(config.abstract_state(model, placement), placement, resume_step)
        damaged = checkpoints.damaged()
    return TrainingRun(config, folder, model, trainer, None, restored, (*notes, *damaged))


def finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / run_folder.RESULT).exists()


def _scalars(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
