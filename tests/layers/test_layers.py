import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from closeness import assert_close
from flax import nnx

import lbpwht_jax
from lbpwht_jax import LowRankDense, LowRankLinear, lp_l1, lp_linf

GRID, PREFIX = (3, 5), 1
FULL, LOW = lp_linf(8), lp_l1(2)


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense_with(spec, **fields):
    return nn.Dense(6, dot_general=spec.dot_general(grid=GRID, prefix_tokens=PREFIX), **fields)


def heads_with(spec, **fields):
    return nn.DenseGeneral((2, 3), dot_general=spec.dot_general(grid=GRID, prefix_tokens=PREFIX), **fields)


def attention_with(spec):
    dot_general = spec.dot_general(grid=GRID, prefix_tokens=PREFIX)
    return nn.MultiHeadDotProductAttention(2, qkv_dot_general=dot_general, out_dot_general=dot_general)


class InstanceOfAttention(nn.Module):
    attention: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.attention(x, x)


# Every way into a Linen model: the low-rank layer by its spec, the layer it stands for, the shape of the input.
TOKENS, MAP = (2, PREFIX + 15, 4), (2, 5, 7, 4)
LINEN = {
    "LowRankDense": (lambda s: LowRankDense(6, spec=s, grid=GRID, prefix_tokens=PREFIX), lambda: nn.Dense(6), TOKENS),
    "LowRankDense-map": (lambda s: LowRankDense(6, spec=s), lambda: nn.Dense(6), MAP),
    "LowRankDense-no-bias": (
        lambda s: LowRankDense(6, spec=s, grid=GRID, prefix_tokens=PREFIX, use_bias=False),
        lambda: nn.Dense(6, use_bias=False),
        TOKENS,
    ),
    "Dense": (dense_with, lambda: nn.Dense(6), TOKENS),
    "DenseGeneral": (heads_with, lambda: nn.DenseGeneral((2, 3)), TOKENS),
    "attention": (
        lambda s: InstanceOfAttention(attention_with(s)),
        lambda: InstanceOfAttention(nn.MultiHeadDotProductAttention(2)),
        TOKENS,
    ),
    "Conv": (
        lambda s: nn.Conv(6, (1, 1), conv_general_dilated=s.conv_general_dilated()),
        lambda: nn.Conv(6, (1, 1)),
        MAP,
    ),
}


def assert_kernels_differ(low, exact):
    """The low-rank backward pass really ran: every kernel's gradient differs from the exact one."""
    kernels = [
        (gradient, wanted)
        for (path, gradient), wanted in zip(jax.tree.leaves_with_path(low), jax.tree.leaves(exact), strict=True)
        if path[-1].key == "kernel"
    ]
    assert kernels and all(float(jnp.abs(a - b).max()) > 1e-2 * float(jnp.abs(b).max()) for a, b in kernels)


@pytest.mark.parametrize("layer", LINEN)
def test_linen_layers_against_the_dense_ones(layer):
    make, make_dense, shape = LINEN[layer]
    x, dense = random(*shape), make_dense()
    variables = jax.jit(dense.init)(jax.random.key(0), x)
    g = random(*jax.eval_shape(dense.apply, variables, x).shape, seed=1)

    @jax.jit
    def run(variables, x, g):
        results = []
        for module in (dense, make(FULL), make(LOW)):
            y, pullback = jax.vjp(module.apply, variables, x)
            results.append((y, *pullback(g)))
        return results

    chex.assert_trees_all_equal_shapes(jax.eval_shape(make(LOW).init, jax.random.key(0), x), variables)
    exact, full, low = run(variables, x, g)
    # a 1x1 convolution sums in another order than a product
    chex.assert_trees_all_close(low[0], exact[0], atol=1e-6 if layer == "Conv" else 0, rtol=0)
    # float32 transforms there and back, of sums of up to 70 terms
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exact))
    chex.assert_trees_all_close(full, exact, atol=1e-6 * scale, rtol=1e-5)
    assert_kernels_differ(low[1], exact[1])


