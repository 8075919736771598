"""The commands that use a run folder: ``lbpwht evaluate`` and ``lbpwht predict``."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax.data import image_files, load_image, open_dataset
from lbpwht_jax.runs.finished import FINAL, FinishedRun, load_run
from lbpwht_jax.train import Evaluator, Placement, loading, normalise

_Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
_Images = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates what a run made: accuracy and mean loss, every image counted once, on all local devices."""

    run: _Run
    """The run folder; model, data and normalisation are read from it."""
    dataset: str | None = None
    """Another data set of the same classes, named as for "lbpwht finetune"; by default the run's."""
    data_dir: Path | None = None
    """Folder of the TFDS data sets; by default the run's."""
    split: Literal["test", "train"] = "test"
    """Which images."""
    checkpoint: str = FINAL
    """final; or a checkpoint, also of a run that is not finished: last, best or the number of its step."""
    batch_size: int | None = None
    """Images a call, over all devices; by default the run's."""
    json: _Flag = False
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
        dataset = open_dataset(self.dataset or config.dataset, config.recipe.seed, data_dir)
        config.check_classes(dataset)
        placement = Placement(devices=jax.local_devices())
        batch_size = config.recipe.batch_size if self.batch_size is None else self.batch_size
        placement.check(batch_size, 1)
        evaluator = Evaluator(loaded.module, config.info, loading(config.info, config.image_size, batch_size), placement)

        def run() -> None:
            variables = placement.put(loaded.variables, jax.tree.map(lambda _: placement.everywhere, loaded.variables))
            found = evaluator(variables, getattr(dataset, self.split))
            if self.json:
                fields = {"run": str(self.run), "dataset": dataset.name, "split": self.split, "checkpoint": self.checkpoint}
                print(json.dumps({**fields, **found._asdict()}, indent=2))
                return
            print(f"{dataset.name}, {self.split}: accuracy {found.accuracy:.2%}, loss {found.loss:.4f}, {found.images} images")
            for name, reason in found.skipped.items():
                print(f"not read, not counted: {name}: {reason}")

        return run


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classifies image files with what a run made."""

    run: _Run
    """The run folder; model, image size, normalisation and classes are read from it."""
    images: _Images
    """Image files; a folder stands for all images in it and below."""
    top_k: int = 5
    """How many classes are shown, the most probable first."""
    checkpoint: str = FINAL
    """final; or a checkpoint, also of a run that is not finished: last, best or the number of its step."""
    json: _Flag = False
    """Prints JSON: a list of {"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}."""

    def prepare(self) -> Callable[[], None]:
        """Reads run and images.

        Returns:
          The function that predicts and prints.

        Raises:
          ValueError: if the run folder holds no such run, an image cannot be read, or a folder holds none.
        """
        if self.top_k < 1:
            raise ValueError(f"--top-k must be positive, got {self.top_k}")
        if not self.images:
            raise ValueError("name at least one image")
        loaded = load_run(self.run, self.checkpoint)
        like, size = loaded.config.info.images, loaded.config.image_size
        files = [file for path in self.images for file in (image_files(path) if path.is_dir() else [path])]
        images = np.stack([load_image(file, size, like.channels, like.crop, like.interpolation) for file in files])

        def run() -> None:
            probabilities = predict(loaded, images)
            found = [self._top(row, loaded.config.classes) for row in probabilities]
            if self.json:
                rows = zip(files, found, strict=True)
                print(json.dumps([{"image": str(path), "predictions": top} for path, top in rows], indent=2))
                return
            table = Table()
            table.add_column("image", overflow="fold")
            table.add_column("classes")
            for path, top in zip(files, found, strict=True):
                table.add_row(str(path), ", ".join(f"{each['class']} {each['probability']:.1%}" for each in top))
            Console().print(table)

        return run

    def _top(self, probabilities: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
        best = np.argsort(-probabilities, kind="stable")[: self.top_k]
        return [{"class": classes[i], "probability": float(probabilities[i])} for i in best]


def predict(run: FinishedRun, images: np.ndarray) -> np.ndarray:
    """Probabilities of the run's classes, float32 ``[count, classes]``, of uint8 images ``[count, size, size, channels]``."""

    @jax.jit
    def probabilities(variables: Any, images: jax.Array) -> jax.Array:
        logits = run.module.apply(variables, normalise(images.astype(jnp.float32) / 255, run.config.info))
        return jax.nn.softmax(jnp.asarray(logits, jnp.float32))

    variables = jax.device_put(run.variables)
    parts = []
    for start in range(0, len(images), _AT_ONCE):
        part = images[start : start + _AT_ONCE]
        filled = np.concatenate([part, np.zeros((_AT_ONCE - len(part), *part.shape[1:]), np.uint8)])
        parts.append(np.asarray(probabilities(variables, filled))[: len(part)])
    return np.concatenate(parts)
