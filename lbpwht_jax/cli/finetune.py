"""``lbpwht finetune``: adapts a pretrained vision transformer and reports what it cost."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from lbpwht_jax.adaptation.presets import Train, parse_method
from lbpwht_jax.data import Augmentation, Dataset, open_dataset
from lbpwht_jax.data.recipes import paper_recipe
from lbpwht_jax.models import model_info
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs import training as training_run
from lbpwht_jax.runs.config import BUNDLED_WEIGHTS, DType, Projection, RunConfig, When
from lbpwht_jax.runs.results import table
from lbpwht_jax.runs.training import TrainingRun
from lbpwht_jax.train import Placement, Recipe, Shard
from lbpwht_jax.train.checkpoint import last_step
from lbpwht_jax.train.processes import connect, is_first
from lbpwht_jax.weights.files import BUNDLED

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_COMPARED = ("full", "lp_l1-2")
_NOT_RECORDED = ("resume", "resume_step", "output", "shard", "workers", "checkpoint_every")
_NOT_RECORDED += ("data_dir", "coordinator", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Adapt a pretrained vision transformer with low-rank backpropagation.

    Without arguments, adapts the small vision transformer that comes with the package (pretrained on Fashion-MNIST) to
    scikit-learn's handwritten digits with LP_{L1-4}, without a network, in about a minute on two cores. The forward pass is
    exact; the backward pass of every dense layer of every block runs on a few Walsh coefficients of the token grid.

    At the end a table gives test accuracy, backward MFLOPs and bytes kept for the backward pass, both an image, and the
    median time of a step. The run folder holds config.json, metrics.jsonl, tensorboard, checkpoints, weights.safetensors (of
    the plain model, LoRA's branches merged) and curves.png; with LoRA also adapter, what was trained alone in PEFT's layout.
    "lbpwht evaluate", "predict" and "export" take the folder and need no more.

    SIGTERM or Ctrl-C lets the step end, saves and leaves with exit code 3; a second one leaves at once. "--resume" goes on bit
    for bit. A run starts from the first of these that there is: the checkpoint that --resume names (by default the last one of
    its run), --pretrained, the weights that come with the package.

    Exit codes: 0 done; 1 training failed (diverged, or the disk is full); 2 mistaken arguments; 3 stopped and saved.

    Try "lbpwht finetune --compare" to see full backpropagation and LP_{L1-2} beside it, or "lbpwht finetune --model
    efficientformer_l1 --pretrained timm/efficientformer_l1.snap_dist_in1k --dataset folder:PATH" for your own images.
    """

    model: str = BUNDLED
    """Name of the model; "lbpwht models" lists them."""

    pretrained: str | None = None
    """What training starts from: a .safetensors, .pth or .bin file, a Hugging Face folder, a hub id such as
    timm/deit_tiny_patch16_224.fb_in1k, or none for random weights. The head is new. By default the weights that come with
    the package, for the model that does."""

    image_size: int | None = None
    """Height and width of the images, in pixels; by default the model's."""

    dataset: str = "digits"
    """digits; folder:PATH, images as PATH/{train,test}/CLASS/IMAGE or PATH/CLASS/IMAGE, or a zip file of them; tfds:NAME or
    tfds:NAME:VERSION, prepared by "lbpwht prepare"."""

    data_dir: Path | None = None
    """Folder of the TFDS data sets; by default where TFDS has them."""

    method: str = "lp_l1-4"
    """How to adapt. full: exact backpropagation. lp_l1-R: low-rank, keeping the Walsh functions whose indices sum to less
    than R (R(R+1)/2 of the 64 in a block for R up to 8); lp_linf-R: those whose indices are all less than R. lora-R: a LoRA
    branch of rank R on each attention layer, which is frozen itself; lora_all-R: on every layer that low-rank backpropagation
    would adapt. Or a sum, such as lp_l1-4+lora_all-8, where branches too are backpropagated at low rank."""

    train: Train = "all"
    """What is trained: all, last_stage (the last stage, of plain vision transformers the last quarter of the blocks, and the
    head) or head (the head, and LoRA's branches where there are some). The rest is frozen and costs no backward pass that is
    not needed."""

    projection: Projection = "fitted"
    """Blocks that the grid does not fill: fitted (orthogonal, exact when every function is kept) or official (reflected, as
    the paper's authors do)."""

    when: When = "faster"
    """Which of the method's layers are low-rank: faster (those that it is predicted to speed up, the others being
    backpropagated exactly, their activations kept whole) or always (all of them)."""

    recipe: Literal["default", "paper"] = "default"
    """Where the numbers below come from if they are not given. default: 15 epochs, batch size 64, lr 5e-4, weight decay 1e-5,
    clip 5, 100 warm-up steps, min ratio 0.01, label smoothing 0.1, no augmentation, seed 0. paper: what the paper trained
    the data set with, if it is one of its seven (tfds:cifar10, folder:PATH/cifar10.zip, ...): 50 epochs, random resized crop
    and flip, seed 233; lr, warm-up, min ratio and clip by data set."""

    epochs: int | None = None
    """Passes over the training images."""

    batch_size: int | None = None
    """Images a step, over all devices and processes."""

    lr: float | None = None
    """Peak learning rate of AdamW, reached by linear warm-up and followed by a cosine."""

    weight_decay: float | None = None
    """Of AdamW."""

    warmup_steps: int | None = None
    """Steps of the warm-up; at most a fifth of all steps."""

    min_ratio: float | None = None
    """What the cosine decays to, over the peak rate."""

    clip: float | None = None
    """Global norm that gradients are clipped to; 0 for none."""

    label_smoothing: float | None = None
    """Probability spread over all classes."""

    drop_path: float | None = None
    """Probability of dropping the last block's residual branches, rising linearly to it."""

    ema: float | None = None
    """Decay a step of a moving average of what is trained, such as 0.999, which is then evaluated and exported; 0 for none."""

    accumulate: int | None = None
    """Equal parts a batch is cut into, computed one after the other to save memory."""

    crop_scale: tuple[float, float] | None = None
    """Random resized crop: least and largest area over the image's, such as 0.08 1."""

    flip: bool | None = None
    """Whether half of the training images are mirrored left to right."""

    shift: int | None = None
    """Pixels that training images are moved by at most."""

    randaugment: tuple[int, float] | None = None
    """RandAugment: operations an image, and their magnitude in [0, 10]."""

    mixup: float | None = None
    """Blends images with others: alpha of the share's Beta distribution, such as 0.8; 0 for none."""

    cutmix: float | None = None
    """Replaces a box of images by others': alpha of the area's Beta distribution, such as 1; 0 for none."""

    seed: int | None = None
    """Of the train/test split (where the data has none), the new head, shuffling, augmentation and drop path."""

    dtype: DType = "float32"
    """Of the computation; parameters and the optimiser's state are float32."""

    remat: _Flag = False
    """Computes each block again in the backward pass instead of keeping its activations."""

    shard: Shard = "data"
    """What the devices share: data (each has all of the parameters) or params (parameters and the optimiser's state too)."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where a run has several; TPU slices and SLURM's tasks need none. All see one run folder."""

    num_processes: int | None = None
    """Processes of the run, with --coordinator."""

    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""

    workers: int | None = None
    """Threads that load images; by default as many as there are cores, up to 16."""

    output: Path | None = None
    """Folder for the run, which must not hold one yet. By default runs/DATE-TIME-METHOD."""

    checkpoint_every: int = 0
    """Steps between checkpoints, beside those at the end of each epoch; 0 for no others. The last two and the best
    are kept."""

    resume: Path | None = None
    """The folder of a run to go on with, from its last checkpoint; its configuration holds, and flags that contradict it are
    refused."""

    resume_step: int | None = None
    """With --resume: the checkpoint of this step, such as an older one where the last is damaged."""

    compare: _Flag = False
    """Also train with full backpropagation and with lp_l1-2, into OUTPUT/compare/, and show them beside."""

    def prepare(self) -> Callable[[], None]:
        """Checks everything that can be checked before training, and makes the run folders.

        Returns:
          The function that trains.

        Raises:
          ValueError: if a value is out of range, a name is unknown, nothing would be trained, the run folder cannot be used,
            or the checkpoint to go on from is damaged or of another model.
          FileNotFoundError, ImportError: if data or pretrained weights cannot be had.
        """
        if self.checkpoint_every < 0:
            raise ValueError(f"--checkpoint-every must not be negative, got {self.checkpoint_every}")
        connect(self.coordinator, self.num_processes, self.process_id)
        with contextlib.ExitStack() as locks:
            runs = self._new_runs(locks) if self.resume is None else [self._resumed_run(self.resume, locks)]
            held = locks.pop_all()

        def run() -> None:
            console = Console(quiet=not is_first())
            with held:
                results = [each.train(self.checkpoint_every, console) for each in runs]
            console.print(table(results))
            console.print(f"Run folder: {runs[0].folder}", soft_wrap=True)

        return run

    def _new_runs(self, locks: contextlib.ExitStack) -> list[TrainingRun]:
        if self.resume_step is not None:
            raise ValueError("--resume-step goes with --resume RUN")
        config, dataset = self._config()
        methods = [self.method, *(other for other in _COMPARED if self.compare and other != self.method)]
        output = self.output or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{self.method}"
        folders = [output, *(output / "compare" / method for method in methods[1:])]
        placement = Placement(self.shard)
        runs = [
            training_run.prepare(dataclasses.replace(config, method=method), folder, dataset, placement, self.workers)
            for method, folder in zip(methods, folders, strict=True)
        ]
        for folder in folders if is_first() else ():
            locks.callback(run_folder.lock(folder, create=True).release)
        return runs

    def _config(self) -> tuple[RunConfig, Dataset]:
        for method in (self.method, *_COMPARED * self.compare):
            parse_method(method, projection=self.projection).rules(model_info(self.model), self.train)
        if self.pretrained is None and self.model != BUNDLED:
            raise ValueError(
                f"no weights of {self.model} come with this package; give --pretrained a file, a folder or a hub id, or none "
                "for random weights"
            )
        recipe = self._recipe()
        dataset = open_dataset(self.dataset, recipe.seed, self.data_dir)
        info = model_info(self.model)
        config = RunConfig(
            model=self.model,
            pretrained=self.pretrained or BUNDLED_WEIGHTS,
            image_size=self.image_size or info.images.size,
            channels=info.images.channels,
            mean=info.images.mean,
            std=info.images.std,
            interpolation=info.images.interpolation,
            crop=info.images.crop,
            dataset=self.dataset,
            data_dir=None if self.data_dir is None else str(self.data_dir),
            classes=dataset.classes,
            method=self.method,
            train=self.train,
            projection=self.projection,
            when=self.when,
            dtype=self.dtype,
            remat=self.remat,
            recipe=recipe,
        )
        return config, dataset

    def _recipe(self) -> Recipe:
        base = Recipe(epochs=15)
        if self.recipe == "paper":
            base = dataclasses.replace(base, **paper_recipe(self.dataset))
        augmentation = dataclasses.replace(base.augmentation, **self._given(Augmentation))
        return dataclasses.replace(base, augmentation=augmentation, **self._given(Recipe))

    def _given(self, kind: type) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(kind) if hasattr(self, field.name)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _resumed_run(self, folder: Path, locks: contextlib.ExitStack) -> TrainingRun:
        config = run_folder.read_config(folder)
        self._check_agreement(config, folder)
        if is_first():
            locks.callback(run_folder.lock(folder, create=False).release)
        if training_run.finished(folder):
            raise ValueError(f"{folder} is finished; there is nothing to resume")
        if self.data_dir is not None:
            config = dataclasses.replace(config, data_dir=str(self.data_dir))
        data_dir = None if config.data_dir is None else Path(config.data_dir)
        dataset = open_dataset(config.dataset, config.recipe.seed, data_dir)
        step = last_step(folder) if self.resume_step is None else self.resume_step
        return training_run.prepare(config, folder, dataset, Placement(self.shard), self.workers, step)

    def _check_agreement(self, config: RunConfig, folder: Path) -> None:
        recorded = {**vars(config.recipe.augmentation), **vars(config.recipe), **vars(config)}
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given == field.default or field.name in _NOT_RECORDED:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if field.name in ("recipe", "compare"):
                raise ValueError(f"{flag} does not go with --resume: the run in {folder} keeps its configuration; leave it out")
            if recorded[field.name] != given:
                raise ValueError(
                    f"{flag} {given}: the run in {folder} was started with {recorded[field.name]}, and a resumed run keeps its "
                    "configuration; leave the flag out, or start a new run"
                )
