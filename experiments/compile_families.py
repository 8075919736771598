"""Whether every family compiles for machines that are not there, under every kind of method.

    python experiments/compile_families.py

compiles the smallest model of each family for a TPU v5e, a TPU v6e and an H100, and writes
experiments/results/compile_families.json after each. A run that was cut off goes on where it was; delete the file to start
over. Exits with 1 if a step does not compile. Needs the extra [compile].
"""

import itertools
import sys
from pathlib import Path

import tyro
from compile_tables import RESULTS, compile_cases
from rich.console import Console

MODELS = (
    "efficientformer_l1",
    "efficientformerv2_s0",
    "swinv2_tiny_window8_256",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
)
METHODS = ("full", "lp_l1-4", "lora_all-8", "lp_l1-4+lora_all-8")
TRAIN = ("all", "last_stage")
TARGETS = ("v5e:1x1", "v6e:1x1", "h100")


def main(
    models: tuple[str, ...] = MODELS,
    methods: tuple[str, ...] = METHODS,
    targets: tuple[str, ...] = TARGETS,
    batch_size: int = 8,
    output: Path = RESULTS / "compile_families.json",
) -> int:
    """Compiles every combination.

    Args:
      models: names.
      methods: short names.
      targets: machines of one chip.
      batch_size: images.
      output: JSON.

    Returns:
      How many steps do not compile.
    """
    fixed = {"batch_size": batch_size, "dtype": "bfloat16"}
    cases = [
        {"model": model, "method": method, "train": train, "target": target, **fixed}
        for target, model, train, method in itertools.product(targets, models, TRAIN, methods)
    ]
    console = Console(width=160)
    failed = [row for row in compile_cases(cases, output, console) if "error" in row]
    console.print(f"{len(cases) - len(failed)} of {len(cases)} steps compile")
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(1, tyro.cli(main)))
