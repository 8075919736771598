"""``lbpwht predict``: what a run's model says of image files."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lbpwht_jax.data import ImageFile, UnreadableImage, decode_image, find_images
from lbpwht_jax.runs.finished import FINAL, FinishedRun, load_run
from lbpwht_jax.screen import console, say
from lbpwht_jax.train import normalise

_AT_ONCE = 32


class Prediction(NamedTuple):
    """What was found of one image file: the classes' probabilities, float32 ``[classes]``, or why it could not be read."""

    name: str
    probabilities: np.ndarray | None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classifies image files with what a run made, a line for each; files that cannot be read are told and passed over."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder; model, image size, normalisation and classes are read from it."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files; a folder or zip file stands for all images in it and below, a quoted pattern such as 'photos/*.jpg' for
    what matches."""
    top_k: int = 5
    """How many classes are shown, the most probable first."""
    checkpoint: str = FINAL
    """final; or a checkpoint, also of a run that is not finished: last, best or the number of its step."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints JSON: a list of {"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}, with "error" instead of
    "predictions" for what could not be read."""

    def prepare(self) -> Callable[[], int]:
        """Reads the run and lists the images.

        Returns:
          The function that predicts and prints, and returns 1 if no image could be read.

        Raises:
          ValueError: if the run folder holds no such run, or there are no such images.
        """
        if self.top_k < 1:
            raise ValueError(f"--top-k must be positive, got {self.top_k}")
        if not self.images:
            raise ValueError("name at least one image")
        loaded = load_run(self.run, self.checkpoint)
        files = [file for path in self.images for file in find_images(path)]

        def run() -> int:
            shown, warned, unread = console(), console("stderr"), 0
            for number, found in enumerate(predict(loaded, files)):
                top = [] if found.probabilities is None else self._top(found.probabilities, loaded.config.classes)
                if self.json:
                    row = {"image": found.name, **({"predictions": top} if top else {"error": found.error})}
                    print(f"{',' if number else '['}\n  {json.dumps(row)}", end="", flush=True)
                elif top:
                    say(shown, f"{found.name}: " + ", ".join(f"{each['class']} {each['probability']:.1%}" for each in top))
                if found.probabilities is None:
                    unread += 1
                    say(warned, f"lbpwht: cannot read the image {found.name}: {found.error}", style="yellow")
            if self.json:
                print("\n]")
            return int(unread == len(files))

        return run

    def _top(self, probabilities: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
        best = np.argsort(-probabilities, kind="stable")[: self.top_k]
        return [{"class": classes[i], "probability": float(probabilities[i])} for i in best]


def predict(run: FinishedRun, files: Sequence[ImageFile]) -> Iterator[Prediction]:
    """Classifies image files, in order, a few at a time.

    Args:
      run: what classifies them.
      files: the image files.
    """
    like, size = run.config.info.images, run.config.image_size

    @jax.jit
    def probabilities(variables: Any, images: jax.Array) -> jax.Array:
        logits = run.module.apply(variables, normalise(images.astype(jnp.float32) / 255, run.config.info))
        return jax.nn.softmax(jnp.asarray(logits, jnp.float32))

    variables = jax.device_put(run.variables)
    for start in range(0, len(files), _AT_ONCE):
        images, errors = np.zeros((_AT_ONCE, size, size, like.channels), np.uint8), {}
        part = files[start : start + _AT_ONCE]
        for row, file in enumerate(part):
            try:
                images[row] = decode_image(file.read(), size, like.channels, like.crop, like.interpolation)
            except (OSError, UnreadableImage) as error:
                errors[row] = str(error)
        found = np.asarray(probabilities(variables, images)) if len(errors) < len(part) else images
        for row, file in enumerate(part):
            yield Prediction(file.name, None, errors[row]) if row in errors else Prediction(file.name, found[row])
