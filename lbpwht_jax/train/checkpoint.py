"""Checkpoints of a training run, by orbax: written while training goes on, never in part, and verified when read."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from lbpwht_jax.train import Epoch, Placement, TrainState
from lbpwht_jax.train.fingerprints import fingerprints
from lbpwht_jax.weights.differences import check_same, describe_arrays
from lbpwht_jax.weights.files import load_weights, save_weights

FOLDER, FROZEN = "checkpoints", "frozen.safetensors"
_STATE, _FACTS, _METRICS = "state", "facts", "metrics"
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint holds beside its arrays.

    Attributes:
      step: number of steps done. The next step's images and random numbers follow from it and the configuration's seed.
      best: the epoch that did best so far, as ``better`` says; ``None`` before the first epoch has ended.
      config: the run's configuration, JSON values.
      fingerprints: a fingerprint of each array by name, frozen parameters included.
    """

    step: int
    best: Epoch | None
    config: Mapping[str, Any]
    fingerprints: Mapping[str, int]


class Checkpoints:
    """The checkpoints in a run folder: the last two, and the one of the best epoch. A context manager.

    A checkpoint holds what training changes: the trained parameters, their moving average, the model's other variables, the
    optimiser's state and the step. Frozen parameters are written once, to a file of their own.

    Args:
      run: the run folder.
      config: the run's configuration, kept in each checkpoint.
      write: whether checkpoints are written; if so, unfinished ones of a process that died are removed.

    Raises:
      OSError: if their folder cannot be written.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], *, write: bool = True):
        self._run, self._config = run, config
        self._best: Epoch | None = None
        self._frozen: dict[str, int] = {}
        self._last: int | None = None
        policies = checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,  # only so that a checkpoint's metrics are written
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), _Best(self)]),
            cleanup_tmp_directories=write,
            create=write,
            lightweight_initialize=True,  # else one damaged checkpoint keeps all others from being read
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _FACTS: ocp.JsonCheckpointHandler()}
        with _failing_to_save(f"checkpoints in {run}"):
            self._manager = ocp.CheckpointManager((run / FOLDER).absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # ``wait`` reports what went wrong
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in rising order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> Epoch | None:
        """The best epoch so far; ``None`` before the first epoch has ended."""
        return self._best

    def begin(self, state: TrainState, placement: Placement, restored: Facts | None = None) -> None:
        """Prepares for saving: writes a new run's frozen parameters; removes the later checkpoints of a run that is resumed.

        Args:
          state: the state that training begins with.
          placement: where the state is.
          restored: the facts of the checkpoint that the state was read from; ``None`` for a new run.

        Raises:
          OSError: if a file cannot be written or removed.
        """
        self._frozen = fingerprints({"frozen": state.frozen})
        if restored is not None:
            self._best = restored.best
            with _failing_to_save(f"checkpoints in {self._run}"):
                for later in (step for step in self.steps if step > restored.step):
                    self._manager.delete(later)
            return
        frozen = placement.gather(state.frozen)
        if frozen and jax.process_index() == 0:
            with _failing_to_save(f"the frozen parameters of {self._run}"):
                save_weights(self._run / FROZEN, {"params": frozen}, {})

    def save(self, state: TrainState, epoch: Epoch | None = None) -> None:
        """Starts to write a checkpoint, after waiting for the one before; the state's memory may be reused on return.

        Args:
          state: the state after a step that has no checkpoint yet.
          epoch: the epoch that ended with this step, if one did.

        Raises:
          OSError: if this checkpoint or the one before cannot be written; older ones stay as they are.
        """
        if epoch is not None and better(epoch, self._best):
            self._best = epoch
        arrays, step = _arrays(state), int(jax.device_get(state.step))
        best = None if self._best is None else self._best._asdict()
        facts = {"step": step, "best": best, "config": self._config, "fingerprints": self._frozen | fingerprints(arrays)}
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(arrays), _FACTS: ocp.args.JsonSave(facts)})
        metrics = {} if epoch is None else epoch.measured
        self.wait()  # so that the failure of the one before is not taken for this one's
        with _failing_to_save(f"checkpoint {step} of {self._run}"):
            self._manager.save(step, args=items, metrics=metrics)
        self._last = step

    def wait(self) -> None:
        """Waits until the checkpoint that ``save`` started is written.

        Raises:
          OSError: if it cannot be written. Other threads may still be writing parts of it; if there is room for them again, and
            for what failed, the checkpoint appears all the same, and is whole.
        """
        with _failing_to_save(f"checkpoint {self._last} of {self._run}"):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Tells whether a checkpoint that is being written has failed, without waiting for it.

        Raises:
          OSError: if it has.
        """
        with _failing_to_save(f"checkpoint {self._last} of {self._run}"):
            self._manager.check_for_errors()

    def damaged(self) -> list[str]:
        """What is wrong with the checkpoints whose facts cannot be read, a message for each."""
        messages = []
        for step in self.steps:
            try:
                self.facts(step)
            except ValueError as error:
                messages.append(str(error))
        return messages

    def facts(self, step: int) -> Facts:
        """What a checkpoint holds beside its arrays.

        Raises:
          ValueError: if there is no checkpoint of this step, or it is damaged.
        """
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(f"{self._run} has no checkpoint of step {step}; there are: {there}")
        with self._reading(step):
            values = self._manager.restore(step, args=ocp.args.Composite(**{_FACTS: ocp.args.JsonRestore()}))[_FACTS]
            metrics = self._run / FOLDER / str(step) / _METRICS / _METRICS
            if metrics.exists():  # nothing uses it, but a file that changed tells of damage
                json.loads(metrics.read_text())
            best = None if values["best"] is None else Epoch(**values["best"])
            return Facts(values["step"], best, values["config"], values["fingerprints"])

    def restore(self, abstract: TrainState, placement: Placement, step: int) -> tuple[TrainState, Facts]:
        """Reads a checkpoint, onto any devices, and verifies that nothing in it has changed since it was written.

        Args:
          abstract: the shapes, dtypes and shardings of the state wanted.
          placement: where the state goes.
          step: one of ``steps``.

        Raises:
          ValueError: if the checkpoint is missing or damaged; if its names, shapes or dtypes are not those of the state
            wanted, with lists of the differences.
        """
        facts = self.facts(step)
        wanted = _arrays(abstract)
        with self._reading(step):
            there: Any = self._manager.item_metadata(step)[_STATE]
            found = describe_arrays(dict(there.items()))
        check_same(describe_arrays(wanted), found, f"checkpoint {step} of {self._run} is not of this model and recipe")
        with self._reading(step):
            items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
            arrays = self._manager.restore(step, args=items)[_STATE]
        state = _with_arrays(abstract, arrays, self._read_frozen(abstract.frozen, placement))
        values = fingerprints({"frozen": state.frozen}) | fingerprints(arrays)
        changed = [name for name, value in values.items() if facts.fingerprints.get(name) != value]
        if changed:
            raise ValueError(self._damaged(step, f"its contents changed at {', '.join(changed[:8])}"))
        return state, facts

    def _read_frozen(self, abstract: Any, placement: Placement) -> Any:
        if not jax.tree.leaves(abstract):
            return abstract
        try:
            frozen = load_weights(self._run / FROZEN)[0]["params"]
        except (OSError, ValueError) as error:
            raise ValueError(f"the frozen parameters of {self._run} cannot be read: {error}") from None
        check_same(describe_arrays(abstract), describe_arrays(frozen), f"{self._run / FROZEN} is not of this model")
        return placement.put(frozen, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore and orbax raise errors of many types
            raise ValueError(self._damaged(step, _first_line(error))) from error

    def _damaged(self, step: int, reason: str) -> str:
        others = [other for other in self.steps if other != step]
        if not others:
            return f"checkpoint {step} of {self._run} is damaged ({reason}); there is no other"
        use = max((other for other in others if other < step), default=others[0])
        return (
            f"checkpoint {step} of {self._run} is damaged ({reason}); the others, {', '.join(map(str, others))}, can be used: "
            f"lbpwht finetune --resume {self._run} --resume-step {use}, or --checkpoint {use} to evaluate, predict or export"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Best:
    """Keeps the checkpoint of the best epoch."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self.checkpoints.best
        return [best is not None and each.step == best.step for each in checkpoints]


def better(epoch: Epoch, best: Epoch | None) -> bool:
    """Whether an epoch is now the best one.

    It is if its accuracy on validation images is higher than the best one's: of equal ones the first is the best. Without
    validation images the last epoch always is: choosing by test accuracy would tell too much of the test images.
    """
    if best is None or epoch.validation_accuracy is None or best.validation_accuracy is None:
        return True
    return epoch.validation_accuracy > best.validation_accuracy


def last_step(run: Path) -> int | None:
    """The step of the last checkpoint in a run folder; ``None`` without one."""
    with Checkpoints(run, {}, write=False) as checkpoints:
        return max(checkpoints.steps, default=None)


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder holds a checkpoint that was written to its end; reads nothing but names."""
    return any(path.name.isdecimal() for path in (run / FOLDER).glob("*"))


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics.get("validation_accuracy", -1.0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def fault(error: BaseException) -> str:
    """What went wrong with a file: what the system says, where the error, or one that it came from, tells; else its text."""
    chain, text = [error], str(error)
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    return next((os.strerror(code) for code in _FAULTS if os.strerror(code) in text), _first_line(error))


@contextlib.contextmanager
def _failing_to_save(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tensorstore and orbax raise errors of many types
        raise OSError(f"cannot save {what}: {fault(error)}; the checkpoints before it are as they were") from error


def _arrays(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds, by name."""
    tree = {name: getattr(state, name) for name in ("params", "ema", "others", "optimizer", "step")}
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _with_arrays(abstract: TrainState, arrays: Mapping[str, Any], frozen: Any) -> TrainState:
    tree = {name: getattr(abstract, name) for name in ("params", "ema", "others", "optimizer", "step")}

    def leaf(path: Any, _: Any) -> Any:
        return arrays[jax.tree_util.keystr(path, simple=True, separator=".")]

    restored = jax.tree.map_with_path(leaf, tree)
    good = jax.device_put(np.zeros((), bool), abstract.diverged.sharding)
    return TrainState(frozen=frozen, diverged=good, **restored)
