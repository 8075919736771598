"""Training runs in processes of their own, for an experiment that ends them at chosen moments."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from lbpwht_jax.cli import main as lbpwht
from lbpwht_jax.weights.files import read_safetensors

STOPPED = 3
_LONGEST = 600  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
# what every process would spend seconds on; the processes are forked from one that has done it
_CONTEXT.set_forkserver_preload(["interrupted_runs", "lbpwht_jax.cli.finetune", "matplotlib.pyplot"])


def _finetune(arguments: list[str], log: str, cache: str | None) -> None:
    """What a process does; ``cache`` is the folder of programs compiled before, ``None`` to compile them again."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    code = lbpwht(["finetune", *arguments])
    if jax.distributed.is_initialized():  # a forked process runs no exit handlers, and JAX's makes processes leave together
        jax.distributed.shutdown()
    sys.exit(code)


@dataclasses.dataclass(frozen=True)
class Job:
    """The processes of one run.

    Attributes:
      run: the run's folder.
      logs: a file per process with what it printed.
      processes: the processes, the first first.
    """

    run: Path
    logs: list[Path]
    processes: list[BaseProcess]

    @classmethod
    def start(cls, run: Path, logs: Path, arguments: list[str], processes: int = 1, cache: Path | None = None) -> "Job":
        """Starts ``lbpwht finetune`` in one or several processes, whose output goes to files in the folder ``logs``."""
        several: list[list[str]] = [[]]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                where = f"localhost:{free.getsockname()[1]}"
            joined = ["--coordinator", where, "--num-processes", str(processes), "--process-id"]
            several = [[*joined, str(process)] for process in range(processes)]
        files = [logs / f"{run.name}.{time.time_ns()}.{i}.log" for i in range(processes)]
        jobs = []
        for log, more in zip(files, several, strict=True):
            arrange = [*arguments, *more], str(log), None if cache is None else str(cache)
            jobs.append(_CONTEXT.Process(target=_finetune, args=arrange))
            jobs[-1].start()
        return cls(run, files, jobs)

    @property
    def alive(self) -> bool:
        """Whether all processes go on."""
        return all(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals, to: list[int]) -> None:
        """Sends a signal to some of the processes."""
        for i in to:
            if (pid := self.processes[i].pid) is not None and self.processes[i].is_alive():
                os.kill(pid, number)

    def wait(self) -> list[int]:
        """The exit codes, minus the signal's number of a process that was killed by one."""
        codes = []
        deadline = time.monotonic() + _LONGEST
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                self.send(signal.SIGKILL, list(range(len(self.processes))))
                raise SystemExit(f"{self.run} does not end; see {self.logs}")
            codes.append(process.exitcode)
        return codes

    def printed(self) -> str:
        """What the processes printed, one after another, errors included."""
        return "".join(log.read_text() for log in self.logs)


def events(run: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl, without times."""
    file, found = run / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # cut off by the kill, or not written to its end
            break
        event.pop("seconds", None)
        found.append(event)
    return found


@dataclasses.dataclass(frozen=True)
class Seen:
    """How far a run has come, as its folder shows."""

    configured: bool
    step: int
    epochs: int
    saving: bool
    checkpoints: list[int]
    weights: bool
    finished: bool

    @classmethod
    def of(cls, run: Path) -> "Seen":
        """Looks at a run's folder."""
        lines = events(run)
        folder, names, saving = run / "checkpoints", [], False
        with contextlib.suppress(FileNotFoundError):  # no folder yet, or renamed meanwhile
            names = [path.name for path in folder.iterdir()]
            saving = any("tmp" in name for name in names)
        return cls(
            (run / "config.json").exists(),
            max((event["number"] for event in lines if event["kind"] == "step"), default=0),
            sum(event["kind"] == "epoch" for event in lines),
            saving,
            sorted(int(name) for name in names if name.isdecimal()),
            (run / "weights.safetensors").exists(),
            (run / "result.json").exists(),
        )


def same(run: Path, whole: Path) -> tuple[bool, bool]:
    """Whether two runs have the same losses, norms and accuracies, and the same weights, bit for bit."""
    ours, theirs = (read_safetensors(each / "weights.safetensors")[0] for each in (run, whole))
    weights = ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    return events(run) == events(whole), weights


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mounts a disk of this size on an empty folder; needs root and Linux."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fills the disk of a folder to the last byte, and removes the filling again."""
    filling = folder / "filling"
    with filling.open("wb", buffering=0) as file:
        try:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size):
                        pass
            yield
        finally:
            filling.unlink()


def no_space(text: str) -> bool:
    """Whether a message names the system's error for a full disk."""
    return os.strerror(errno.ENOSPC) in text


def digits(folder: Path, train: int, test: int) -> None:
    """Writes scikit-learn's digits as image files, so many of each class for training and for testing."""

    pixels, targets = load_digits(return_X_y=True)
    for digit in range(10):
        images = pixels[targets == digit]
        for part, chosen in (("train", images[:train]), ("test", images[train : train + test])):
            (folder / part / str(digit)).mkdir(parents=True)
            for i, image in enumerate(chosen):
                Image.fromarray(np.rint(image.reshape(8, 8) * (255 / 16)).astype(np.uint8)).save(
                    folder / part / str(digit) / f"{i}.png"
                )
