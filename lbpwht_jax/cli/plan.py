"""The command ``lbpwht plan``, and the plan that ``lbpwht finetune --method auto`` makes first."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from lbpwht_jax.adaptation import Plan as Chosen
from lbpwht_jax.adaptation import Train
from lbpwht_jax.cli.help import flag
from lbpwht_jax.cli.run_flags import PLANNED_LAYERS, RunFlags
from lbpwht_jax.data import Dataset, Subset, evaluation_batches
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.plan import parse_budget, plan
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.screen import console, say
from lbpwht_jax.train import loading, normalise


@dataclasses.dataclass(frozen=True)
class Plan:
    """Chooses which Walsh functions each layer keeps, under a budget.

    Measures, on a few batches of training images, how much of each layer's gradient every selection of functions would lose,
    and chooses what loses least within the budget. Prints a table and writes the plan, for
    "lbpwht finetune --method plan:FILE", and a picture of it beside.
    """

    model: Annotated[str | None, tyro.conf.Positional, flag("[MODEL|RUN]", "vit_micro_patch4_28")] = None
    """Name of the model, or the folder of a run, with its model, weights and data."""
    budget: Annotated[str, flag("flops=SHARE|bytes=SHARE|seconds=SHARE", "flops=0.3")] = "flops=0.3"
    """The most that the backward pass may take, in FLOPs of its products, in bytes kept or in seconds of the planned layers,
    measured on the device at hand, as a share of full backpropagation with the same flags, such as flops=0.3, bytes=0.8 or
    seconds=0.6."""
    dataset: Annotated[str | None, flag("NAME", "digits")] = None
    """Where the images come from, as for "lbpwht finetune"."""
    pretrained: Annotated[str | None, flag("WEIGHTS", "those that come with the package")] = None
    """The weights at which gradients are measured, as for "lbpwht finetune": a file, a hub id, a run's folder, or none."""
    train: Annotated[Train | None, flag("{all,last_stage}", "all")] = None
    """What will be trained: all, or last_stage with the head."""
    residuals: Annotated[ResidualsName | None, flag("{plain,exact,lean,tiny}", "plain")] = None
    """What will be kept; it counts in bytes."""
    image_size: Annotated[int | None, flag("INT", "the model's")] = None
    """Height and width of the images, in pixels."""
    batches: int = 2
    """Batches to measure on."""
    batch_size: int = 32
    """Images of each."""
    seed: int = 0
    """Determines which images, and the new head."""
    same_within_stage: tyro.conf.FlagCreatePairsOff[bool] = False
    """Gives the blocks of a stage the same functions, so that they can run as a loop (--scan-blocks)."""
    output: Path = Path("plan.json")
    """Where the plan goes, a new file; the picture has the same name, with .png."""

    def prepare(self) -> Callable[[], None]:
        """Checks what can be checked, and returns the function that makes the plan.

        Raises:
          ValueError: if a name is unknown, or a number out of range.
          FileNotFoundError, ImportError: if data or pretrained weights cannot be had.
        """
        parse_budget(self.budget)
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.output.suffix != ".json" or not self.output.parent.is_dir() or self.output.exists():
            raise ValueError(f"--output must be a new .json file in a folder that there is, got {self.output}")
        if self.train == "head":
            raise ValueError("--train head leaves no layer to plan; take all or last_stage")
        names = ("model", "dataset", "pretrained", "train", "residuals", "image_size")
        fields = {name: getattr(self, name) for name in names}
        if self.model is not None and (Path(self.model) / run_folder.CONFIG).is_file():
            known = run_folder.read_config(Path(self.model))
            of_run = {"dataset": known.dataset, "pretrained": self.model, "image_size": known.image_size}
            fields |= {"model": known.model, **{name: fields[name] or value for name, value in of_run.items()}}
        config, dataset, _ = RunFlags(method=PLANNED_LAYERS, **fields).new_run(None)
        recipe = dataclasses.replace(config.recipe, seed=self.seed)
        config = dataclasses.replace(config, recipe=recipe)

        def run() -> None:
            shown = console()
            numbers = (self.batches, self.batch_size, self.same_within_stage)
            made = chosen_plan(config, dataset, self.budget, lambda text: say(shown, text), *numbers)
            print(made)
            made.save(self.output)
            picture(made, self.output.with_suffix(".png"))
            say(shown, summary(made))
            say(shown, f"Written: {self.output} and {self.output.with_suffix('.png')}")

        return run