class EveryWay(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.parameters("LowRankDense", "Dense", "Conv")
    def test_linen_gradients(self, layer):
        make, make_dense, shape = LINEN[layer]
        x = random(*shape)
        variables = make_dense().init(jax.random.key(0), x)

        def gradients(module):
            # a weighted sum: the bias's gradient is as large as the kernel's
            def loss(variables, x):
                return jnp.sum(module.apply(variables, x) * jnp.cos(jnp.arange(6.0)).reshape((1,) * (x.ndim - 1) + (-1,)))

            return self.variant(jax.grad(loss, (0, 1)), n_devices=2)(variables, x)

        # float32 transforms there and back
        chex.assert_trees_all_close(gradients(make(FULL)), gradients(make_dense()), rtol=1e-5, atol=1e-5)


def test_the_fresh_parameters_are_those_of_dense():
    x = random(*TOKENS)
    arguments = {"kernel_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()}
    ours = LowRankDense(6, spec=LOW, grid=GRID, prefix_tokens=PREFIX, **arguments).init(jax.random.key(3), x)
    theirs = nn.Dense(6, **arguments).init(jax.random.key(3), x)
    chex.assert_trees_all_equal(ours, theirs)


def test_without_a_spec_it_is_dense():
    x = random(*TOKENS)
    variables = nn.Dense(6).init(jax.random.key(0), x)
    ours, theirs = (jax.grad(lambda v, m=m: m.apply(v, x).sum())(variables) for m in (LowRankDense(6, spec=None), nn.Dense(6)))
    assert_close(ours, theirs, 1e-6)  # the kernel's gradient is summed in another order


@pytest.mark.parametrize("trains", ["kernel", "inputs", "bias", "all"])
def test_without_a_spec_it_keeps_what_dense_keeps(trains):
    x = random(*TOKENS)
    params = nn.Dense(6).init(jax.random.key(0), x)["params"]
    given = {**params, "inputs": x}
    chosen = list(given) if trains == "all" else [trains]

    def kept(module):
        def call(trained):
            values = {**given, **trained}
            return module.apply({"params": {name: values[name] for name in params}}, values["inputs"])

        pullback = jax.eval_shape(lambda trained: jax.vjp(call, trained)[1], {name: given[name] for name in chosen})
        return sorted(leaf.shape for leaf in jax.tree.leaves(pullback))

    assert kept(LowRankDense(6, spec=None)) == kept(nn.Dense(6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_dtype_with_float32_parameters(dtype):
    layer = LowRankDense(6, spec=LOW, grid=GRID, prefix_tokens=PREFIX, dtype=dtype)
    x = random(*TOKENS)
    variables = layer.init(jax.random.key(0), x)
    chex.assert_type(jax.eval_shape(layer.apply, variables, x), dtype)
    gradients = jax.jit(jax.grad(lambda v, x: layer.apply(v, x).astype(jnp.float32).sum(), (0, 1)))(variables, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, (variables, x))
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    chex.assert_tree_all_finite(gradients)


def test_rematerialised_and_scanned_layers():
    class Stack(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, x):
            layer = LowRankDense
            if self.kind == "remat":
                layer = nn.remat(LowRankDense)
            if self.kind == "scan":

                def body(module, x, _):
                    return module(x), None

                scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
                return scanned(LowRankDense(4, spec=LOW, grid=GRID, prefix_tokens=PREFIX, name="layer"), x, None)[0]
            for i in range(2):
                x = layer(4, spec=LOW, grid=GRID, prefix_tokens=PREFIX, name=f"layer_{i}")(x)
            return x

    x = random(*TOKENS)
    plain = Stack("plain")
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]
    stacked = {"layer": jax.tree.map(lambda *leaves: jnp.stack(leaves), params["layer_0"], params["layer_1"])}

    def gradient(kind, params):
        return jax.jit(jax.grad(lambda p: (Stack(kind).apply({"params": p}, x) ** 2).sum()))(params)

    expected = gradient("plain", params)
    remat, scan = gradient("remat", params), gradient("scan", stacked)["layer"]
    # float32 sums of 32 terms, in any order
    chex.assert_trees_all_close(remat, expected, rtol=1e-5, atol=1e-5)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), expected["layer_0"], expected["layer_1"])
    chex.assert_trees_all_close(scan, both, rtol=1e-5, atol=1e-5)


NNX = {
    "LowRankLinear": (
        lambda s, rngs: LowRankLinear(4, 6, spec=s, grid=GRID, prefix_tokens=PREFIX, rngs=rngs),
        lambda rngs: nnx.Linear(4, 6, rngs=rngs),
        TOKENS,
    ),
    "LowRankLinear-map": (
        lambda s, rngs: LowRankLinear(4, 6, spec=s, rngs=rngs),
        lambda rngs: nnx.Linear(4, 6, rngs=rngs),
        MAP,
    ),
    "Linear": (
        lambda s, rngs: nnx.Linear(4, 6, dot_general=s.dot_general(grid=GRID, prefix_tokens=PREFIX), rngs=rngs),
        lambda rngs: nnx.Linear(4, 6, rngs=rngs),
        TOKENS,
    ),
    "Linear-preferred": (
        lambda s, rngs: nnx.Linear(
            4, 6, dot_general=s.dot_general(grid=GRID, prefix_tokens=PREFIX), preferred_element_type=jnp.float32, rngs=rngs
        ),
        lambda rngs: nnx.Linear(4, 6, rngs=rngs),
        TOKENS,
    ),
    "Conv": (
        lambda s, rngs: nnx.Conv(4, 6, (1, 1), conv_general_dilated=s.conv_general_dilated(), rngs=rngs),
        lambda rngs: nnx.Conv(4, 6, (1, 1), rngs=rngs),
        MAP,
    ),
}


@pytest.mark.parametrize("layer", NNX)
def test_nnx_layers_against_the_dense_ones(layer):
    make, make_dense, shape = NNX[layer]
    x = random(*shape)
    y = make_dense(nnx.Rngs(0))(x)
    g = random(*y.shape, seed=1)

    @nnx.jit
    def gradients(module):
        return nnx.grad(lambda module: (module(x) * g).sum())(module)

    chex.assert_trees_all_close(make(LOW, nnx.Rngs(0))(x), y, atol=1e-6 if layer == "Conv" else 0, rtol=0)
    exact, full, low = (
        nnx.to_pure_dict(gradients(module))
        for module in (make_dense(nnx.Rngs(0)), make(FULL, nnx.Rngs(0)), make(LOW, nnx.Rngs(0)))
    )
    # float32 transforms there and back, of sums of up to 70 terms
    chex.assert_trees_all_close(full, exact, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(low["kernel"] - exact["kernel"]).max()) > 1e-2


def test_errors_name_the_module():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LowRankDense(6, grid=(4, 4), name="fc1")(x)

    with pytest.raises(ValueError, match=r"^LowRankDense fc1: grid \(4, 4\) with 0 prefix tokens makes 16 tokens"):
        Model().init(jax.random.key(0), jnp.zeros((2, 15, 4)))
    with pytest.raises(ValueError, match=r"^blocks/3/fc1: grid \(4, 4\)"):
        nn.Dense(6, dot_general=LOW.dot_general(grid=(4, 4), name="blocks/3/fc1")).init(
            jax.random.key(0), jnp.zeros((2, 15, 4))
        )
    with pytest.raises(ValueError, match=r"^LowRankLinear\(4, 6\): the grid is missing"):
        LowRankLinear(4, 6, rngs=nnx.Rngs(0))(jnp.zeros((2, 15, 4)))
    for spec in (lp_l1(2), None):
        with pytest.raises(ValueError, match=r"^LowRankDense \(top level\): the inputs must be .* got a scalar"):
            LowRankDense(3, spec=spec).init(jax.random.key(0), 1.0)
    with pytest.raises(TypeError, match="dot_general is what the layer sets itself"):
        LowRankLinear(4, 6, rngs=nnx.Rngs(0), dot_general=jax.lax.dot_general)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"kernel_size": (3, 3)}, MAP, r"1x1 convolutions only.*\[2, 5, 7, 4\].*lacks a window of 1\."),
        ({"kernel_size": (1, 1), "strides": 2}, MAP, r"lacks a stride of 1\. Leave this layer dense"),
        ({"kernel_size": (1, 1), "feature_group_count": 2}, MAP, r"lacks no groups"),
        ({"kernel_size": (1, 1), "padding": 1}, MAP, r"lacks no padding"),
        ({"kernel_size": (1, 1), "input_dilation": 2}, MAP, r"lacks no dilation"),
    ],
)
def test_convolutions_that_are_no_dense_layers(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        nn.Conv(6, conv_general_dilated=LOW.conv_general_dilated(), **fields).init(jax.random.key(0), jnp.zeros(shape))


def test_products_that_are_no_dense_layers():
    dot_general = LOW.dot_general(grid=GRID)
    with pytest.raises(ValueError, match=r"over the last dimensions of the input.*\[2, 15, 4\].*Leave this layer dense"):
        dot_general(jnp.zeros((2, 15, 4)), jnp.zeros((15, 6)), (((1,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="over the last dimensions of the input"):
        dot_general(jnp.zeros((2, 15, 4)), jnp.zeros((2, 4, 6)), (((2,), (1,)), ((0,), (0,))))


def test_public_names():
    assert all(hasattr(lbpwht_jax, name) for name in lbpwht_jax.__all__)
