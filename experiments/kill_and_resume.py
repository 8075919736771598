"""Ends training runs at random moments, resumes them, and compares them with one that was left alone, bit for bit.

    python experiments/kill_and_resume.py

With one and with two processes, runs are ended at twenty random moments: four each in the first compilation, between steps,
while a checkpoint is being written, while test images are evaluated, and while the last files are written. Half of them are
killed (SIGKILL, all processes at once), the others get SIGTERM (one of the processes). Ten more runs find the disk full at
such a moment (this needs root, to mount a small disk). Each is then resumed and must give the same losses, accuracies and
gradient norms and the same weights. Prints a table and writes experiments/results/kill_and_resume.json after each run; what is
in there already is not run again.
"""

import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro
from interrupted_runs import STOPPED, Job, Seen, digits, full, no_space, same, small_disk

RESULTS = Path(__file__).parent / "results" / "kill_and_resume.json"
PHASES = ("compile", "step", "checkpoint", "evaluation", "last write")
STEPS, EPOCHS, EVERY = 20, 2, 3
OPTIONS = ["--epochs", str(EPOCHS), "--batch-size", "16", "--checkpoint-every", str(EVERY), "--method", "lp_l1-2"]
OPTIONS += ["--train", "last_stage", "--shift", "1", "--ema", "0.9"]
DISK = 24  # MiB; a run takes 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run was ended, what its folder held, the step it went on after, and whether it equals the run left alone.

    Attributes:
      phase: what the run was doing.
      ended_by: a signal, or "full disk".
      processes: number of processes.
      exit_codes: of each process.
      last_step_written: the last step in metrics.jsonl.
      unfinished_checkpoint: whether a checkpoint was being written.
      checkpoint_before: the last whole checkpoint at that moment; 0 for none.
      resumed_after: the step that the run went on after; 0 if it began again, ``None`` if it came to its end all the same.
      same_metrics: whether losses, accuracies and gradient norms are equal.
      same_weights: whether the weights are.
      error: what the command said when the disk was full.
    """

    phase: str
    ended_by: str
    processes: int
    exit_codes: list[int]
    last_step_written: int
    unfinished_checkpoint: bool
    checkpoint_before: int
    resumed_after: int | None
    same_metrics: bool
    same_weights: bool
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether nothing was lost: the last checkpoint was used and the end is the same."""
        kept = self.resumed_after is None or self.resumed_after >= self.checkpoint_before
        return kept and self.same_metrics and self.same_weights