def summary(made: Chosen) -> str:
    """What a plan comes to, in a sentence."""
    exact = sum(layer.functions is None for layer in made.layers)
    gap = "no plan loses less" if made.gap == 0 else f"the least possible loss is at most {made.gap:.1%} lower"
    left = " Keeping more would lose no less." if made.used < 0.9 * made.limit and made.limit < 1 else ""
    return (
        f"{made.budget}={made.used:.4f} of full backpropagation, of a budget of {made.limit:g}; {exact} of {len(made.layers)} "
        f"layers exact; predicted loss {made.loss:.4f} ({gap}).{left}"
    )


def chosen_plan(
    config: RunConfig,
    dataset: Dataset,
    budget: str,
    progress: Callable[[str], None],
    batches: int = 2,
    batch_size: int = 32,
    same_within_stage: bool = False,
) -> Chosen:
    """A plan for a run, from its own training images and the weights that it starts from.

    Args:
      config: the run; its method is not looked at.
      dataset: its data.
      budget: as for ``plan``.
      progress: called with what is done next.
      batches: batches to measure on.
      batch_size: images of each.
      same_within_stage: as for ``plan``.
    """
    recipe, dtype = dataclasses.replace(config.recipe, drop_path=0.0), config.dtype
    config = dataclasses.replace(
        config, method=PLANNED_LAYERS, plan=None, when="always", dtype="float32", remat=False, scan_blocks=False, recipe=recipe
    )
    model = config.adapted()
    variables = config.start(model)
    wanted = min(batches * batch_size, len(dataset.train))
    order = np.random.default_rng(recipe.seed).permutation(len(dataset.train))[:wanted]
    images = Subset(dataset.train, order)
    load = loading(config.info, config.image_size, min(batch_size, wanted), recipe.seed)
    load = dataclasses.replace(load, shard_index=0, shard_count=1)  # every process of a run must come to the same plan
    measured = []
    with evaluation_batches(images, load, config.crop, config.interpolation) as loaded:
        for batch in loaded:
            valid = np.asarray(batch.valid)
            pixels = jnp.asarray(batch.images)[valid].astype(jnp.float32) / 255
            measured.append((normalise(pixels, config.info), jnp.asarray(batch.labels)[valid]))
    made = plan(model, variables, measured, budget, same_within_stage=same_within_stage, dtype=dtype, progress=progress)
    return dataclasses.replace(made, model=config.model, image_size=config.image_size, train=config.train)


def picture(made: Chosen, file: Path) -> None:
    """Draws, for each layer, which functions it keeps, low sequencies first, the energies kept, and its share of the cost."""
    functions = sorted(itertools.product(range(made.block), repeat=2), key=lambda function: (sum(function), function))
    figure = Figure(figsize=(9, 1 + 0.28 * len(made.layers)), layout="constrained")
    masks, bars = figure.subplots(1, 2, sharey=True, width_ratios=[2, 3])
    names = [layer.path for layer in made.layers]
    kept = [[layer.functions is None or function in layer.functions for function in functions] for layer in made.layers]
    masks.imshow(kept, aspect="auto", cmap="Greens", vmin=0, vmax=1.4, interpolation="nearest")
    masks.set(xlabel="functions kept, by sequency", xticks=[], yticks=range(len(names)), yticklabels=names)
    places = np.arange(len(names))
    for shift, values, label in (
        (-0.25, [100 * layer.dw_kept for layer in made.layers], "dW kept"),
        (0.0, [100 * layer.dx_kept for layer in made.layers], "dx kept"),
        (0.25, [100 * layer.share for layer in made.layers], f"share of {made.budget}"),
    ):
        bars.barh(places + shift, values, 0.25, label=label)
    bars.set(xlabel="%", xlim=(0, 100))
    figure.legend(loc="outside lower right", ncols=3, fontsize="small")
    bars.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{made.model}: {made.budget}={made.used:.3f} of full backpropagation")
    figure.savefig(file, dpi=120)
