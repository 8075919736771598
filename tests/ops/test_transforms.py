"""The operation under JAX's transformations, each against the slow reference."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operation import VARIANTS, assert_close, jitted, sample, slow_result, value_and_gradients

from lbpwht_jax import low_rank_matmul, lp_l1
from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.exact import exact_matmul
from lbpwht_jax.ops.projection import projection_matrices

# float32 sums of up to 8 x 672 terms, in any order
TOLERANCE = 2e-6


class EveryVariant(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.parameters(*VARIANTS)
    def test_equals_the_slow_reference(self, variant):
        operation, x, kernel, g = sample(variant)
        # two devices show what pmap does; more only compile longer
        run = self.variant(functools.partial(value_and_gradients, operation), n_devices=2)
        assert_close(run(x, kernel, g), slow_result(variant), TOLERANCE)


def rematerialised(operation, x, kernel, g):
    return jitted(jax.checkpoint(operation), x, kernel, g)


def rematerialised_but_products(operation, x, kernel, g):
    return jitted(jax.checkpoint(operation, policy=jax.checkpoint_policies.dots_saveable), x, kernel, g)


def split_batch(x):
    """The first batch axis in two, leaving a batch axis inside."""
    return x.reshape(4, x.shape[0] // 4, *x.shape[1:])


def vmapped(operation, x, kernel, g):
    parts = jax.jit(jax.vmap(functools.partial(value_and_gradients, operation), (0, None, 0)))
    y, dx, dw = parts(split_batch(x), kernel, split_batch(g))
    return y.reshape(g.shape), dx.reshape(x.shape), dw.sum(0)


def differentiated_vmap(operation, x, kernel, g):
    def mapped(x, kernel):
        return jax.vmap(operation, (0, None))(split_batch(x), kernel).reshape(g.shape)

    return jitted(mapped, x, kernel, g)


def scanned(operation, x, kernel, g):
    def mapped(x, kernel):
        return jax.lax.scan(lambda _, part: (None, operation(part, kernel)), None, split_batch(x))[1].reshape(g.shape)

    return jitted(mapped, x, kernel, g)


def pmapped(operation, x, kernel, g):
    parts = functools.partial(value_and_gradients, operation)
    y, dx, dw = jax.pmap(parts, in_axes=(0, None, 0), devices=jax.devices()[:4])(split_batch(x), kernel, split_batch(g))
    return y.reshape(g.shape), dx.reshape(x.shape), dw.sum(0)


def mesh(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


def shard_mapped(operation, x, kernel, g):
    specs = (P("data"), P(), P("data"))
    local = functools.partial(value_and_gradients, operation)
    mapped = jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=(P("data"), P("data"), P()))
    return jax.jit(mapped)(x, kernel, g)


def sharded(kind, operation, x, kernel, g):
    devices = mesh(kind)
    with jax.set_mesh(devices):
        x, g = (jax.device_put(a, NamedSharding(devices, P("data"))) for a in (x, g))
        kernel = jax.device_put(kernel, NamedSharding(devices, P()))
        y, dx, dw = jitted(operation, x, kernel, g)
        chex.assert_tree_is_sharded((y, dx), devices=devices.devices.flat)
        assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert dw.sharding.is_fully_replicated
        return tuple(np.asarray(a) for a in (y, dx, dw))


TRANSFORMS = {
    "checkpoint": rematerialised,
    "checkpoint-dots": rematerialised_but_products,
    "vmap": vmapped,
    "grad-of-vmap": differentiated_vmap,
    "scan": scanned,
    "pmap": pmapped,
    "shard_map": shard_mapped,
    "sharded-auto": functools.partial(sharded, AxisType.Auto),
    "sharded-explicit": functools.partial(sharded, AxisType.Explicit),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_the_slow_reference(transform, variant):
    operation, x, kernel, g = sample(variant)
    assert_close(TRANSFORMS[transform](operation, x, kernel, g), slow_result(variant), TOLERANCE)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_exact_product_does_too(transform):
    _, *operands = sample("both-exact")
    assert_close(TRANSFORMS[transform](exact_matmul, *operands), slow_result("both-exact"), TOLERANCE)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounded_inputs_err_by_half_a_step_at_most(variant, bits):
    """So does the kernel's cotangent, which is linear in what is kept; result and dx do not change."""
    spec, grid, prefix, _ = VARIANTS[variant]
    operation, *operands = sample(variant, channels=(24, 16))
    rounded = functools.partial(operation, input_bits=bits)
    y, dx, dw = jitted(rounded, *operands)
    plain_y, plain_dx, plain_dw = jitted(operation, *operands)
    assert_close((y, dx), (plain_y, plain_dx), 1e-6)
    analysis = projection_matrices(spec, grid, prefix)[0] if spec.dw == "low_rank" else np.eye(prefix + math.prod(grid))
    x, _, g = (np.asarray(a, np.float64).reshape(len(a), -1, a.shape[-1]) for a in operands)
    kept, of_result = (np.einsum("rt,btc->brc", analysis, a) for a in (x, g))
    steps = np.abs(kept).max(-1) / (2 ** (bits - 1) - 1)
    most = np.einsum("br,brc->c", steps / 2, np.abs(of_result))
    error = np.abs(np.asarray(dw - plain_dw))
    assert (error <= 1.001 * most + 1e-5 * np.abs(plain_dw).max()).all()
    assert error.max() > 1e-3 * most.max()
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.vjp(rounded, *operands[:2])[1]) if leaf.dtype == jnp.float32]
    assert max(sizes) < kept.size


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("variant", ["prefix", "both-exact"])
def test_rounded_inputs_under_transformations(transform, variant):
    """Coefficients summed in another order may round to the neighbouring code: a few in thousands do."""
    operation, *operands = sample(variant, channels=(24, 16))
    rounded = functools.partial(operation, input_bits=8)
    assert_close(TRANSFORMS[transform](rounded, *operands), jitted(rounded, *operands), 1e-3)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_the_exact_product_of_a_rounded_input(dtypes, preferred):
    """The kernel's cotangent is that of the input as it is kept, whatever the dtypes; the others do not change."""
    _, x, kernel, g = sample("both-exact", channels=(24, 16))
    x, kernel = x.astype(dtypes[0]), kernel.astype(dtypes[1])
    product = functools.partial(exact_matmul, preferred_element_type=preferred)
    y, pullback = jax.vjp(functools.partial(product, bits=8), x, kernel)
    kept = Rows.of(x, 8).decoded()
    plain_y, plain = jax.vjp(product, x, kernel)
    dx, dw = pullback(g.astype(y.dtype))
    chex.assert_trees_all_equal_dtypes((y, dx, dw), (plain_y, x, kernel))
    assert_close(
        (y, dx, dw), (plain_y, plain(g.astype(y.dtype))[0], jax.vjp(product, kept, kernel)[1](g.astype(y.dtype))[1]), 1e-6
    )


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("variant", ["fitted", "official-prefix", "by-axis-prefix"])
def test_any_number_of_batch_dimensions(variant, batch):
    operation, x, kernel, g = sample(variant, batch)
    y, dx, dw = jitted(operation, x, kernel, g)
    flat_y, flat_dx, flat_dw = jitted(operation, x.reshape(-1, *x.shape[-2:]), kernel, g.reshape(-1, *g.shape[-2:]))
    assert_close((y, dx, dw), (flat_y.reshape(y.shape), flat_dx.reshape(x.shape), flat_dw), 1e-6)


def test_traces_once_per_shape():
    @jax.jit
    @chex.assert_max_traces(n=2)
    def step(x, kernel):
        return jax.grad(lambda k: low_rank_matmul(x, k, lp_l1(4), [7, 7]).sum())(kernel)

    for seed in range(3):
        rng = np.random.default_rng(seed)
        for batch in (2, 3):
            x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((batch, 49, 4), (4, 3)))
            chex.assert_tree_all_finite(step(x, kernel))