@dataclasses.dataclass(frozen=True)
class Wholes:
    """Runs that were left alone, by number of processes, and how long their phases took in seconds."""

    folder: Path
    cache: Path
    arguments: list[str]
    seconds: dict[tuple[int, str], float]

    def whole(self, processes: int) -> Path:
        """The folder of the run with so many processes."""
        return self.folder / f"whole{processes}"

    def make(self, processes: int) -> None:
        """Makes a run twice, unless it is there: once to time its compilations and once to time all else."""
        run = self.whole(processes)
        if run.exists():
            return
        for cached in (False, True):
            shutil.rmtree(run, ignore_errors=True)
            job = Job.start(
                run, self.folder, [*self.arguments, "--output", str(run)], processes, self.cache if cached else None
            )
            if not cached:
                self.seconds[processes, "compile"] = until(job, lambda seen: seen.configured, lambda seen: seen.step > 0)
            else:
                until(job, lambda seen: seen.step >= STEPS // EPOCHS, lambda seen: seen.epochs > 0)
                evaluation = until(job, lambda seen: seen.step >= STEPS, lambda seen: seen.epochs == EPOCHS)
                self.seconds[processes, "evaluation"] = evaluation
                self.seconds[processes, "last write"] = until(job, lambda seen: True, lambda seen: seen.finished)
            if any(job.wait()):
                raise SystemExit(f"the run left alone failed: {job.printed()}")


def until(job: Job, begins: Callable[[Seen], bool], ends: Callable[[Seen], bool] = lambda seen: True) -> float:
    """Waits until something begins and has ended, or the run has; the seconds from one to the other."""
    while job.alive and not begins(Seen.of(job.run)):
        time.sleep(0.005)
    start = time.monotonic()
    while job.alive and not ends(Seen.of(job.run)):
        time.sleep(0.005)
    return time.monotonic() - start


def moment(phase: str, draw: random.Random, seconds: float) -> tuple[Callable[[Seen], bool], float, Callable[[Seen], bool]]:
    """A random moment of a phase: what must be seen first, how long to wait then, and whether the phase was met."""
    step, half = draw.randrange(1, STEPS - 1), STEPS // EPOCHS
    epoch = draw.randrange(EPOCHS)
    share = draw.uniform(0, 0.9)
    if phase == "compile":
        return lambda seen: seen.configured, share * seconds, lambda seen: seen.step == 0
    if phase == "step":
        return lambda seen: seen.step >= step, share * 0.1, lambda seen: seen.step < STEPS
    if phase == "checkpoint":
        return lambda seen: seen.step >= step and seen.saving, share * 0.03, lambda seen: seen.saving
    if phase == "evaluation":
        last = (epoch + 1) * half
        return lambda seen: seen.step >= last, share * seconds, lambda seen: seen.step == last and seen.epochs == epoch
    return lambda seen: seen.epochs == EPOCHS, share * seconds, lambda seen: seen.epochs == EPOCHS


def started(phase: str, run: Path, processes: int, wholes: Wholes) -> Job:
    """A new run, which compiles again if that is when it will end."""
    cache = None if phase == "compile" else wholes.cache
    return Job.start(run, wholes.folder, [*wholes.arguments, "--output", str(run)], processes, cache)


def resumed(run: Path, processes: int, wholes: Wholes) -> int:
    """Resumes a run; the step that it went on after."""
    job = Job.start(run, wholes.folder, ["--resume", str(run), "--checkpoint-every", str(EVERY)], processes, wholes.cache)
    if any(codes := job.wait()):
        raise SystemExit(f"{run} could not be resumed, exit codes {codes}: {job.printed()}")
    after = job.printed().partition("going on after step ")[2].split()
    return int(after[0]) if after else 0


def killed(phase: str, number: signal.Signals, processes: int, draw: random.Random, wholes: Wholes) -> Outcome:
    """Ends a run by a signal, resumes and compares it; draws again if the phase was over when the signal came."""
    while True:
        run = wholes.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        begins, wait, met = moment(phase, draw, wholes.seconds.get((processes, phase), 0))
        job = started(phase, run, processes, wholes)
        until(job, begins)
        time.sleep(wait)
        before = Seen.of(run)
        job.send(number, list(range(processes)) if number == signal.SIGKILL else [draw.randrange(processes)])
        codes = job.wait()
        seen = Seen.of(run) if number == signal.SIGKILL else before
        if met(seen) and not before.finished:
            break
    finished = Seen.of(run).finished
    allowed = {-signal.SIGKILL} if number == signal.SIGKILL else {0 if finished else STOPPED}
    if not set(codes) <= allowed:
        raise SystemExit(f"{run} ended with {codes}, not by the signal: {job.printed()}")
    after = None if finished else resumed(run, processes, wholes)
    checkpoint = max(seen.checkpoints, default=0)
    equal = same(run, wholes.whole(processes))
    return Outcome(phase, number.name, processes, codes, seen.step, seen.saving, checkpoint, after, *equal)


def filled(phase: str, number: int, draw: random.Random, wholes: Wholes) -> Outcome:
    """Fills the disk of a run with one process, resumes it once there is room, and compares it."""
    disk = wholes.folder / f"disk{number}"
    with small_disk(disk, DISK):
        run = disk / "run"
        begins, wait, _ = moment(phase, draw, wholes.seconds.get((1, phase), 0))
        job = started(phase, run, 1, wholes)
        until(job, begins)
        time.sleep(wait)
        with full(disk):
            seen = Seen.of(run)
            codes = job.wait()
        said = [line for line in job.printed().splitlines() if line.startswith("lbpwht: ")]
        error = said[-1].replace(str(run), "RUN") if said else ""
        finished = Seen.of(run).finished
        if codes != [0 if finished else 1] or not (finished or no_space(error)):
            raise SystemExit(f"{run} ended with {codes}, not by the full disk: {job.printed()}")
        after = None if finished else resumed(run, 1, wholes)
        checkpoint = max(seen.checkpoints, default=0)
        equal = same(run, wholes.whole(1))
        return Outcome(
            phase, "full disk", 1, codes, seen.step, seen.saving, checkpoint, after, *equal, None if finished else error
        )


def main(moments: int = 20, full_disks: int = 10, processes: tuple[int, ...] = (1, 2), seed: int = 0) -> None:
    """Runs the experiment.

    Args:
      moments: moments at which runs are ended by a signal, for each number of processes.
      full_disks: moments at which the disk is full.
      processes: numbers of processes.
      seed: determines the moments.
    """
    results: dict[str, Any] = {
        "command": "python experiments/kill_and_resume.py",
        "options": OPTIONS,
        "steps": STEPS,
        "seed": seed,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores",
        "runs": {},
    }
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        if {**before, "runs": {}} == results:
            results = before
    wanted = [(f"{count} {i}", count) for count in processes for i in range(moments)]
    wanted += [(f"full {i}", 1) for i in range(full_disks)]
    wanted.sort(key=lambda each: each[1])
    with tempfile.TemporaryDirectory() as folder:
        digits(Path(folder) / "digits", train=16, test=4)
        wholes = Wholes(Path(folder), Path(folder) / "programs", [*OPTIONS, "--dataset", f"folder:{folder}/digits"], {})
        for key, count in wanted:
            if key in results["runs"]:
                continue
            wholes.make(count)
            draw, i = random.Random(f"{seed} {key}"), int(key.split()[1])
            phase = PHASES[i % len(PHASES)]
            if key.startswith("full"):
                outcome = filled(phase, i, draw, wholes)
            else:
                number = (signal.SIGKILL, signal.SIGTERM)[(i + i // len(PHASES)) % 2]
                outcome = killed(phase, number, count, draw, wholes)
            print(key, outcome, flush=True)
            results["runs"][key] = dataclasses.asdict(outcome)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print("| processes | ended by | in | last step written | last checkpoint | resumed after | same metrics | same weights |")
    print("|---|---|---|---|---|---|---|---|")
    outcomes = [Outcome(**results["runs"][key]) for key, _ in wanted]
    for each in outcomes:
        print(
            f"| {each.processes} | {each.ended_by} | {each.phase} | {each.last_step_written} | {each.checkpoint_before} "
            f"| {each.resumed_after} | {each.same_metrics} | {each.same_weights} |"
        )
    if not all(each.good for each in outcomes):
        raise SystemExit("not every resumed run equals the one left alone")


if __name__ == "__main__":
    tyro.cli(main)
