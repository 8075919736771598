"""``lbpwht evaluate``: how good what a run made is."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from lbpwht_jax.cli.help import flag
from lbpwht_jax.data import open_dataset
from lbpwht_jax.runs.finished import FINAL, check_finite, load_run
from lbpwht_jax.screen import console, say
from lbpwht_jax.train import Evaluator, Placement, loading


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates what a run made: accuracy and mean loss, every image counted once, on all local devices."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder; model, data and normalisation are read from it."""
    dataset: Annotated[str | None, flag("NAME", "the run's")] = None
    """Another data set of the same classes, named as for "lbpwht finetune", such as folder:photos."""
    data_dir: Annotated[Path | None, flag("FOLDER", "the run's")] = None
    """Folder of the TFDS data sets."""
    split: Literal["test", "train", "validation"] = "test"
    """Which images."""
    checkpoint: str = FINAL
    """final; or a checkpoint, also of a run that is not finished: last, best or the number of its step."""
    batch_size: Annotated[int | None, flag("INT", "the run's")] = None
    """Images per call, over all devices."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints JSON."""

    def prepare(self) -> Callable[[], None]:
        """Reads run and data.

        Returns:
          The function that evaluates and prints.

        Raises:
          ValueError: if the folder holds no such run, the data set is unknown or has other classes, or the devices cannot
            share a batch.
          FileNotFoundError: if there is no such data.
        """
        loaded = load_run(self.run, self.checkpoint)
        config = loaded.config
        data_dir = self.data_dir if self.data_dir or config.data_dir is None else Path(config.data_dir)
        share = config.validation if self.dataset in (None, config.dataset) else 0.0
        dataset = open_dataset(self.dataset or config.dataset, config.recipe.seed, data_dir, share)
        config.check_classes(dataset)
        split = getattr(dataset, self.split)
        if split is None:
            raise ValueError(f"{dataset.name} has no validation images; use --split test or train")
        placement = Placement(devices=jax.local_devices())
        batch_size = config.recipe.batch_size if self.batch_size is None else self.batch_size
        placement.check(batch_size, 1)
        evaluator = Evaluator(loaded.module, config.info, loading(config.info, config.image_size, batch_size), placement)

        def run() -> None:
            variables = placement.put(loaded.variables, jax.tree.map(lambda _: placement.replicated, loaded.variables))
            what = f"{self.run} (checkpoint {self.checkpoint})"
            check_finite(loaded.variables, what)
            found = evaluator(variables, split)
            if not math.isfinite(found.loss):
                raise FloatingPointError(
                    f"{what}: its loss on {dataset.name}, {self.split}, is {found.loss}, which is not finite; use an earlier "
                    "checkpoint, or train again with a lower learning rate"
                )
            if self.json:
                fields = {"run": str(self.run), "dataset": dataset.name, "split": self.split, "checkpoint": self.checkpoint}
                print(json.dumps({**fields, **found._asdict()}, indent=2))
                return
            say(
                console(),
                f"{dataset.name}, {self.split}: accuracy {found.accuracy:.2%}, loss {found.loss:.4f}, {found.images} images",
            )
            for name, reason in found.skipped.items():
                say(console(), f"not read, not counted: {name}: {reason}")

        return run
