"""``lbpwht finetune``: adapts a pretrained vision transformer and reports what it cost."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from lbpwht_jax.adaptation import default_train
from lbpwht_jax.cli.compare import compare
from lbpwht_jax.cli.execute import report
from lbpwht_jax.cli.help import flag
from lbpwht_jax.cli.plan import chosen_plan, summary
from lbpwht_jax.cli.resume import resumed_run
from lbpwht_jax.cli.run_flags import AUTO, RunFlags
from lbpwht_jax.data import Dataset
from lbpwht_jax.data.validation import plain_errors
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs import training as training_run
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.results import table
from lbpwht_jax.runs.training import Stopped, TrainingRun
from lbpwht_jax.screen import console, say, show
from lbpwht_jax.train import Placement, Shard, keep_freed_memory
from lbpwht_jax.train.processes import connect, is_first
from lbpwht_jax.train.stop import STOPPED

_COMPARED = ("full", "lp_l1-2")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Adapt a pretrained vision transformer with low-rank backpropagation.

    Without arguments, adapts the small vision transformer that comes with the package (pretrained on Fashion-MNIST) to
    scikit-learn's handwritten digits with LP_{L1-4}, without a network, in about a minute on two cores. The forward pass is
    exact; the backward pass of every dense layer of every block runs on a few Walsh coefficients of the token grid.

    At the end a table gives test accuracy, backward MFLOPs and bytes kept for the backward pass, both per image, and the
    median time of a step. The run folder holds config.json, metrics.jsonl, tensorboard, checkpoints, weights.safetensors (of
    the plain model, LoRA's branches merged) and curves.png; with LoRA also adapter: only what was trained, in PEFT's layout.
    "lbpwht evaluate", "predict" and "export" take the folder and need no more.

    SIGTERM or Ctrl-C lets the step end, saves and leaves with exit code 3; a second one leaves at once, and before training
    begins the first one does. "--resume" goes on bit for bit. Standard output may be closed while a run goes on. A run starts
    from the first of these that there is: the checkpoint that --resume names (by default the last one of its run),
    --pretrained, the weights that come with the package.

    Exit codes: 0 done; 1 training failed (diverged, or the disk is full); 2 mistaken arguments; 3 stopped and saved.

    Try "lbpwht finetune --compare" to see full backpropagation and LP_{L1-2} beside it, or "lbpwht finetune --model
    efficientformer_l1 --pretrained timm/efficientformer_l1.snap_dist_in1k --dataset folder:PATH" for your own images.
    """

    run: Annotated[RunFlags, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="model, data and method", prefix_name=False)] = (
        dataclasses.field(default_factory=RunFlags)
    )

    data_dir: Annotated[Path | None, flag("FOLDER", "where TFDS has them")] = None
    """Folder of the TFDS data sets."""

    shard: Shard = "data"
    """What the devices share: data (each has all of the parameters) or params (parameters and the optimiser's state too)."""

    coordinator: Annotated[str | None, flag("HOST:PORT", "one process")] = None
    """Where process 0 is, such as 10.0.0.1:1234, if a run has several; TPU slices and SLURM's tasks need none. All see one run
    folder."""

    num_processes: Annotated[int | None, flag("INT", "one process")] = None
    """Processes of the run, with --coordinator, such as 2."""

    process_id: Annotated[int | None, flag("INT", "one process")] = None
    """Which of them this is, from 0, with --coordinator."""

    workers: Annotated[int | None, flag("INT", "as many as there are cores, up to 16")] = None
    """Threads that load images."""

    keep_freed_memory: tyro.conf.FlagCreatePairsOff[bool] = False
    """Lets the C library (glibc) keep what a step frees, instead of clearing new pages at each step: on CPUs steps of large
    models are about a fifth faster, but the process takes up to twice the memory."""

    output: Annotated[Path | None, flag("FOLDER", "runs/DATE-TIME-METHOD")] = None
    """Folder for the run, which must not hold one yet."""

    checkpoint_every: int = 0
    """Steps between checkpoints, beside those at the end of each epoch; 0 for no others. The last two and the best
    are kept."""

    resume: Annotated[Path | None, flag("RUN", "a new run")] = None
    """The folder of a run to go on with, from its last checkpoint; its configuration holds, and flags that contradict it are
    refused; but --epochs, the new total, trains on, also where the run is finished."""

    resume_step: Annotated[int | None, flag("STEP", "the last one")] = None
    """With --resume: the checkpoint of this step, such as an older one where the last is damaged."""

    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also train with full backpropagation and with lp_l1-2, into OUTPUT/compare/, and show them beside."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks everything that can be checked before training, and makes the run folders.

        Returns:
          The function that trains.

        Raises:
          ValueError: if a value is out of range, a name is unknown, nothing would be trained, the run folder cannot be used,
            or the checkpoint to go on from is damaged or of another model.
          FileNotFoundError, ImportError: if data or pretrained weights cannot be had.
        """
        if self.checkpoint_every < 0:
            raise ValueError(f"--checkpoint-every must not be negative, got {self.checkpoint_every}")
        if self.keep_freed_memory:
            keep_freed_memory()
        connect(self.coordinator, self.num_processes, self.process_id)
        with contextlib.ExitStack() as locks, plain_errors():
            runs = self._new_runs(locks) if self.resume is None else [self._resumed_run(self.resume, locks)]
            held = locks.pop_all()

        def run() -> int | None:
            shown, results = console(quiet=not is_first()), []
            try:
                with held:
                    for each in runs:
                        result, stopping = each.train(self.checkpoint_every, shown)
                        results.append(result)
                        if stopping and len(results) < len(runs):
                            raise Stopped(
                                f"stopped by a signal after {len(results)} of {len(runs)} runs; the others have not begun"
                            )
            except Stopped as stopped:
                report(stopped)
                return STOPPED
            if len(runs) > 1:
                results = compare(runs, results, shown)
            show(shown, table(results))
            say(shown, f"Run folder: {runs[0].folder}")
            return None

        return run

    def _new_runs(self, locks: contextlib.ExitStack) -> list[TrainingRun]:
        if self.resume_step is not None:
            raise ValueError("--resume-step goes with --resume RUN")
        config, dataset, notes = self._planned(*self.run.new_run(self.data_dir))
        methods = [config.method, *(other for other in _COMPARED if self.compare and other != config.method)]
        output = self.output or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{config.method}"
        folders = [output, *(output / "compare" / method for method in methods[1:])]
        placement = Placement(self.shard)
        trained = {config.method: config.train}
        trained |= {method: self.run.train or default_train(method) for method in methods[1:]}
        configs = [
            dataclasses.replace(config, method=method, train=train, plan=config.plan if method == config.method else None)
            for method, train in trained.items()
        ]
        runs = [
            training_run.prepare(each, folder, dataset, placement, self.workers, None, notes)
            for each, folder in zip(configs, folders, strict=True)
        ]
        for folder in folders if is_first() else ():
            locks.callback(run_folder.lock(folder, create=True).release)
        return runs

    def _planned(self, config: RunConfig, dataset: Dataset, notes: list[str]) -> tuple[RunConfig, Dataset, list[str]]:
        """The run with the plan that ``--method auto`` makes first, under ``--budget``."""
        if self.run.method != AUTO:
            if self.run.budget is not None:
                raise ValueError(f"--budget goes with --method auto, not {config.method}")
            return config, dataset, notes
        if self.run.budget is None:
            raise ValueError("--method auto needs --budget, such as --budget flops=0.3")
        shown = console(quiet=not is_first())
        made = chosen_plan(config, dataset, self.run.budget, lambda text: say(shown, f"Plan: {text}"))
        return dataclasses.replace(config, method="plan", plan=made), dataset, [*notes, f"Plan: {summary(made)}"]

    def _resumed_run(self, folder: Path, locks: contextlib.ExitStack) -> TrainingRun:
        if self.compare:
            raise ValueError("--compare does not go with --resume: one run goes on; leave it out")
        return resumed_run(folder, self.run, self.resume_step, self.data_dir, Placement(self.shard), self.workers, locks)
