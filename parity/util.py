"""Compares a model with timm's: logits, gradients, the way there and back, and low-rank backprop at full rank."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import traverse_util

from lbpwht_jax import create_model, lp_l1
from lbpwht_jax.models import model_info
from lbpwht_jax.weights.timm_keys import entries, from_timm, to_timm

LOGITS = 2e-5  # float32 rounding leaves about 1e-6; the tanh form of GELU, say, is 2e-4 off in vit_tiny_patch16_224
GRADIENTS = 1e-3
CLASSES = 10


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every tensor of a model at random, none at its initial value, so that activations stay of order one; eval mode.

    Buffers that a model computes (running statistics apart) stay: SwinV2's and DINOv3's biases of keys are zeros for good.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in [*parameters.items(), *model.named_buffers()]:
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "running_var":
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif leaf == "weight" and tensor.ndim > 1:
                tensor.copy_(normal(tensor.shape) / math.sqrt(math.prod(tensor.shape[1:])))
            elif leaf == "weight" or leaf.startswith("gamma"):
                tensor.copy_((0.3 if leaf != "weight" else 1.0) * (1 + 0.2 * normal(tensor.shape)))
            elif name in parameters or leaf == "running_mean":
                tensor.add_(0.3 * normal(tensor.shape))
    return model.eval()


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict, as NumPy arrays."""
    return {key: value.numpy() for key, value in model.state_dict().items()}


def images_for(name: str, image_size: int, batch: int = 2) -> np.ndarray:
    """Random images, ``[batch, image_size, image_size, channels]``."""
    shape = (batch, image_size, image_size, model_info(name).images.channels)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest reference value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}")
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def check_logits(name: str, reference: torch.nn.Module, image_size: int | None = None) -> None:
    """Compares the evaluation's logits with those of ``reference``, a timm model with ``CLASSES`` classes."""
    module = create_model(name, num_classes=CLASSES, image_size=image_size)
    variables = from_timm(name, module, state_of(reference))
    images = images_for(name, module.image_size)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert relative(jax.jit(module.apply)(variables, images), theirs) < LOGITS


def loss_and_gradients(module: Any, variables: Mapping[str, Any], images: np.ndarray, labels: np.ndarray):
    """Logits and the gradients, by path, of the mean cross-entropy on frozen statistics."""
    statistics = {key: value for key, value in variables.items() if key != "params"}

    def loss(params):
        logits = module.apply({"params": params, **statistics}, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return logits, gradients


def check_gradients(name: str, reference: torch.nn.Module, image_size: int | None = None, zero: str = "(?!)") -> None:
    """Compares the gradients of every parameter, on frozen statistics.

    Args:
      name: of the model.
      reference: timm's, with ``CLASSES`` classes.
      image_size: in pixels; by default the model's.
      zero: regular expression of the parameters whose gradient is mathematically zero, of which rounding leaves up to a
        millionth of the largest gradient.
    """
    module = create_model(name, num_classes=CLASSES, image_size=image_size, frozen_batch_norm=True)
    variables = from_timm(name, module, state_of(reference))
    images, labels = images_for(name, module.image_size), np.array([1, 3])
    _, ours = loss_and_gradients(module, variables, images, labels)
    logits = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    theirs = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    assert {entry.key for entry in entries(name, module) if entry.path[0] == "params"} == theirs.keys()
    wanted = from_timm(name, module, {**state_of(reference), **theirs})["params"]
    _compare_gradients(ours, wanted, zero)


def _compare_gradients(ours: Any, wanted: Any, zero: str) -> None:
    flat = {"/".join(path): value for path, value in traverse_util.flatten_dict(ours).items()}
    wanted = {"/".join(path): value for path, value in traverse_util.flatten_dict(wanted).items()}
    assert flat.keys() == wanted.keys()
    rounding = 1e-6 * max(float(np.max(np.abs(value))) for value in wanted.values())
    vanishing = {path for path in wanted if re.search(zero, path)}
    assert not [path for path in vanishing if max(np.max(np.abs(g[path])) for g in (flat, wanted)) > rounding]
    errors = {path: relative(flat[path], value) for path, value in wanted.items() if path not in vanishing}
    assert not {path: error for path, error in errors.items() if error > GRADIENTS}


def check_round_trip(name: str, reference: torch.nn.Module, image_size: int | None = None) -> None:
    """timm to here to timm: the same bits, and all that ``strict=True`` wants."""
    module = create_model(name, num_classes=CLASSES, image_size=image_size)
    before = state_of(reference)
    after = to_timm(name, module, from_timm(name, module, before))
    for key in after.keys() & before.keys():
        if np.issubdtype(before[key].dtype, np.floating):
            np.testing.assert_array_equal(after[key], before[key], err_msg=key, strict=True)
    reference.load_state_dict({key: torch.from_numpy(value) for key, value in after.items()}, strict=True)


def check_low_rank(name: str, reference: torch.nn.Module, image_size: int | None = None, zero: str = "(?!)") -> None:
    """All Walsh functions on every layer give the exact gradients; some of them, finite ones; all the same logits."""
    options = {"num_classes": CLASSES, "image_size": image_size, "frozen_batch_norm": True}
    dense = create_model(name, **options)
    variables = from_timm(name, dense, state_of(reference))
    images, labels = images_for(name, dense.image_size), np.array([1, 3])
    logits, exact = loss_and_gradients(dense, variables, images, labels)
    for r in (15, 4):
        module = create_model(name, **options, spec=lp_l1(r), layers="")
        ours, gradients = loss_and_gradients(module, variables, images, labels)
        # the compiler may fuse the forward pass in another way beside another backward pass
        assert relative(ours, logits) < LOGITS
        if r == 15:
            _compare_gradients(gradients, exact, zero)
        else:
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
            assert any(relative(a, b) > 1e-2 for a, b in zip(*map(jax.tree.leaves, (gradients, exact)), strict=True))
