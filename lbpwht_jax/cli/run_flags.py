"""The flags of ``lbpwht finetune`` that decide what a run computes, and the configuration they make.

A flag that is not given is None (False for a flag without a value), so that a run that goes on knows which ones were given.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from lbpwht_jax.adaptation import Train
from lbpwht_jax.data import Augmentation, open_dataset
from lbpwht_jax.data.recipes import paper_recipe
from lbpwht_jax.data.split import Dataset
from lbpwht_jax.models import model_info
from lbpwht_jax.runs.config import BUNDLED_WEIGHTS, NO_WEIGHTS, DType, Projection, RunConfig, When
from lbpwht_jax.train import Recipe
from lbpwht_jax.weights import BUNDLED
from lbpwht_jax.weights.sources import local_file

_T = TypeVar("_T")


def _or(given: _T | None, default: _T) -> _T:
    return default if given is None else given


def _hint(default: str, metavar: str | None = None) -> object:
    """What a flag's help says: its default, and its values where the type's own ``None`` would be among them."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {default})", metavar=metavar)


_OF_RECIPE = tyro.conf.arg(help_behavior_hint="(default: the recipe's)")


@dataclasses.dataclass(frozen=True)
class AugmentationFlags:
    """How training images are changed."""

    crop_scale: Annotated[tuple[float, float] | None, _OF_RECIPE] = None
    """Random resized crop: least and largest area, as fractions of the image's, such as 0.08 1."""

    flip: Annotated[bool | None, _OF_RECIPE] = None
    """Whether half of the training images are mirrored left to right."""

    shift: Annotated[int | None, _OF_RECIPE] = None
    """The most pixels that training images are moved by."""

    randaugment: Annotated[tuple[int, float] | None, _OF_RECIPE] = None
    """RandAugment: operations per image, and their magnitude in [0, 10]."""

    mixup: Annotated[float | None, _OF_RECIPE] = None
    """Blends images with others: alpha of the share's Beta distribution, such as 0.8; 0 for none."""

    cutmix: Annotated[float | None, _OF_RECIPE] = None
    """Replaces a box of images by others': alpha of the area's Beta distribution, such as 1; 0 for none."""

    def over(self, base: Augmentation) -> Augmentation:
        """``base`` with what was given."""
        return Augmentation(
            crop_scale=_or(self.crop_scale, base.crop_scale),
            flip=_or(self.flip, base.flip),
            shift=_or(self.shift, base.shift),
            randaugment=_or(self.randaugment, base.randaugment),
            mixup=_or(self.mixup, base.mixup),
            cutmix=_or(self.cutmix, base.cutmix),
        )


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """How the model is trained."""

    epochs: Annotated[int | None, _OF_RECIPE] = None
    """Passes over the training images."""

    batch_size: Annotated[int | None, _OF_RECIPE] = None
    """Images per step, over all devices and processes."""

    lr: Annotated[float | None, _OF_RECIPE] = None
    """Peak learning rate of AdamW, reached by linear warm-up and followed by a cosine."""

    weight_decay: Annotated[float | None, _OF_RECIPE] = None
    """AdamW's weight decay."""

    warmup_steps: Annotated[int | None, _OF_RECIPE] = None
    """Steps of the warm-up; at most a fifth of all steps."""

    min_ratio: Annotated[float | None, _OF_RECIPE] = None
    """The last learning rate of the cosine, as a fraction of the peak."""

    clip: Annotated[float | None, _OF_RECIPE] = None
    """Global norm that gradients are clipped to; 0 for none."""

    label_smoothing: Annotated[float | None, _OF_RECIPE] = None
    """Probability spread over all classes."""

    drop_path: Annotated[float | None, _OF_RECIPE] = None
    """Probability of dropping the last block's residual branches, rising linearly to it."""

    ema: Annotated[float | None, _OF_RECIPE] = None
    """Decay per step of a moving average of what is trained, such as 0.999, which is then evaluated and exported; 0 for
    none."""

    accumulate: Annotated[int | None, _OF_RECIPE] = None
    """Equal parts a batch is cut into, computed one after the other to save memory."""

    seed: Annotated[int | None, _OF_RECIPE] = None
    """Decides the train/test split (where the data has none), the new head, shuffling, augmentation and drop path."""

    augmentation: tyro.conf.OmitArgPrefixes[AugmentationFlags] = dataclasses.field(default_factory=AugmentationFlags)

    def over(self, base: Recipe) -> Recipe:
        """``base`` with what was given."""
        return Recipe(
            epochs=_or(self.epochs, base.epochs),
            batch_size=_or(self.batch_size, base.batch_size),
            lr=_or(self.lr, base.lr),
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

    model: Annotated[str | None, _hint(BUNDLED, "STR")] = None
    """Name of the model; "lbpwht models" lists them."""

    pretrained: Annotated[str | None, _hint("the weights that come with the package, for the model that does", "STR")] = None
    """What training starts from: a .safetensors, .pth or .bin file, a Hugging Face folder, a hub id such as
    timm/deit_tiny_patch16_224.fb_in1k, or none for random weights. The head is new."""

    image_size: Annotated[int | None, _hint("the model's", "INT")] = None
    """Height and width of the images, in pixels."""

    dataset: Annotated[str | None, _hint("digits", "STR")] = None
    """digits; folder:PATH, images as PATH/{train,test}/CLASS/IMAGE (and PATH/val/CLASS/IMAGE) or PATH/CLASS/IMAGE, or a zip
    file of them; tfds:NAME or tfds:NAME:VERSION, prepared by "lbpwht prepare"."""

    method: Annotated[str | None, _hint("lp_l1-4", "STR")] = None
    """How to adapt. full: exact backpropagation. lp_l1-R: low-rank, keeping the Walsh functions whose indices sum to less
    than R (R(R+1)/2 of the 64 in a block for R up to 8); lp_linf-R: those whose indices are all less than R. lora-R: a LoRA
    branch of rank R on each attention layer, which is frozen itself; lora_all-R: on every layer that low-rank backpropagation
    would adapt. Or a sum, such as lp_l1-4+lora_all-8, where branches too are backpropagated at low rank."""

    train: Annotated[Train | None, _hint("all", "{all,last_stage,head}")] = None
    """What is trained: all, last_stage (the last stage, of plain vision transformers the last quarter of the blocks, and the
    head) or head (the head, and LoRA's branches where there are some). The rest is frozen and costs no backward pass that is
    not needed."""

    validation: Annotated[float | None, _hint("0: none", "SHARE")] = None
    """The share of the training images, such as 0.1, that is held out to choose the best epoch by; the test images are then
    measured once, at the end. A data set's own validation images (a folder val beside test) are always used so."""

    projection: Annotated[Projection | None, _hint("fitted", "{fitted,official}")] = None
    """Blocks that the grid does not fill: fitted (orthogonal, exact when every function is kept) or official (reflected, as
    the paper's authors do)."""

    when: Annotated[When | None, _hint("faster", "{always,faster}")] = None
    """Which of the method's layers are low-rank: faster (those that it is predicted to speed up, the others being
    backpropagated exactly, their activations kept whole) or always (all of them)."""

    recipe: Annotated[Literal["default", "paper"] | None, _hint("default", "{default,paper}")] = None
    """Where the numbers come from that are not given. default: 15 epochs, batch size 64, lr 5e-4, weight decay 1e-5, clip 5,
    100 warm-up steps, min ratio 0.01, label smoothing 0.1, no augmentation, seed 0. paper: what the paper trained the data
    set with, if it is one of its seven (tfds:cifar10, folder:PATH/cifar10.zip, ...): 50 epochs, random resized crop and flip,
    seed 233; lr, warm-up, min ratio and clip by data set."""

    dtype: Annotated[DType | None, _hint("float32", "{float32,bfloat16}")] = None
    """Dtype of the computation; parameters and the optimiser's state are float32."""

    remat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Computes each block again in the backward pass instead of keeping its activations."""

    numbers: tyro.conf.OmitArgPrefixes[RecipeFlags] = dataclasses.field(default_factory=RecipeFlags)

    def over(self, base: RunConfig) -> RunConfig:
        """``base`` with what was given."""
        return dataclasses.replace(
            base,
            model=_or(self.model, base.model),
            pretrained=_or(self.pretrained, base.pretrained),
            image_size=_or(self.image_size, base.image_size),
            dataset=_or(self.dataset, base.dataset),
            method=_or(self.method, base.method),
            train=_or(self.train, base.train),
            projection=_or(self.projection, base.projection),
            when=_or(self.when, base.when),
            dtype=_or(self.dtype, base.dtype),
            remat=self.remat or base.remat,
            recipe=self.numbers.over(base.recipe),
            validation=_or(self.validation, base.validation),
        )

    def new_run(self, data_dir: Path | None) -> tuple[RunConfig, Dataset]:
        """The configuration of a new run, and its data.

        Args:
          data_dir: folder of the TFDS data sets; None for TFDS's own.

        Raises:
          ValueError: if a name is unknown, a number is out of range or there are no weights to start from.
          FileNotFoundError: if there is no such data.
        """
        model, dataset_name = _or(self.model, BUNDLED), _or(self.dataset, "digits")
        info = model_info(model)
        if self.pretrained is None and model != BUNDLED:
            raise ValueError(
                f"no weights of {model} come with this package; give --pretrained a file, a folder or a hub id, or none for "
                "random weights"
            )
        if self.pretrained not in (None, NO_WEIGHTS, BUNDLED_WEIGHTS):
            local_file(self.pretrained)  # tells at once that it is not there
        recipe = Recipe(epochs=15)
        if self.recipe == "paper":
            recipe = dataclasses.replace(recipe, **paper_recipe(dataset_name))
        recipe = self.numbers.over(recipe)
        dataset = open_dataset(dataset_name, recipe.seed, data_dir, _or(self.validation, 0.0))
        defaults = RunConfig(
            model=model,
            pretrained=BUNDLED_WEIGHTS,
            image_size=info.images.size,
            channels=info.images.channels,  # pyright: ignore[reportArgumentType] - pydantic checks it
            mean=info.images.mean,
            std=info.images.std,
            interpolation=info.images.interpolation,  # pyright: ignore[reportArgumentType]
            crop=info.images.crop,
            dataset=dataset_name,
            data_dir=None if data_dir is None else str(data_dir),
            classes=dataset.classes,
            method="lp_l1-4",
            train="all",
            projection="fitted",
            when="faster",
            dtype="float32",
            remat=False,
            recipe=recipe,
        )
        return self.over(defaults), dataset
