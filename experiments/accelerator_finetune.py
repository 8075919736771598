"""Five minutes of fine-tuning on the device, by ``lbpwht finetune``: what a user gets, loading of images included."""

import os
import shutil
import signal
import statistics
import threading
from pathlib import Path

from accelerator_results import Row, fill, read, slug
from accelerator_settings import DTYPE, Job, Settings

from lbpwht_jax.cli import main as lbpwht
from lbpwht_jax.runs import read_metrics
from lbpwht_jax.train.checkpoint import last_step

MODEL, METHOD, BATCH = "efficientformer_l1", "lp_l1-4", 128
_SAVE_EVERY = 200  # steps
_STOPPED = 3


def measure(settings: Settings, folder: Path) -> Row:
    """Trains until the epochs or the time are over, or goes on with what is in the folder.

    Raises:
      RuntimeError: if ``lbpwht finetune`` fails or is stopped before.
    """
    left = settings.finetune_seconds
    if folder.exists() and last_step(folder) is None:
        shutil.rmtree(folder)  # it was cut off before it had saved anything
    if folder.exists():
        arguments = ["--resume", str(folder)]
        left -= sum(step.seconds for step in read_metrics(folder)[0])
    else:
        arguments = ["--model", MODEL, "--method", METHOD, "--dtype", DTYPE, "--dataset", f"folder:{settings.data}"]
        arguments += ["--pretrained", settings.pretrained, "--epochs", str(settings.epochs), "--batch-size", str(BATCH)]
        arguments += ["--output", str(folder)]
    if not (folder / "result.json").exists() and left > 0:
        _finetune([*arguments, "--checkpoint-every", str(_SAVE_EVERY)], left)
    steps, epochs = read_metrics(folder)
    seconds = statistics.median(step.seconds for step in steps[1:] or steps)
    return {
        "model": MODEL,
        "method": METHOD,
        "batch": BATCH,
        "pretrained": settings.pretrained,
        "epochs_wanted": settings.epochs,
        "finished": (folder / "result.json").exists(),
        "steps": len(steps),
        "training_seconds": sum(step.seconds for step in steps),
        "median_step_seconds": seconds,
        "images_per_second": BATCH / seconds,
        "last_loss": steps[-1].loss,
        "epochs": [epoch._asdict() for epoch in epochs],
    }


def _finetune(arguments: list[str], seconds: float) -> None:
    """Runs ``lbpwht finetune``, which saves and stops at SIGTERM, for some seconds; around its training SIGTERM is ignored."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ended, sent = threading.Event(), threading.Event()
    threading.Thread(target=_stop, args=(seconds, ended, sent), daemon=True).start()
    try:
        code = lbpwht(["finetune", *arguments])
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)
    if code == _STOPPED and not sent.is_set():
        raise RuntimeError("lbpwht finetune was stopped before its time was over; the next run goes on with it")
    if code not in (0, _STOPPED):
        raise RuntimeError(f"lbpwht finetune ended with exit code {code}; its messages say why")


def _stop(seconds: float, ended: threading.Event, sent: threading.Event) -> None:
    """Sends SIGTERM once after some seconds, as soon as it is no longer ignored, unless the run has ended."""
    if ended.wait(seconds):
        return
    while signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        if ended.wait(0.1):
            return
    sent.set()
    os.kill(os.getpid(), signal.SIGTERM)


def run(job: Job) -> None:
    """Measures the part, if the images are there."""
    settings = job.settings
    if not settings.data.exists():
        print(f"finetune: left out, because {settings.data} is not there; name CIFAR-10's images with --data", flush=True)
        return
    folder = settings.work / slug(job.machine["device"])
    if "finetune" not in read(job.file)["parts"]:
        shutil.rmtree(folder, ignore_errors=True)
    facts = {"machine": job.machine, "dtype": DTYPE, "pretrained": settings.pretrained, "epochs": settings.epochs}
    fill(job.file, "finetune", facts, {f"{MODEL} {METHOD}": lambda: measure(settings, folder)}, settings.minutes)
