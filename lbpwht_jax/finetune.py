"""``lbpwht finetune``: adapts a pretrained vision transformer and reports what it cost."""

import dataclasses
import datetime
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import flax
import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lbpwht_jax import run_folder, train
from lbpwht_jax.adapt import adapt
from lbpwht_jax.adapter_file import save_adapter
from lbpwht_jax.cost import backward_flops, saved_bytes
from lbpwht_jax.data import arrays as data
from lbpwht_jax.methods import Train, parse_method
from lbpwht_jax.models import create_model, model_info
from lbpwht_jax.weights import BUNDLED, count_parameters, load_bundled, replace_head, save_weights


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Adapt a pretrained vision transformer with low-rank backpropagation.

    Without arguments, adapts the small vision transformer that comes with the package (pretrained on Fashion-MNIST) to
    scikit-learn's handwritten digits with LP_{L1-4}, without a network, in about a minute on two cores. The forward pass is
    exact; the backward pass of every dense layer of every block runs on a few Walsh coefficients of the token grid.

    At the end a table gives test accuracy, backward MFLOPs and bytes kept for the backward pass, both an image, and the
    median time of a step. The run folder holds config.json, metrics.jsonl, weights.safetensors (of the plain model, LoRA's
    branches merged) and curves.png; with LoRA also adapter, what was trained alone in PEFT's layout.

    Try "lbpwht finetune --compare" to see full backpropagation and LP_{L1-2} beside it, or
    "lbpwht finetune --method lp_linf-2 --epochs 20 --output runs/linf" for another choice of functions and a named folder.
    """

    method: str = "lp_l1-4"
    """How to adapt. full: exact backpropagation. lp_l1-R: low-rank, keeping the Walsh functions whose indices sum to less
    than R (R(R+1)/2 of the 64 in a block for R up to 8); lp_linf-R: those whose indices are all less than R. lora-R: a LoRA
    branch of rank R on each attention layer, which is frozen itself; lora_all-R: on every layer that low-rank backpropagation
    would adapt. Or a sum, such as lp_l1-4+lora_all-8, where branches too are backpropagated at low rank."""

    train: Train = "all"
    """What is trained: all, last_stage (the last stage, here the last quarter of the blocks, and the head) or head (the head,
    and LoRA's branches where there are some). The rest is frozen and costs no backward pass that is not needed."""

    projection: Literal["fitted", "official"] = "fitted"
    """Blocks that the grid does not fill: fitted (orthogonal, exact when every function is kept) or official (reflected, as
    the paper's authors do)."""

    epochs: int = 15
    """Passes over the training images."""

    batch_size: int = 64
    """Images a step."""

    lr: float = 5e-4
    """Peak learning rate of AdamW, reached by linear warm-up and followed by a cosine."""

    seed: int = 0
    """Of the train/test split, the new head and the shuffling."""

    output: Path | None = None
    """Folder for the run, which must not hold one yet. By default runs/DATE-TIME-METHOD."""

    compare: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also train with full backpropagation and with lp_l1-2, into OUTPUT/compare/, and show them beside."""

    def prepare(self) -> Callable[[], None]:
        """Checks everything that can be checked before training.

        Returns:
          The function that trains.

        Raises:
          ValueError: if a value is out of range, the method is unknown or trains nothing, or the output folder cannot be used.
        """
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        methods = [self.method, *(other for other in ("full", "lp_l1-2") if self.compare and other != self.method)]
        for method in methods:
            parse_method(method, projection=self.projection).rules(model_info(BUNDLED), self.train)
        dataset = data.digits(model_info(BUNDLED).image_size, self.seed)
        if self.batch_size > len(dataset.train):
            raise ValueError(f"--batch-size must be at most {len(dataset.train)}, the number of training images")
        output = self.output or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{self.method}"
        folders = [run_folder.create(output if i == 0 else output / "compare" / m) for i, m in enumerate(methods)]

        def run() -> None:
            console = Console()
            results = [
                _run(dataclasses.replace(self, method=m), dataset, f, console) for m, f in zip(methods, folders, strict=True)
            ]
            console.print(_table(results))
            console.print(f"Run folder: {output}", soft_wrap=True)

        return run


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run is judged by.

    Attributes:
      method: its short name.
      test_accuracy: after the last epoch, in [0, 1].
      trainable_parameters: how many scalars were trained.
      backward_flops: of matrix products, an image.
      saved_bytes: kept for the backward pass, an image.
      step_seconds: median over the run, the first step (which compiles) left out.
    """

    method: str
    test_accuracy: float
    trainable_parameters: int
    backward_flops: int
    saved_bytes: int
    step_seconds: float


def _run(config: Finetune, dataset: data.Dataset, folder: Path, console: Console) -> Result:
    info = model_info(BUNDLED)
    method = parse_method(config.method, projection=config.projection)
    base = create_model(BUNDLED, num_classes=len(dataset.classes), frozen_batch_norm=True)
    image_shape = (info.image_size, info.image_size, info.channels)
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    model = adapt(base, method.rules(info, config.train), example)
    head_key, branch_key = jax.random.key(config.seed), jax.random.fold_in(jax.random.key(config.seed), 1)
    pretrained = replace_head(load_bundled()[0], base.init(head_key, jnp.zeros((1, *image_shape))))
    variables = model.with_branches(branch_key, pretrained)
    recipe = train.Recipe(config.epochs, config.batch_size, config.lr, seed=config.seed)
    run_folder.write_json(
        folder / run_folder.CONFIG,
        {
            "model": BUNDLED,
            "dataset": dataset.name,
            "classes": dataset.classes,
            "method": config.method,
            "train": config.train,
            "projection": config.projection,
            "recipe": dataclasses.asdict(recipe),
            "versions": {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()},
            "device": jax.devices()[0].device_kind,
        },
    )
    console.print(
        f"[bold]{config.method}[/]: {BUNDLED} ({count_parameters(variables):,} parameters) on {dataset.name} "
        f"({len(dataset.train)} training and {len(dataset.test)} test images, {len(dataset.classes)} classes)"
    )
    events = train.fit(model, info, variables, dataset.train, dataset.test, recipe, trainable=model.trainable)
    total = recipe.epochs * (len(dataset.train) // recipe.batch_size)
    steps, epochs, state = _follow(events, total, recipe, folder, console)
    metadata = {"model": BUNDLED, "classes": dataset.classes}
    save_weights(folder / run_folder.WEIGHTS, model.merge(state.variables), metadata)
    if method.branches != "none":
        save_adapter(folder / run_folder.ADAPTER, model, state.variables, BUNDLED)
    result = Result(
        config.method,
        epochs[-1].test_accuracy,
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        backward_flops(model, variables, image_shape),
        saved_bytes(model, variables, image_shape),
        statistics.median(step.seconds for step in steps[1:] or steps),
    )
    run_folder.plot_curves(folder, steps, epochs, f"{BUNDLED} on {dataset.name}, {config.method}")
    run_folder.write_json(folder / run_folder.RESULT, dataclasses.asdict(result))
    return result


def _follow(
    events: Iterator[train.Step | train.Epoch | train.TrainState],
    total: int,
    recipe: train.Recipe,
    folder: Path,
    console: Console,
) -> tuple[list[train.Step], list[train.Epoch], train.TrainState]:
    """Runs the training, showing a progress bar (a line an epoch where the output is no terminal) and logging metrics."""
    steps, epochs = [], []
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    disabled = not console.is_terminal
    with run_folder.MetricsFile(folder) as metrics, Progress(*columns, console=console, disable=disabled) as progress:
        task = progress.add_task("", total=total, epoch=f"1/{recipe.epochs}", loss=0.0, accuracy=0.0, rate=0.0)
        for event in events:
            if isinstance(event, train.TrainState):
                return steps, epochs, event
            metrics.write(event)
            if isinstance(event, train.Step):
                steps.append(event)
                rate = recipe.batch_size / event.seconds
                progress.update(task, advance=1, loss=event.loss, accuracy=event.accuracy, rate=rate)
            else:
                epochs.append(event)
                progress.update(task, epoch=f"{min(event.number + 1, recipe.epochs)}/{recipe.epochs}")
                console.print(
                    f"epoch {event.number}/{recipe.epochs}: loss {steps[-1].loss:.3f}, "
                    f"test accuracy {event.test_accuracy:.2%}, {recipe.batch_size / steps[-1].seconds:.0f} images/s",
                    highlight=False,
                )
    raise RuntimeError("the training ended without its last state")


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="What it came to")
    table.add_column("method")
    for heading in ("test accuracy", "trained parameters", "backward MFLOPs/image", "saved KB/image", "median step"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.test_accuracy:.2%}",
            f"{result.trainable_parameters:,}",
            f"{result.backward_flops / 1e6:.1f}",
            f"{result.saved_bytes / 1e3:,.0f}",
            f"{result.step_seconds * 1e3:.0f} ms",
        )
    return table
