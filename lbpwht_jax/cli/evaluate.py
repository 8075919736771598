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
from lbpwht_jax.runs.confusion import as_json, class_table, plot_confusion
from lbpwht_jax.runs.finished import FINAL, check_finite, load_run
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.screen import console, say, show
from lbpwht_jax.train import Evaluator, Placement, detailed, loading


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates what a run made, every image counted once, on all local devices.

    Shows accuracy, mean loss, how often the true class is among the five most probable ones (with more than five classes), and
    the classes that are recognised least. With --output also writes evaluation.json, with the confusion matrix, and
    confusion.png.
    """

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
    output: Annotated[Path | None, flag("FOLDER", "nothing is written")] = None
    """Folder for evaluation.json and confusion.png, such as runs/flowers/evaluation; it is made if it is not there."""
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
            details = detailed(evaluator, variables, split, len(config.classes))
            found = details.evaluation
            if not math.isfinite(found.loss):
                raise FloatingPointError(
                    f"{what}: its loss on {dataset.name}, {self.split}, is {found.loss}, which is not finite; use an earlier "
                    "checkpoint, or train again with a lower learning rate"
                )
            fields = {"run": str(self.run), "dataset": dataset.name, "split": self.split, "checkpoint": self.checkpoint}
            values = {**fields, **as_json(details, config.classes)}
            if self.output is not None:
                self.output.mkdir(parents=True, exist_ok=True)
                write_json(self.output / "evaluation.json", {**values, "confusion": details.confusion.tolist()})
                title = f"{config.model} on {dataset.name}, {self.split}"
                plot_confusion(self.output / "confusion.png", details.confusion, config.classes, title)
            if self.json:
                print(json.dumps(values, indent=2))
                return
            shown = console()
            accuracy, top5 = f"{dataset.name}, {self.split}: accuracy {found.accuracy:.2%}", details.top5_accuracy
            among = "" if top5 is None else f", among the first five {top5:.2%}"
            say(shown, f"{accuracy}, loss {found.loss:.4f}, {found.images} images{among}")
            show(shown, class_table(details, config.classes))
            for name, reason in found.skipped.items():
                say(shown, f"not read, not counted: {name}: {reason}")

        return run
