"""Images per second of evaluation and prediction on a CPU, beside timm's models in PyTorch.

    python experiments/inference_speed.py        needs the extra [parity]

writes experiments/results/inference_speed.json. What is timed is what ``lbpwht evaluate`` and ``lbpwht predict`` compute for a
batch, without reading files; PyTorch computes class probabilities, in both memory layouts.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import tyro
from step_profile_torch import TIMM, TorchInference

from lbpwht_jax.bench.timing import interleaved, machine
from lbpwht_jax.data import Batch
from lbpwht_jax.models import model_info, plain_model
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.train import make_eval_step, normalise

RESULTS = Path(__file__).parent / "results" / "inference_speed.json"
MODELS = ("efficientformer_l1", "efficientformerv2_s0", "vit_small_patch16_224", "swinv2_tiny_window8_256")
LAYOUTS = {"PyTorch": False, "PyTorch, channels last": True}
CLASSES = 100


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """A model's row."""
    info = model_info(name)
    size, rng = info.images.size, np.random.default_rng(0)
    model = plain_model(name, num_classes=CLASSES)
    images = jnp.asarray(rng.integers(0, 256, (batch, *info.images.shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, CLASSES, batch).astype(np.int32))
    given: Any = (images, labels, jnp.ones(batch, bool), jnp.ones(batch, jnp.float32))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *info.images.shape)))
    evaluate = jax.jit(make_eval_step(model, info))

    @jax.jit
    def predict(variables: Any, images: jax.Array) -> jax.Array:
        logits = model.apply(variables, normalise(images.astype(jnp.float32) / 255, info))
        return jax.nn.softmax(jnp.asarray(logits, jnp.float32))

    functions = {layout: TorchInference(name, batch, size, CLASSES, last) for layout, last in LAYOUTS.items()}
    functions |= {
        "lbpwht evaluate": lambda: jax.block_until_ready(evaluate(variables, Batch(*given))),
        "lbpwht predict": lambda: jax.block_until_ready(predict(variables, images)),
    }
    seconds = interleaved(functions, rounds)
    return {"model": name, "images_per_second": {each: batch / taken for each, taken in seconds.items()}}


def main(models: tuple[str, ...] = MODELS, batch: int = 32, rounds: int = 7, output: Path = RESULTS) -> None:
    """Times models in turn.

    Args:
      models: names of models.
      batch: images.
      rounds: samples of each time; the medians count.
      output: JSON.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for name in models:
        rows.append(measure(name, batch, rounds))
        print(rows[-1], flush=True)
        jax.clear_caches()
    versions = {"torch": torch.__version__, "timm": TIMM}
    facts = {"batch": batch, "rounds": rounds, "dtype": "float32", "machine": {**machine(), **versions}}
    write_json(output, {**facts, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
