"""Measures the library on the accelerator at hand, or on a CPU, without a network.

    python experiments/accelerator.py                all parts, one after the other
    python experiments/accelerator.py layers steps   some of them
    python experiments/accelerator.py --side-by-side quicker on a GPU beside many cores

writes experiments/results/accelerator_DEVICE.json, row by row: a run that was cut off, or that left something out for want of
time, goes on when it is started again. Every part has a process of its own and takes nine minutes at most (``--minutes``), the
parts steps, memory, profile and roofline so long for each model:

- numerics: the operation and the layers against float64; fails if a difference is larger than its bound
- layers: times of single layers' backward passes, beside the form of the paper's code
- steps: times of training steps
- memory: the memory of the device that each of these takes at most
- profile: the kernels that take the most time
- finetune: five minutes of EfficientFormer-L1 on CIFAR-10, if ``--data`` names its images
- roofline: the least time that a compiler's counts allow for each step (needs the extra [compile], and no accelerator)

``python experiments/accelerator_page.py`` then writes docs/accelerators.md.
"""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import accelerator_finetune
import accelerator_layers
import accelerator_memory
import accelerator_numerics
import accelerator_profile
import accelerator_roofline
import accelerator_steps
import tyro
from accelerator_processes import in_a_process, side_by_side
from accelerator_results import begin, read, slug
from accelerator_settings import Job, Settings

from lbpwht_jax.bench import machine

Part = Literal["numerics", "layers", "steps", "memory", "profile", "finetune", "roofline"]
RESULTS = Path(__file__).parent / "results"
DEFAULT = Settings()
PARTS: dict[Part, Callable[[Job], None]] = {
    "numerics": accelerator_numerics.run,
    "layers": accelerator_layers.run,
    "steps": accelerator_steps.run,
    "memory": accelerator_memory.run,
    "profile": accelerator_profile.run,
    "finetune": accelerator_finetune.run,
    "roofline": accelerator_roofline.run,
}
BY_MODEL = ("steps", "memory", "profile", "roofline")
WITHOUT_DEVICE = ("memory", "roofline")  # their own processes leave the device alone


def problems(file: Path, part: str) -> list[str]:
    """The rows of a part that could not be measured."""
    rows = read(file)["parts"].get(part, {}).get("rows", [])
    return [f"{part}: {row['name']}: {row['failed']}" for row in rows if "failed" in row]


def main(
    parts: tyro.conf.Positional[tuple[Part, ...]] = (),
    settings: Annotated[Settings, tyro.conf.arg(name="")] = DEFAULT,
    again: bool = False,
) -> None:
    """Measures parts; all by default.

    Args:
      parts: their names.
      settings: what is measured.
      again: drops what was measured of these parts.

    Raises:
      SystemExit: if a part fails, after the others; if the JSON file is of another device.
    """
    parts, cache = parts or tuple(PARTS), (settings.work / "compiled").resolve()
    if settings.side_by_side:  # or the first process takes three quarters of the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if settings.output and settings.output.exists() and set(parts) <= {"roofline"}:
        here = {"device": read(settings.output)["device"]}
    else:
        here = in_a_process(cache, machine)
    file = settings.output or RESULTS / f"accelerator_{slug(here['device'])}.json"
    begin(file, here, parts if again else ())
    wrong = []
    for part in parts:
        jobs = [Job(settings, file, here, model) for model in (settings.models if part in BY_MODEL else ("",))]
        if part == "steps" and settings.side_by_side:
            raised = side_by_side(cache, accelerator_steps.run_beside_others, jobs, 60 * settings.minutes)
            wrong += [f"steps {job.model}: {error}" for job, error in zip(jobs, raised, strict=True) if error]
            jobs = []
        for job in jobs:
            try:
                if part in WITHOUT_DEVICE:
                    PARTS[part](job)
                else:
                    in_a_process(cache, PARTS[part], job)
            except Exception as error:  # whatever fails in a part does not take the others with it
                traceback.print_exception(error)
                wrong.append(f"{part} {job.model}".strip() + f": {error}")
        wrong += problems(file, part)
    print(f"Written to {file}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    tyro.cli(main)
