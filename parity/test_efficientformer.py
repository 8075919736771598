"""Both EfficientFormer families against timm: logits and gradients from the same weights, none of them trivial."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from lbpwht_jax import lp_l1, lp_linf
from lbpwht_jax.models import create_model, model_info
from lbpwht_jax.models.blocks import Plan

_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402  (after the operators that its import of torchvision looks for)
from timm.models.efficientformer import Attention  # noqa: E402

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def randomise(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Draws every tensor of a timm model so that none is trivial; running statistics become those of the images."""
    rng = np.random.default_rng(0)

    def uniform(low, high, shape):
        return torch.from_numpy(rng.uniform(low, high, tuple(shape)).astype(np.float32))

    for key, tensor in model.named_parameters():
        if key.endswith("talking_head2.bias"):  # counts once a key
            tensor.copy_(uniform(-0.01, 0.01, tensor.shape))
        elif key.endswith(("attention_biases", "bias")):
            tensor.copy_(uniform(-1, 1, tensor.shape))
        elif tensor.ndim == 1:  # layer scale and the factors of norms
            tensor.copy_(uniform(0.5, 1.5, tensor.shape))
        else:
            bound = (3 / np.prod(tensor.shape[1:])) ** 0.5
            tensor.copy_(uniform(-bound, bound, tensor.shape))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    model.train()
    model(images)
    model.eval()


def from_timm(name: str, module, state_dict) -> dict:
    """Variables of ``module`` from a timm state dict of model ``name``; every entry must be used."""
    info = model_info(name)
    images = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), jnp.float32)
    target = jax.eval_shape(module.init, jax.random.key(0), images)
    arrays = {key: value.numpy() for key, value in state_dict.items() if not re.search(info.buffers, key)}
    variables = {}
    for path, leaf in flatten_dict(target).items():
        array = arrays.pop(timm_key(path[1:]))
        if path[-1] == "kernel":
            if re.search(info.pointwise, "/".join(path)):
                array = array[:, :, 0, 0]
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        assert array.shape == leaf.shape, path
        variables[path] = jnp.asarray(array)
    assert not arrays, sorted(arrays)
    return unflatten_dict(variables)


def timm_key(path: tuple[str, ...]) -> str:
    names = [re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
    return ".".join([*names, _LEAVES.get(path[-1], path[-1])])


def pair(name: str, image_size: int = 224, **arguments):
    """A timm model in evaluation mode, ours, its variables, and a batch of images, all from the same weights."""
    reference = timm.create_model(name, num_classes=10, img_size=image_size)
    if name.startswith("efficientformer_") and image_size != 224:
        # timm builds this family for 224 pixels only; its attention takes the size of its map, here of the other image.
        for block in reference.stages[-1].blocks:
            if hasattr(block, "token_mixer") and hasattr(block.token_mixer, "qkv"):
                block.token_mixer = Attention(block.token_mixer.qkv.in_features, resolution=-(-image_size // 32))
    images = np.random.default_rng(1).normal(size=(4, image_size, image_size, 3)).astype(np.float32)
    with torch.no_grad():
        randomise(reference, nchw(images))
    module = create_model(name, num_classes=10, image_size=image_size, **arguments)
    variables = from_timm(name, module, reference.state_dict())
    return reference, module, variables, images[:2]


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def relative_error(actual, expected) -> float:
    return float(np.max(np.abs(np.asarray(actual) - np.asarray(expected))) / np.max(np.abs(np.asarray(expected))))


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("efficientformer_l1", 224),
        ("efficientformer_l1", 256),
        ("efficientformer_l3", 224),
        ("efficientformer_l7", 224),
        ("efficientformerv2_s0", 224),
        ("efficientformerv2_s0", 216),
        ("efficientformerv2_s1", 224),
        ("efficientformerv2_s2", 224),
        ("efficientformerv2_s2", 256),
        ("efficientformerv2_l", 224),
    ],
)
def test_logits_are_timms(name, image_size):
    reference, module, variables, images = pair(name, image_size)
    with torch.no_grad():
        expected = reference(nchw(images)).numpy()
    assert 0.1 < np.std(expected) < 3
    actual = jax.jit(module.apply)(variables, images)
    error = relative_error(actual, expected)
    print(f"{name} at {image_size}: relative difference of logits {error:.1e}, their deviation {np.std(expected):.2f}")
    # float32 rounding through up to 150 layers; measured below 6e-6.
    assert error < 5e-5


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformer_l7", "efficientformerv2_s0"])
def test_buffers_are_timms(name):
    info, module = model_info(name), create_model(name)
    expected = {k: v.numpy() for k, v in timm.create_model(name).state_dict().items() if re.search(info.buffers, k)}
    actual = info.make_buffers(module)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_array_equal(actual[key], value)


def loss_and_gradients(module, variables, images):
    """Cross-entropy of classes 0 and 1 for the two images, and its gradient, training with frozen statistics."""

    @jax.jit
    def value_and_grad(params):
        def loss(params):
            logits = module.apply({**variables, "params": params}, images, train=True)
            return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))

        return jax.value_and_grad(loss)(params)

    loss, gradients = value_and_grad(variables["params"])
    return loss, flatten_dict(gradients)


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_gradients_are_timms_and_those_of_full_rank(name):
    reference, module, variables, images = pair(name, frozen_batch_norm=True)
    expected_loss = torch.nn.functional.cross_entropy(reference(nchw(images)), torch.tensor([0, 1]))
    expected_loss.backward()
    expected = from_timm_gradients(name, reference, module)
    loss, gradients = loss_and_gradients(module, variables, images)
    assert abs(float(loss) - expected_loss.item()) < 1e-5
    compare(gradients, expected, "timm")

    full = module.clone(plan=Plan(lp_linf(8), ""))
    full_loss, full_gradients = loss_and_gradients(full, variables, images)
    np.testing.assert_allclose(full_loss, loss, rtol=1e-6)
    compare(full_gradients, gradients, "full rank")

    low = module.clone(plan=Plan(lp_l1(4), ""))
    low_loss, low_gradients = loss_and_gradients(low, variables, images)
    np.testing.assert_allclose(low_loss, loss, rtol=1e-6)
    assert all(np.all(np.isfinite(gradient)) for gradient in low_gradients.values())


def from_timm_gradients(name, reference, module):
    state = {key: torch.zeros(value.shape) for key, value in reference.state_dict().items()}
    state |= {key: parameter.grad for key, parameter in reference.named_parameters()}
    return flatten_dict(from_timm(name, module, state)["params"])


def compare(actual, expected, against):
    """Every gradient within 1e-3 of the largest entry of its tensor.

    Biases that add the same to a query's every logit, and so nothing to its softmax, have a gradient of zero, of which
    rounding leaves up to a millionth of the others.
    """
    largest = max(np.max(np.abs(gradient)) for gradient in expected.values())
    errors = {}
    for path, gradient in expected.items():
        if re.search(r"/k/(conv|bn)/bias$|talking_head1/bias$", "/".join(path)):
            assert np.max(np.abs(gradient)) < 1e-6 * largest, path
            assert np.max(np.abs(actual[path])) < 1e-6 * largest, path
        else:
            errors[path] = relative_error(actual[path], gradient)
    worst = max(errors, key=errors.get)
    print(f"against {against}: {len(errors)} gradients, worst relative difference {errors[worst]:.1e} ({'/'.join(worst)})")
    assert actual.keys() == expected.keys()
    assert errors[worst] < 1e-3, errors
