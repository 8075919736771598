"""The folder of a training run: its lock, its configuration and its JSON files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.metrics import METRICS

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


def read_config(path: Path) -> RunConfig:
    """Reads the configuration of a run.

    Raises:
      ValueError: if the folder holds no run, or a field of its ``config.json`` is missing or wrong.
    """
    try:
        text = (path / CONFIG).read_text()
    except OSError as error:
        raise ValueError(f"{path} is no run folder: cannot read {path / CONFIG} ({error.strerror})") from None
    return RunConfig.from_json(text, f"{path / CONFIG}: no configuration of this version's")


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
      All that the file now holds.
    """
    file = path / SKIPPED
    before = json.loads(file.read_text()) if file.exists() else {}
    if skipped.keys() - before.keys():
        write_json(file, before | dict(skipped))
    return before | dict(skipped)
