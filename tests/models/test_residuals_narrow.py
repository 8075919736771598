"""What GPUs run as kernels, in 16 bits: under all transformations on CPUs, and by name in a program lowered for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_near
from transformations import TRANSFORMS, compiled_gradients, gradients

from lbpwht_jax import create_model, lp_l1
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.efficientformer import EfficientFormer
from lbpwht_jax.models.swin_v2 import SwinTransformerV2
from lbpwht_jax.ops.attention import packed_attention
from lbpwht_jax.ops.norms import layer_norm
from lbpwht_jax.ops.residuals import RESIDUALS


def normed_attention(x, scale, bias, kernel):
    """A norm and an attention, whose codes GPUs make in kernels."""
    x = layer_norm(x, scale, bias, 1e-6, 8, jnp.bfloat16)
    qkv = (x @ kernel.astype(x.dtype)).reshape(*x.shape[:2], 3, 2, 16)
    return packed_attention(qkv, RESIDUALS["lean"]).reshape(x.shape)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations(transform):
    rng = np.random.default_rng(0)
    parameters = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32,), (32,), (32, 96))]
    x, g = (jnp.asarray(rng.normal(size=(4, 6, 32)), jnp.bfloat16) for _ in range(2))

    operands = x, *parameters
    own = gradients(functools.partial(transform, normed_attention), operands, g)
    # bfloat16's 8 bits, rounded at other places
    assert_near(own, compiled_gradients(normed_attention, operands, g), 0.02)


def kernels(model, images):
    """The names of the kernels in a model's gradient, lowered for a GPU."""
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        return model.apply(variables, images).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss)).trace(variables, images).lower(lowering_platforms=("cuda",)).as_text()
    return set(re.findall(r'name = "([a-z_]+)_\d', re.sub(r'\bir = "[^"]*"', "", program)))


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_gets_the_kernels():
    model = create_model("vit_micro_patch4_28", num_classes=10, spec=lp_l1(4), residuals="lean", dtype=jnp.bfloat16)
    names = kernels(model, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
    assert {"walsh_gelu_coded", "walsh_slope_projected", "attention_forward", "attention_backward"} <= names
    assert {"layer_norm_forward", "layer_norm_backward"} <= names


# padded windows with and without a shift, and one smaller than the others; an attention on a map
WITH_BIASES = {
    "cosine": SwinTransformerV2(5, 20, window=4, dim=16, depths=(2, 1), heads=(1, 2)),
    "biased": EfficientFormer(5, 64, dims=(16, 16, 32, 32), depths=(1, 1, 1, 2), attention=1),
}


@pytest.mark.usefixtures("absent_gpu")
@pytest.mark.parametrize("kind", WITH_BIASES)
def test_attention_with_biases(kind):
    """A GPU gets its kernels; elsewhere the gradient is near that of the model that keeps everything."""
    plain, lean = (
        WITH_BIASES[kind].clone(settings=Settings(jnp.bfloat16, residuals=RESIDUALS[name])) for name in ("plain", "lean")
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, plain.image_size, plain.image_size, 3)), jnp.float32)

    def draw(path, like):
        around = 1 if path[-1].key in ("scale", "var") else 0
        return jnp.asarray(around + rng.normal(size=like.shape) * 0.5 / max(np.prod(like.shape[:-1]), 4) ** 0.5, like.dtype)

    with jax.numpy_dtype_promotion("standard"):  # JAX's attention promotes narrow dtypes
        assert {f"{kind}_attention_forward", f"{kind}_attention_backward"} <= kernels(lean, images)
        variables = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(plain.init, jax.random.key(0), images))
        params, others = variables.pop("params"), variables

        def gradient(model):
            def loss(params):
                logits = model.apply({"params": params, **others}, images).astype(jnp.float32)
                return jnp.sum(logits * jnp.arange(10.0).reshape(logits.shape))

            return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])

        found, wanted = gradient(lean), gradient(plain)
    # bfloat16's 8 bits, rounded at other places, and 255 levels
    assert 1 - found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) < 1e-3
