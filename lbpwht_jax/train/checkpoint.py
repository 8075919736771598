"""Checkpoints of a training run, by orbax: written beside the training, whole or not at all, and verified when read."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from lbpwht_jax.train import Epoch, Placement, TrainState
from lbpwht_jax.weights.files import load_weights, save_weights

FOLDER, FROZEN = "checkpoints", "frozen.safetensors"
_STATE, _FACTS, _ACCURACY = "state", "facts", "test_accuracy"
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint holds beside its arrays.

    Attributes:
      step: the steps done. The next step's images and random numbers follow from it and the seed in the configuration.
      best: the epoch with the highest test accuracy so far, if one ended.
      config: the run's, JSON values.
      fingerprints: of every array by its name, frozen parameters included.
    """

    step: int
    best: Epoch | None
    config: Mapping[str, Any]
    fingerprints: Mapping[str, int]


class Checkpoints:
    """The checkpoints in a run folder: the last two and the one of the highest test accuracy. A context manager.

    A checkpoint holds what training changes: the trained parameters, their moving average, the model's other variables, the
    optimiser's state and the step. Frozen parameters are written once, beside.

    Args:
      run: the run folder.
      config: of the run, kept in each checkpoint.
      write: whether checkpoints are written; unfinished ones of a process that died are then removed.

    Raises:
      OSError: if their folder cannot be written.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], *, write: bool = True):
        self._run, self._config = run, config
        policies = checkpoint_managers
        keep = [policies.LatestN(2), policies.BestN(get_metric_fn=_accuracy, n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=write,
            create=write,
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _FACTS: ocp.JsonCheckpointHandler()}
        with _failing_to_save(f"checkpoints in {run}"):
            self._manager = ocp.CheckpointManager((run / FOLDER).absolute(), options=options, item_handlers=handlers)
        self._best: Epoch | None = None
        self._frozen: dict[str, int] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # ``wait`` reports what went wrong
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps there are checkpoints of, rising."""
        return sorted(self._manager.all_steps())

    def begin(self, state: TrainState, placement: Placement, restored: Facts | None = None) -> None:
        """Prepares for saving: writes the frozen parameters of a new run, removes later checkpoints of one that goes on.

        Args:
          state: that training begins with.
          placement: where it is.
          restored: the facts of the checkpoint it was read from, if it was.

        Raises:
          OSError: if this cannot be done.
        """
        self._frozen = _fingerprints({"frozen": state.frozen})
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
        """Starts to write a checkpoint, after waiting for the one before; the state's memory is free on return.

        Args:
          state: of a step there is no checkpoint of.
          epoch: the epoch it ends, if it does.

        Raises:
          OSError: if it, or the one before, could not be written; older ones stay as they are.
        """
        if epoch is not None and (self._best is None or epoch.test_accuracy >= self._best.test_accuracy):
            self._best = epoch
        arrays, step = _arrays(state), int(jax.device_get(state.step))
        best = None if self._best is None else self._best._asdict()
        facts = {"step": step, "best": best, "config": self._config, "fingerprints": self._frozen | _fingerprints(arrays)}
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(arrays), _FACTS: ocp.args.JsonSave(facts)})
        metrics = {} if epoch is None else {_ACCURACY: epoch.test_accuracy}
        with _failing_to_save(f"checkpoint {step} of {self._run}"):
            self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Waits until what ``save`` started is written.

        Raises:
          OSError: if it could not be.
        """
        with _failing_to_save(f"the last checkpoint of {self._run}"):
            self._manager.wait_until_finished()

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
            best = None if values["best"] is None else Epoch(**values["best"])
            return Facts(values["step"], best, values["config"], values["fingerprints"])

    def restore(self, abstract: TrainState, placement: Placement, step: int) -> tuple[TrainState, Facts]:
        """Reads a checkpoint, whatever the devices it was written on, and verifies that nothing in it changed since.

        Args:
          abstract: shapes, dtypes and shardings of the state wanted.
          placement: where it goes.
          step: one of ``steps``.

        Raises:
          ValueError: if it is missing or damaged; if its tree, shapes or dtypes are not those of the state wanted, with the
            list of differences.
        """
        facts = self.facts(step)
        wanted = _arrays(abstract)
        with self._reading(step):
            there: Any = self._manager.item_metadata(step)[_STATE]
            found = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in there.items()}
        listed = differences(found, {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in wanted.items()})
        if listed:
            raise ValueError(
                f"checkpoint {step} of {self._run} is not of this model and recipe (- in the checkpoint, + in the model):\n  "
                + "\n  ".join(listed)
            )
        with self._reading(step):
            items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
            arrays = self._manager.restore(step, args=items)[_STATE]
        state = _with_arrays(abstract, arrays, self._read_frozen(abstract.frozen, placement))
        values = _fingerprints({"frozen": state.frozen}) | _fingerprints(arrays)
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
        wanted, found = (shapes(tree) for tree in (abstract, frozen))
        if wanted != found:
            raise ValueError(f"{self._run / FROZEN} is not of this model:\n  " + "\n  ".join(differences(found, wanted)))
        return placement.put(frozen, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore and orbax raise errors of many types
            raise ValueError(self._damaged(step, str(error).splitlines()[0][:200])) from error

    def _damaged(self, step: int, reason: str) -> str:
        older = [other for other in self.steps if other < step]
        advice = (
            f"an older one can be used by naming its step: {', '.join(map(str, older))}" if older else "there is no older one"
        )
        return f"checkpoint {step} of {self._run} is damaged ({reason}); {advice}"


def last_step(run: Path) -> int | None:
    """The step of the last checkpoint in a run folder; ``None`` without one."""
    with Checkpoints(run, {}, write=False) as checkpoints:
        return max(checkpoints.steps, default=None)


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics.get(_ACCURACY, -1.0)


@contextlib.contextmanager
def _failing_to_save(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tensorstore and orbax raise errors of many types
        reason = str(error).splitlines()[0][:300]
        raise OSError(f"cannot save {what}: {reason}; the checkpoints before it are as they were") from error


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


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array in nested dictionaries, by path."""
    flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep=".")
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in flat.items()}


def differences(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> list[str]:
    """What two of ``shapes`` differ in, a line each with ``-`` for what was found and ``+`` for what is wanted; at most 20."""
    lines = []
    for name in sorted(found.keys() | wanted.keys(), key=lambda name: (not name.startswith("params"), name)):
        if found.get(name) != wanted.get(name):
            for sign, side in (("-", found), ("+", wanted)):
                if name in side:
                    shape, dtype = side[name]
                    lines.append(f"{sign} {name} {dtype}{list(shape)}")
    return lines[:_SHOWN] + [f"... and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)


def _fingerprints(tree: Any) -> dict[str, int]:
    """A number for every array, told by its bits and their places, whatever the devices it is on."""
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    return {name: int(value) for name, value in jax.device_get(_sums(named)).items()}


@jax.jit
def _sums(named: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _weighted_sum(leaf) for name, leaf in named.items()}


def _weighted_sum(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = (leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, unsigned)).astype(jnp.uint32)
    # odd factors, different at each place, so that neither a changed bit nor two arrays' elements swapped go unseen
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :])
        place = place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
