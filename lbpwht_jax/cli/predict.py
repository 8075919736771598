"""``lbpwht predict``: what a run's model says of image files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax.data import image_files, load_image
from lbpwht_jax.runs.finished import FINAL, FinishedRun, load_run
from lbpwht_jax.train import normalise

_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classifies image files with what a run made."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder; model, image size, normalisation and classes are read from it."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files; a folder stands for all images in it and below."""
    top_k: int = 5
    """How many classes are shown, the most probable first."""
    checkpoint: str = FINAL
    """final; or a checkpoint, also of a run that is not finished: last, best or the number of its step."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
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
    """Classifies images.

    Args:
      run: what classifies them.
      images: uint8 ``[count, size, size, channels]``.

    Returns:
      Probabilities of the run's classes, float32 ``[count, classes]``.
    """

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
