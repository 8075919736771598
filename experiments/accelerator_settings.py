"""What ``experiments/accelerator.py`` can be told."""

import dataclasses
from pathlib import Path
from typing import Any

MODELS = ("efficientformer_l1", "efficientformer_l7", "vit_base_patch16_224", "swinv2_small_window8_256")
# What matters most comes first, because a part that runs out of time leaves the last ones out.
METHODS = (
    "full",
    "lp_l1-4+lean",
    "lp_l1-4",
    "full+lean",
    "full+remat",
    "lora_all-8",
    "lp_l1-4+tiny",
    "lp_l1-2+lean",
    "lora_all-8+lean",
    "lp_l1-8+lean",
)
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and where the results go."""

    models: tuple[str, ...] = MODELS
    """Models of the parts steps, memory, profile and roofline."""
    methods: tuple[str, ...] = METHODS
    """Methods of the parts steps, memory and roofline; each is timed in turn with full."""
    batch_size: int = 128
    """Images per step."""
    layer_batch: int = 256
    """Images in the part layers."""
    ranks: tuple[int, ...] = (2, 4, 6, 8)
    """Values of r of LP_{L1-r} in the part layers."""
    rounds: int = 15
    """Number of samples of each time; the median counts."""
    side_by_side: bool = False
    """Compiles the steps of all models at once, each model in a process of its own, begins timing when all have compiled, and
    profiles what is timed; the part memory runs as many processes as there are methods. Quicker where many cores wait for one
    GPU; a TPU belongs to one process at a time."""
    minutes: float = 9
    """Time of each part, and of each model in the parts steps, memory, profile and roofline; what would take longer is left
    out."""
    target: str | None = None
    """The machine that the part roofline compiles for, as for "lbpwht compile"; by default the device at hand."""
    data: Path = Path("cifar10.zip")
    """CIFAR-10 for the part finetune: a zip file or folder of train/CLASS/IMAGE and test/CLASS/IMAGE."""
    pretrained: str = "none"
    """What the part finetune starts from, as for "lbpwht finetune"; none for random weights."""
    epochs: int = 5
    """Epochs of the part finetune, if five minutes suffice."""
    finetune_seconds: float = 300
    """Time of training in the part finetune."""
    output: Path | None = None
    """The JSON file; by default experiments/results/accelerator_DEVICE.json."""
    work: Path = Path("runs/accelerator")
    """Folder for compiled programs and the run of the part finetune."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One part, of one model where the part is measured model by model.

    Attributes:
      settings: what is measured.
      file: the JSON file, which is there.
      machine: the device and what it runs with, as ``lbpwht_jax.bench.machine`` says.
      model: the model's name; empty for parts without one.
    """

    settings: Settings
    file: Path
    machine: dict[str, Any]
    model: str = ""
