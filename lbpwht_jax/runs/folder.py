"""The folder of a training run: its lock, its configuration and its JSON files."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.metrics import METRICS, keep_copy
from lbpwht_jax.train.checkpoint import fault, has_checkpoint

CONFIG, RESULT, SKIPPED, LOCK = "config.json", "result.json", "skipped.json", ".lock"
WEIGHTS, ADAPTER, PLOT = "weights.safetensors", "adapter", "curves.png"


def lock(path: Path, create: bool) -> filelock.BaseFileLock:
    """Takes a run folder for this process, until the lock is released or the process ends.

    Args:
      path: the folder.
      create: true for a new run, whose folder is made; false for one that is there.

    Raises:
      ValueError: if another process has the folder; if a new run's folder holds one already, or the folder of a run that is
        there holds none; if it cannot be made or written.
    """
    if create and ((path / CONFIG).exists() or (path / METRICS).exists()):
        raise ValueError(f"{path} already holds a run; name another --output, continue it with --resume {path}, or delete it")
    if not create:
        read_config(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path / LOCK, timeout=0)
        held.acquire()
    except filelock.Timeout:
        raise ValueError(f"{path} is in use by another process; wait for it to end, or stop it") from None
    except OSError as error:
        raise ValueError(f"cannot write the run folder {path}: {error.strerror}; name another --output") from None
    return held


@contextlib.contextmanager
def writing(file: Path, run: Path) -> Iterator[None]:
    """Says on one line which file of a run cannot be written, and what is safe.

    Raises:
      OSError: in place of one that is raised inside.
    """
    try:
        yield
    except OSError as error:
        safe = (
            f"the checkpoints are as they were; once it can be written, go on with lbpwht finetune --resume {run}"
            if has_checkpoint(run)
            else "there is no checkpoint yet"
        )
        raise OSError(f"cannot write {file}: {fault(error)}; {safe}") from None


def read_config(path: Path) -> RunConfig:
    """Reads the configuration of a run.

    Raises:
      ValueError: if the folder holds no run, or a field of its ``config.json`` is missing or wrong.
    """
    try:
        text = (path / CONFIG).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is no run folder: cannot read {path / CONFIG} ({error.strerror})") from None
    return RunConfig.from_json(text, f"{path / CONFIG}: no configuration of this version's")


def extend(path: Path, config: RunConfig, steps: int) -> None:
    """Makes a run, finished or not, one that goes on with another number of epochs: what it ended with is removed.

    Args:
      path: the run folder.
      config: what the run is from now on.
      steps: of the whole training.

    Raises:
      OSError: if a file cannot be written or removed.
    """
    for name in (RESULT, WEIGHTS):
        (path / name).unlink(missing_ok=True)
    recorded = json.loads((path / CONFIG).read_bytes())
    new = config.to_json()
    write_json(path / CONFIG, recorded | {name: new[name] for name in ("recipe", "extended")} | {"steps": steps})


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON values by name, indented; the file is replaced at once, so that it is never half written."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(new, file)


def add_skipped(path: Path, skipped: Mapping[str, str]) -> dict[str, str]:
    """Adds images that could not be read to the folder's ``skipped.json``.

    Args:
      path: the run folder.
      skipped: why each could not be read, by its name.

    Returns:
      All that the file now holds. A file that is damaged is kept under another name, and a new one begun.
    """
    file = path / SKIPPED
    try:
        before = dict(json.loads(file.read_bytes())) if file.exists() else {}
    except (ValueError, TypeError, RecursionError):
        keep_copy(file)
        file.unlink()
        before = {}
    if skipped.keys() - before.keys():
        write_json(file, before | dict(skipped))
    return before | dict(skipped)
