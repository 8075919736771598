"""The flags of ``lbpwht finetune`` that decide what a run computes, and the configuration they make.

A flag that is not given is None (False for a flag without a value), so that a run that goes on knows which ones were given.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import jax
import tyro

from lbpwht_jax.adaptation import Train, parse_method, stored_method
from lbpwht_jax.cli.help import flag
from lbpwht_jax.data import Augmentation, open_dataset
from lbpwht_jax.data.recipes import paper_recipe
from lbpwht_jax.data.split import Dataset
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.config import BUNDLED_WEIGHTS, NO_WEIGHTS, DType, Projection, RunConfig, When
from lbpwht_jax.train import Recipe
from lbpwht_jax.train.recipe import Algorithm, ClassWeights
from lbpwht_jax.weights import BUNDLED
from lbpwht_jax.weights.sources import local_file
from lbpwht_jax.weights.timm_config import timm_config, timm_model

_T = TypeVar("_T")


def _or(given: _T | None, default: _T) -> _T:
    return default if given is None else given


def _titled(title: str) -> object:
    """The title of a group of flags in the help."""
    return tyro.conf.arg(name=title, prefix_name=False)


_LEARNING_RATE = tyro.conf.arg(aliases=("--learning-rate",))


AUTO = "auto"  # the method that chooses first
PLANNED_LAYERS = "lp_l1-1"  # the method whose layers it chooses for


@dataclasses.dataclass(frozen=True)
class AugmentationFlags:
    """How training images are changed."""

    crop_scale: Annotated[tuple[float, float] | None, flag("LEAST MOST", "no crop; paper: 0.08 1")] = None
    """Random resized crop: least and largest area, as fractions of the image's, such as 0.08 1."""

    crop_from: Annotated[Literal["canvas", "image"] | None, flag("{canvas,image}", "canvas")] = None
    """What random crops are cut out of. canvas: images squashed to 1.5 times the size, on the device. image: the whole image as
    it was decoded, while loading, as timm does."""

    flip: Annotated[bool | None, flag("{True,False}", "False; paper: True")] = None
    """Whether half of the training images are mirrored left to right, such as True."""

    shift: Annotated[int | None, flag("PIXELS", "0")] = None
    """The most pixels that training images are moved by, such as 2."""

    randaugment: Annotated[tuple[int, float] | None, flag("COUNT MAGNITUDE", "none")] = None
    """RandAugment: operations per image, and their magnitude in [0, 10], such as 2 9."""

    mixup: Annotated[float | None, flag("ALPHA", "0")] = None
    """Blends images with others: alpha of the share's Beta distribution, such as 0.8; 0 for none."""

    cutmix: Annotated[float | None, flag("ALPHA", "0")] = None
    """Replaces a box of images by others': alpha of the area's Beta distribution, such as 1; 0 for none."""

    def over(self, base: Augmentation) -> Augmentation:
        """``base`` with what was given."""
        return Augmentation(
            crop_scale=_or(self.crop_scale, base.crop_scale),
            crop_from=_or(self.crop_from, base.crop_from),
            flip=_or(self.flip, base.flip),
            shift=_or(self.shift, base.shift),
            randaugment=_or(self.randaugment, base.randaugment),
            mixup=_or(self.mixup, base.mixup),
            cutmix=_or(self.cutmix, base.cutmix),
        )


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """How the model is trained."""

    epochs: Annotated[int | None, flag("INT", "15; paper: 50")] = None
    """Passes over the training images, such as 30."""

    batch_size: Annotated[int | None, flag("INT", "64, or what fits if there are fewer training images")] = None
    """Images per step, over all devices and processes, such as 128."""

    lr: Annotated[float | None, flag("FLOAT", "5e-4; paper: by data set"), _LEARNING_RATE] = None
    """Peak learning rate, such as 1e-3, reached by linear warm-up and followed by a cosine."""

    algorithm: Annotated[Algorithm | None, flag("{adamw,lion,sgd,adafactor}", "adamw"), tyro.conf.arg(name="optimizer")] = None
    """What turns gradients into updates, Optax's; sgd has a momentum of 0.9. Lion wants about a tenth of AdamW's learning rate,
    sgd about a hundred times as much."""

    layer_decay: Annotated[float | None, flag("FACTOR", "1")] = None
    """Each block's learning rate over that of the block above it, such as 0.75; the head has the whole one."""

    patience: Annotated[int | None, flag("EPOCHS", "0: to the end")] = None
    """Stops after so many epochs in a row that do not beat the best validation accuracy, such as 5."""

    class_weights: Annotated[ClassWeights | None, flag("{none,balanced}", "none")] = None
    """balanced: an image counts in inverse proportion to how many training images its class has."""

    weight_decay: Annotated[float | None, flag("FLOAT", "1e-5")] = None
    """The share of its value, times the learning rate, that a parameter loses in each step, such as 0.05."""

    warmup_steps: Annotated[int | None, flag("INT", "100; paper: 1000, flowers 100")] = None
    """Steps of the warm-up, such as 500; at most a fifth of all steps."""

    min_ratio: Annotated[float | None, flag("FLOAT", "0.01; paper: 0.001 for flowers")] = None
    """The last learning rate of the cosine, as a fraction of the peak, such as 0.1."""

    clip: Annotated[float | None, flag("NORM", "5; paper: 0 for cifar100")] = None
    """Global norm that gradients are clipped to, such as 1; 0 for none."""

    label_smoothing: Annotated[float | None, flag("FLOAT", "0.1")] = None
    """Probability spread over all classes, such as 0.1; 0 for none."""

    drop_path: Annotated[float | None, flag("FLOAT", "0")] = None
    """Probability of dropping the last block's residual branches, such as 0.1, rising linearly to it."""

    ema: Annotated[float | None, flag("DECAY", "0")] = None
    """Decay per step of a moving average of what is trained, such as 0.999, which is then evaluated and exported; 0 for
    none."""

    accumulate: Annotated[int | None, flag("INT", "1")] = None
    """Equal parts a batch is cut into, computed one after the other to save memory, such as 4."""

    seed: Annotated[int | None, flag("INT", "0; paper: 233")] = None
    """Decides the train/test split (where the data has none), the new head, shuffling, augmentation and drop path."""

    augmentation: tyro.conf.OmitArgPrefixes[Annotated[AugmentationFlags, _titled("augmentation")]] = dataclasses.field(
        default_factory=AugmentationFlags
    )

    def over(self, base: Recipe) -> Recipe:
        """``base`` with what was given."""
        return Recipe(
            epochs=_or(self.epochs, base.epochs),
            batch_size=_or(self.batch_size, base.batch_size),
            algorithm=_or(self.algorithm, base.algorithm),
            lr=_or(self.lr, base.lr),
            layer_decay=_or(self.layer_decay, base.layer_decay),
            patience=_or(self.patience, base.patience),
            class_weights=_or(self.class_weights, base.class_weights),
            weight_decay=_or(self.weight_decay, base.weight_decay),
            warmup_steps=_or(self.warmup_steps, base.warmup_steps),
            min_ratio=_or(self.min_ratio, base.min_ratio),
            clip=_or(self.clip, base.clip),
            label_smoothing=_or(self.label_smoothing, base.label_smoothing),
            drop_path=_or(self.drop_path, base.drop_path),
            ema=_or(self.ema, base.ema),
            accumulate=_or(self.accumulate, base.accumulate),
            augmentation=self.augmentation.over(base.augmentation),
            seed=_or(self.seed, base.seed),
        )


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The model, the data, and what is trained."""

    model: Annotated[str | None, flag("NAME", BUNDLED)] = None
    """Name of the model, such as efficientformer_l1; "lbpwht models" lists them."""

    pretrained: Annotated[str | None, flag("SOURCE", "the weights that come with the package, for the model that does")] = None
    """What training starts from: a .safetensors, .pth or .bin file, a Hugging Face folder, a hub id such as
    timm/deit_tiny_patch16_224.fb_in1k, the folder of a finished run, or none for random weights. The head is new, unless a
    run has the same classes."""

    image_size: Annotated[int | None, flag("INT", "the model's")] = None
    """Height and width of the images, in pixels, such as 224."""

    dataset: Annotated[str | None, flag("NAME", "digits")] = None
    """digits; folder:PATH, images as PATH/{train,test}/CLASS/IMAGE (and PATH/val/CLASS/IMAGE) or PATH/CLASS/IMAGE, or a zip
    file of them; tfds:NAME or tfds:NAME:VERSION, prepared by "lbpwht prepare"."""

    method: Annotated[str | None, flag("METHOD", "lp_l1-4")] = None
    """How to adapt. full: exact backpropagation. lp_l1-R: low-rank, keeping the Walsh functions whose indices sum to less
    than R (R(R+1)/2 of the 64 in a block for R up to 8); lp_linf-R: those whose indices are all less than R. lora-R: a LoRA
    branch of rank R on each attention layer, which is frozen itself; lora_all-R: on every layer that low-rank backpropagation
    would adapt. Or a sum, such as lp_l1-4+lora_all-8, where branches too are backpropagated at low rank. plan:FILE: what
    "lbpwht plan" chose for each layer. auto: chooses first, under --budget."""

    budget: Annotated[str | None, flag("flops=SHARE|bytes=SHARE|seconds=SHARE", "none")] = None
    """With --method auto: the most that the backward pass may take, in FLOPs, in bytes kept or in seconds of its layers, as a
    share of full backpropagation, such as flops=0.3."""

    lora_alpha: Annotated[float | None, flag("FLOAT", "8")] = None
    """LoRA's branches are multiplied by this over their rank, such as 16; layers that make query, key and value at once have
    three times both."""

    lora_dropout: Annotated[float | None, flag("FLOAT", "0")] = None
    """The probability with which an element of the input of LoRA's branches is zero in a training step, such as 0.1."""

    train: Annotated[Train | None, flag("{all,last_stage,head}", "head for lora-R and lora_all-R, else all")] = None
    """What is trained: all, last_stage (the last stage, of plain vision transformers the last quarter of the blocks, and the
    head) or head (the head, and LoRA's branches where there are some). The rest is frozen and costs no backward pass that is
    not needed."""

    validation: Annotated[float | None, flag("SHARE", "0")] = None
    """The share of the training images, such as 0.1, that is held out to choose the best epoch by; the test images are then
    measured once, at the end. A data set's own validation images (a folder val beside test) are always used so."""

    projection: Annotated[Projection | None, flag("{fitted,official}", "fitted")] = None
    """Blocks that the grid does not fill: fitted (orthogonal, exact when every function is kept) or official (reflected, as
    the paper's authors do)."""

    when: Annotated[When | None, flag("{always,faster}", "faster")] = None
    """Which of the method's layers are low-rank: faster (those that it is predicted to speed up, the others being
    backpropagated exactly, their activations kept whole) or always (all of them)."""

    recipe: Annotated[Literal["default", "paper"] | None, flag("{default,paper}", "default")] = None
    """Where the numbers come from that are not given. default: 15 epochs, batch size 64, lr 5e-4, weight decay 1e-5, clip 5,
    100 warm-up steps, min ratio 0.01, label smoothing 0.1, no augmentation, seed 0. paper: what the paper trained the data
    set with, if it is one of its seven (tfds:cifar10, folder:PATH/cifar10.zip, ...): 50 epochs, random resized crop and flip,
    seed 233; lr, warm-up, min ratio and clip by data set."""

    dtype: Annotated[DType | None, flag("{float32,bfloat16}", "float32")] = None
    """Dtype of the computation; parameters and the optimiser's state are float32."""

    remat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Computes each block again in the backward pass instead of keeping its activations."""

    scan_blocks: tyro.conf.FlagCreatePairsOff[bool] = False
    """Runs equal blocks as one loop: a CPU's memory then falls to what is kept, for a few per cent of its time."""

    residuals: Annotated[ResidualsName | None, flag("{plain,exact,lean,tiny}", "plain")] = None
    """What is kept for the backward pass: plain (what JAX keeps of itself), exact (less, without rounding), lean (8 bits) or
    tiny (2 to 8 bits)."""

    numbers: tyro.conf.OmitArgPrefixes[Annotated[RecipeFlags, _titled("training")]] = dataclasses.field(
        default_factory=RecipeFlags
    )

    def over(self, base: RunConfig) -> RunConfig:
        """``base`` with what was given."""
        given = PLANNED_LAYERS if self.method == AUTO else self.method
        method, plan = (base.method, base.plan) if given is None else stored_method(given)
        return dataclasses.replace(
            base,
            model=_or(self.model, base.model),
            pretrained=_or(self.pretrained, base.pretrained),
            image_size=_or(self.image_size, base.image_size),
            dataset=_or(self.dataset, base.dataset),
            method=method,
            plan=plan,
            lora_alpha=_or(self.lora_alpha, base.lora_alpha),
            lora_dropout=_or(self.lora_dropout, base.lora_dropout),
            train=_or(self.train, base.train),
            projection=_or(self.projection, base.projection),
            when=_or(self.when, base.when),
            dtype=_or(self.dtype, base.dtype),
            remat=self.remat or base.remat,
            scan_blocks=self.scan_blocks or base.scan_blocks,
            residuals=_or(self.residuals, base.residuals),
            recipe=self.numbers.over(base.recipe),
            validation=_or(self.validation, base.validation),
        )

    def new_run(self, data_dir: Path | None) -> tuple[RunConfig, Dataset, list[str]]:
        """The configuration of a new run, its data, and what was decided that the user should know.

        Args:
          data_dir: folder of the TFDS data sets; None for TFDS's own.

        Raises:
          ValueError: if a name is unknown, a number is out of range or there are no weights to start from.
          FileNotFoundError: if there is no such data.
        """
        method = _or(self.method, "lp_l1-4")
        method = PLANNED_LAYERS if method == AUTO else method
        known = parse_method(method)
        method, chosen = stored_method(method)
        for name in ("lora_alpha", "lora_dropout"):
            if getattr(self, name) is not None and known.branches == "none":
                raise ValueError(f"--{name.replace('_', '-')} goes with a method that has LoRA, such as lora-8, not {method}")
        model = self._pretrained_model() if self.model is None else self.model
        dataset_name = _or(self.dataset, "digits")
        like = model_info(model).images
        if self.pretrained is None and model != BUNDLED:
            raise ValueError(
                f"no weights of {model} come with this package; give --pretrained a file, a folder or a hub id, or none for "
                "random weights"
            )
        notes = []
        if self.pretrained not in (None, NO_WEIGHTS, BUNDLED_WEIGHTS):
            file = local_file(self.pretrained)  # tells at once that it is not there
            published = timm_config(self.pretrained)
            like = like if published is None else published.over(like)
            if published is None and file is None:
                notes.append(f"No config.json of {self.pretrained} could be had: images are prepared as {model}'s usually are.")
        recipe = Recipe(epochs=15)
        if self.recipe == "paper":
            recipe = dataclasses.replace(recipe, **paper_recipe(dataset_name))
        recipe = self.numbers.over(recipe)
        dataset = open_dataset(dataset_name, recipe.seed, data_dir, _or(self.validation, 0.0))
        if self.numbers.batch_size is None and (fits := _batch_that_fits(recipe, len(dataset.train))):
            notes.append(
                f"Batch size {fits}: the recipe's {recipe.batch_size} is more than the {len(dataset.train)} training images."
            )
            recipe = dataclasses.replace(recipe, batch_size=fits)
        defaults = RunConfig(
            model=model,
            pretrained=BUNDLED_WEIGHTS,
            image_size=like.size,
            channels=like.channels,  # pyright: ignore[reportArgumentType] - pydantic checks it
            mean=like.mean,
            std=like.std,
            interpolation=like.interpolation,  # pyright: ignore[reportArgumentType]
            crop=like.crop,
            dataset=dataset_name,
            data_dir=None if data_dir is None else str(data_dir),
            classes=dataset.classes,
            method=method,
            plan=chosen,
            train=known.default_train,
            projection="fitted",
            when="faster",
            dtype="float32",
            remat=False,
            recipe=recipe,
        )
        config = dataclasses.replace(self.over(defaults), recipe=recipe)
        if config.keeps_head():
            notes.append(f"The head is that of {config.pretrained}, which has the same classes.")
        return config, dataset, notes

    def _pretrained_model(self) -> str:
        """The model of the weights that training starts from, where they tell; else the one that comes with the package."""
        if self.pretrained in (None, NO_WEIGHTS, BUNDLED_WEIGHTS):
            return BUNDLED
        named = timm_model(self.pretrained)
        if named is None and (Path(self.pretrained) / run_folder.CONFIG).is_file():
            return run_folder.read_config(Path(self.pretrained)).model
        return _or(named, BUNDLED)


def _batch_that_fits(recipe: Recipe, images: int) -> int:
    """The largest batch that devices and parts can share, of no more than so many images; 0 if there is none, or no need."""
    unit = jax.device_count() * recipe.accumulate
    return images // unit * unit if recipe.batch_size > images else 0
