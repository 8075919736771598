"""LoRA beside PEFT's own: one layer on the same numbers, and adapter files read by the other."""

import copy
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import traverse_util
from timm.models.vision_transformer import VisionTransformer

from lbpwht_jax import Freeze, LoRA, adapt, create_model, lp_l1
from lbpwht_jax.weights import adapt_from, load_adapter, save_adapter
from lbpwht_jax.weights.timm_keys import from_timm
from parity.util import images_for, randomise, relative, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers' own, of being imported
    peft = pytest.importorskip("peft")

NAME = "vit_micro_patch4_28"


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 7)

    def forward(self, x):
        return self.fc(x)


def our_dropout(x, key, rate):
    """What our branch's dropout multiplies its input with, from a layer of zeros whose branch is the identity."""
    adapted = adapt(nn.Dense(6, use_bias=False), [LoRA("", rank=6, alpha=6, dropout=rate)], x)
    params = {"kernel": jnp.zeros((6, 6)), "lora_a": jnp.eye(6), "lora_b": jnp.eye(6)}
    return np.array(adapted.apply({"params": params}, jnp.ones_like(x), rngs={"dropout": key}))


class Times(torch.nn.Module):
    """Stands in for PEFT's dropout, which draws other numbers."""

    def __init__(self, factors):
        super().__init__()
        self.factors = torch.from_numpy(factors)

    def forward(self, x):
        return x * self.factors


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_one_layer(rate):
    rng = np.random.default_rng(0)
    x, w, bias, a, b, g = (
        rng.standard_normal(size, np.float32) for size in [(2, 9, 6), (6, 7), (7,), (6, 3), (3, 7), (2, 9, 7)]
    )
    theirs = peft.get_peft_model(Layer(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc"]))
    layer, key = theirs.base_model.model.fc, jax.random.key(2)
    if rate:
        layer.lora_dropout["default"] = Times(our_dropout(jnp.asarray(x), key, rate))
    tensors = {"base": layer.base_layer.weight, "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    with torch.no_grad():
        for tensor, value in zip(tensors.values(), (w, a, b), strict=True):
            tensor.copy_(torch.from_numpy(value.T.copy()))
        layer.base_layer.bias.copy_(torch.from_numpy(bias))
    inputs = torch.from_numpy(x).requires_grad_()
    y = theirs(inputs)
    y.backward(torch.from_numpy(g))

    adapted = adapt(nn.Dense(7), [LoRA("^$", rank=3, alpha=5, dropout=rate)], jnp.asarray(x))
    params = {"kernel": jnp.asarray(w), "bias": jnp.asarray(bias), "lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
    ours, pullback = jax.vjp(lambda p, x: adapted.apply({"params": p}, x, rngs={"dropout": key}), params, jnp.asarray(x))
    grads, dx = pullback(jnp.asarray(g))
    # float32 rounding of sums over at most 18 terms
    assert relative(ours, y.detach().numpy()) < 1e-5
    assert relative(dx, inputs.grad.numpy()) < 1e-5
    assert relative(grads["lora_a"], tensors["a"].grad.numpy().T) < 1e-5
    assert relative(grads["lora_b"], tensors["b"].grad.numpy().T) < 1e-5
    assert layer.base_layer.weight.grad is None and not grads["kernel"].any() and not grads["bias"].any()
    layer.merge()
    merged = adapted.merge({"params": params})["params"]["kernel"]
    assert relative(merged, layer.base_layer.weight.detach().numpy().T) < 1e-6


def pair():
    """timm's model and ours under rules, with the same random variables, and images."""
    theirs = randomise(VisionTransformer(28, 4, 1, num_classes=10, embed_dim=96, depth=6, num_heads=4))
    model = create_model(NAME, num_classes=10)
    images = images_for(NAME, 28)
    adapted = adapt(model, [LoRA("attn/(qkv|proj)|fc1", rank=4, fused="qkv", dropout=0.1), Freeze("^(?!head)")], images)
    return theirs, adapted, from_timm(NAME, model, state_of(theirs)), images


def outputs(theirs, adapted, variables, images):
    with torch.no_grad():
        reference = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    return adapted.apply(variables, images), reference


def test_peft_reads_our_adapter(tmp_path):
    theirs, adapted, variables, images = pair()
    trained = traverse_util.flatten_dict(adapted.with_branches(jax.random.key(1), variables), sep="/")
    for i, path in enumerate(path for path in trained if "/lora_" in path or path.startswith("params/head/")):
        trained[path] = 0.1 * jax.random.normal(jax.random.key(i), trained[path].shape)
    trained = traverse_util.unflatten_dict(trained, sep="/")
    save_adapter(tmp_path, adapted, trained, NAME)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    ours, reference = outputs(loaded, adapted, trained, images)
    assert relative(ours, reference) < 2e-5
    assert loaded.peft_config["default"].lora_dropout == 0.1
    # the adapter matters
    assert relative(adapted.module.apply(variables, images), reference) > 0.1


def test_peft_ignores_our_low_rank_rules(tmp_path):
    theirs, _, variables, images = pair()
    adapted = adapt(create_model(NAME, num_classes=10), [LoRA("qkv", rank=4, spec=lp_l1(4)), Freeze(".")], images)
    save_adapter(tmp_path, adapted, adapted.with_branches(jax.random.key(1), variables), NAME)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['lbpwht_jax'\]"):
        peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert adapt_from(tmp_path, adapted.module, images)[0] == adapted


CONFIG = {"r": 4, "lora_alpha": 8, "modules_to_save": ["head"], "init_lora_weights": False}


def save_theirs(theirs, folder, **fields):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**{**CONFIG, **fields}))
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["qkv", "attn.proj"], "rank_pattern": {"qkv": 12}, "alpha_pattern": {r"blocks\.\d+\.attn\.qkv": 24}},
        {"target_modules": r"blocks\.[13]\.mlp\.fc[12]|head", "use_rslora": True, "modules_to_save": None},
        {"target_modules": ["patch_embed.proj", "fc2"]},
        {"target_modules": "all-linear", "exclude_modules": ["head"], "lora_alpha": 3},
    ],
)
def test_we_adapt_as_peft_s_folder_says(tmp_path, fields):
    theirs, _, variables, images = pair()
    wrapped = save_theirs(theirs, tmp_path, **fields)
    adapted, loaded = adapt_from(tmp_path, create_model(NAME, num_classes=10), images, variables=variables)
    ours, reference = outputs(wrapped, adapted, loaded, images)
    assert relative(ours, reference) < 2e-5
    assert relative(adapted.module.apply(variables, images), reference) > 0.05
    trained, total = wrapped.get_nb_trainable_parameters()
    # PEFT keeps the head twice where it trains a copy of it
    head = 970 if wrapped.peft_config["default"].modules_to_save else 0
    assert adapted.trainable_parameters() == (trained, total - head)


def test_we_read_peft_s_adapter(tmp_path):
    theirs, adapted, variables, images = pair()
    targets = ["qkv", "attn.proj", "fc1"]
    wrapped = save_theirs(theirs, tmp_path, target_modules=targets, rank_pattern={"qkv": 12}, alpha_pattern={"qkv": 24})
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 6 * 3 * 2 + 2
    ours, reference = outputs(wrapped, adapted, load_adapter(tmp_path, adapted, variables, NAME), images)
    assert relative(ours, reference) < 2e-5
    assert relative(adapted.module.apply(variables, images), reference) > 0.1
