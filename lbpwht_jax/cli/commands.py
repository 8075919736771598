"""Which commands there are, without importing any."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command is.

    Attributes:
      module: name of the module in ``lbpwht_jax.cli``.
      name: name of the command's dataclass there.
      text: what the list of commands says about it.
    """

    module: str
    name: str
    text: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "finetune": Command("finetune", "Finetune", "adapts a pretrained model to a data set, and says what it cost"),
        "evaluate": Command("evaluate", "Evaluate", "accuracy and loss of what a run made"),
        "predict": Command("predict", "Predict", "classifies image files with what a run made"),
        "export": Command("weights", "Export", "writes a run's weights for timm, or for this library"),
        "prepare": Command("prepare", "Prepare", "downloads a TFDS data set for training"),
        "models": Command("models", "Models", "lists the models"),
        "convert": Command("weights", "Convert", "rewrites published weights for this library"),
        "cost": Command("cost", "Cost", "counts what training a model costs"),
        "plan": Command("plan", "Plan", "chooses what each layer keeps, under a budget"),
        "compile": Command("compile", "Compile", "what a training step takes on machines that are not there"),
        "bench": Command("bench", "Bench", "times low-rank against exact backpropagation"),
    }
)
