"""Swin Transformer V2 against timm, in evaluation mode, every tensor drawn at random."""

import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import optax
import pytest
import torch

from lbpwht_jax import lp_l1
from lbpwht_jax.models import create_model

# timm imports torchvision, whose operators the CPU build does not bring.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402

TINY = "swinv2_tiny_window8_256"
# Parameters and state-dict entries of timm's models.
SIZES = {
    "swinv2_tiny_window8_256": (28_347_154, 221),
    "swinv2_tiny_window16_256": (28_347_154, 221),
    "swinv2_small_window8_256": (49_728_418, 425),
    "swinv2_small_window16_256": (49_728_418, 425),
    "swinv2_base_window8_256": (87_918_816, 425),
    "swinv2_base_window16_256": (87_918_816, 425),
}
# At 224 pixels maps of 56, 28, 14 and 7 tokens: padded windows and a window smaller than the model's. At 120 also an odd
# map (15) to merge, and a window of 4.
OTHER_SIZES = (224, 120)
LEAVES = {"kernel": "weight", "scale": "weight"}


def timm_key(path: tuple[str, ...]) -> str:
    """timm's name of the parameter at a path."""
    *modules, leaf = path
    return ".".join([re.sub(r"_(\d+)$", r".\1", module) for module in modules] + [LEAVES.get(leaf, leaf)])


def to_flax(value: np.ndarray, leaf: str) -> np.ndarray:
    """A tensor of timm's in the layout of the parameter ``leaf``."""
    if leaf != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def from_timm(name: str, module: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Variables of the module from a state dict, which must hold exactly their entries."""
    images = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), np.float32)
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), images)["params"])
    assert {timm_key(path) for path in shapes} == set(state_dict)
    params = {path: to_flax(state_dict[timm_key(path)].numpy(), path[-1]) for path in shapes}
    assert {path: value.shape for path, value in params.items()} == {path: value.shape for path, value in shapes.items()}
    return {"params": flax.traverse_util.unflatten_dict(params)}


def random_tensor(key: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values such that activations stay of order one and every entry matters."""
    normal = torch.randn(value.shape, generator=generator)
    if key.endswith("logit_scale"):
        # From 0 to above the clamp, which is at log(100) = 4.6.
        return 5.5 * torch.rand(value.shape, generator=generator)
    if key.endswith("cpb_mlp.2.weight"):
        return 0.1 * normal
    if value.ndim > 1:
        return normal / value[0].numel() ** 0.5
    return (1 if key.endswith("weight") else 0) + 0.3 * normal


def pair(name: str, image_size: int) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """timm's model, ours, and the variables that give ours the same weights."""
    torch.set_num_threads(1)
    reference = timm.create_model(name, img_size=image_size).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in reference.state_dict().items():
            value.copy_(random_tensor(key, value, generator))
    module = create_model(name, image_size=image_size)
    return reference, module, from_timm(name, module, reference.state_dict())


def random_images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def logits_and_gradients(module: Any, variables: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    """Logits, and the gradients of a cross-entropy by parameter path."""

    @jax.jit
    def f(params):
        def loss(params):
            logits = module.apply({"params": params}, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = f(variables["params"])
    return logits, flax.traverse_util.flatten_dict(gradients)


def relative_error(value: Any, wanted: Any) -> float:
    """Largest difference over the largest magnitude wanted."""
    value, wanted = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
    assert value.shape == wanted.shape
    return np.abs(value - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("name", "image_size"), [(name, 256) for name in SIZES] + [(TINY, size) for size in OTHER_SIZES])
def test_logits_are_timms(name, image_size):
    reference, module, variables = pair(name, image_size)
    assert (sum(value.size for value in jax.tree.leaves(variables)), len(reference.state_dict())) == SIZES[name]
    images = random_images(1, image_size)
    with torch.no_grad():
        wanted = reference(to_torch(images)).numpy()
    # About 1e-6 is float32 rounding; 1% on any one kind of parameter shows as 1e-3.
    assert relative_error(jax.jit(module.apply)(variables, images), wanted) < 1e-5


@pytest.fixture(scope="module")
def exact():
    """timm's model, its variables here, images, labels, and our logits and exact gradients."""
    # At 120 pixels every kind of window occurs, see OTHER_SIZES.
    reference, module, variables = pair(TINY, 120)
    images, labels = random_images(2, 120), np.array([3, 7])
    return reference, variables, images, labels, *logits_and_gradients(module, variables, images, labels)


def test_gradients_are_torchs(exact):
    reference, _, images, labels, _, gradients = exact
    torch.nn.functional.cross_entropy(reference(to_torch(images)), torch.from_numpy(labels)).backward()
    wanted = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    assert {timm_key(path) for path in gradients} == set(wanted)
    for path, value in gradients.items():
        # Float32 rounding reaches 6e-5, in the logit scales.
        assert relative_error(value, to_flax(wanted[timm_key(path)], path[-1])) < 1e-3, path


def test_every_function_kept_gives_the_exact_gradients(exact):
    _, variables, images, labels, wanted_logits, wanted = exact
    module = create_model(TINY, image_size=120, spec=lp_l1(15), layers="")
    logits, gradients = logits_and_gradients(module, variables, images, labels)
    assert relative_error(logits, wanted_logits) < 1e-5
    for path, value in gradients.items():
        # The fitted projection is the identity then: only rounding differs.
        assert relative_error(value, wanted[path]) < 1e-3, path


def test_low_rank_gradients_are_finite_and_the_logits_exact(exact):
    _, variables, images, labels, wanted_logits, wanted = exact
    module = create_model(TINY, image_size=120, spec=lp_l1(4), layers="")
    logits, gradients = logits_and_gradients(module, variables, images, labels)
    assert relative_error(logits, wanted_logits) < 1e-5
    for path, value in gradients.items():
        assert np.isfinite(value).all(), path
    first = ("layers_0", "blocks_0", "attn", "qkv", "kernel")
    assert relative_error(gradients[first], wanted[first]) > 1e-2
