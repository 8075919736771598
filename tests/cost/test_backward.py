import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import LowRankDense, create_model, low_rank_matmul, lp_l1
from lbpwht_jax.cost.backward import backward_flops, residual_bytes
from lbpwht_jax.ops.flops import product_flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_and_convolutions():
    assert product_flops(lambda a, b: a @ b, shape(2, 3, 4), shape(4, 5)) == 2 * 6 * 4 * 5
    assert product_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(7, 2, 3), shape(7, 3, 4)) == 2 * 7 * 2 * 3 * 4

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2, 2), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    arguments = (shape(1, 8, 8, 4), shape(3, 3, 2, 6))
    assert product_flops(conv, *arguments, padding=True) == 2 * (4 * 4 * 6) * (3 * 3 * 2)
    # the last of the four windows along each axis hangs over the edge by one
    assert product_flops(conv, *arguments) == 2 * (11 * 11 * 6) * 2


def test_calls_scans_and_branches():
    a = shape(4, 4)
    one = 2 * 4**3
    assert product_flops(jax.jit(lambda a: a @ a), a) == one
    assert product_flops(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], a) == 5 * one
    assert product_flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a), a) == 2 * one


def test_products_nobody_wants_do_not_count():
    a = shape(4, 4)

    @jax.jit
    def two(a):
        return a @ a, a @ a @ a

    assert product_flops(lambda a: two(a)[0], a) == 2 * 4**3
    # the gradient of the kernel alone leaves out the first layer's dx
    x, k = shape(2, 49, 6), shape(6, 5)
    grad = jax.grad(lambda k, x: low_rank_matmul(x, k, lp_l1(4), (7, 7)).sum())
    assert product_flops(grad, k, x) == 2 * 2 * 10 * (49 * 6 + 49 * 5 + 6 * 5)


def test_product_flops_equal_xla_s_count():
    x, k = shape(4, 64, 256), shape(256, 384)

    def both(x, k, g):
        return jax.vjp(lambda x, k: low_rank_matmul(x, k, lp_l1(4), (8, 8)), x, k)[1](g)

    ours = product_flops(both, x, k, shape(4, 64, 384))
    xla = jax.jit(both).lower(x, k, shape(4, 64, 384)).compile().cost_analysis()["flops"]
    # XLA counts conversions and the like too
    assert ours == pytest.approx(xla, rel=0.01)


class TwoLayers(nn.Module):
    rank: int | None

    @nn.compact
    def __call__(self, x, train=False):
        spec = self.rank and lp_l1(self.rank)
        x = x.reshape(x.shape[0], -1, 4)
        for i in range(2):
            x = LowRankDense(4, spec=spec, grid=(7, 7), use_bias=False, name=f"layer_{i}")(x)
        return x.mean(1)


@pytest.mark.parametrize(("rank", "kept"), [(None, 49), (2, 3), (4, 10), (13, 49)])
def test_backward_flops_and_residual_bytes_of_a_model(rank, kept):
    model = TwoLayers(rank)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape(1, 14, 14, 1))
    dx = dw = 2 * kept * 4 * 4
    transform = 0 if rank is None else 2 * kept * 49 * 4
    # each layer projects x and g; the first needs no dx, the second expands its own
    assert backward_flops(model, variables, (14, 14, 1)) == 2 * dw + dx + 5 * transform
    # two layers' inputs, and the four softmax probabilities' worth of the loss
    residuals = 4 * 2 * kept * 4
    assert residuals <= residual_bytes(model, variables, (14, 14, 1)) <= residuals + 100


@pytest.mark.heavy
def test_low_rank_costs_less_on_the_bundled_model():
    costs = []
    for spec in (None, lp_l1(6), lp_l1(4), lp_l1(2)):
        model = create_model("vit_micro_patch4_28", num_classes=10, spec=spec)
        variables = jax.eval_shape(model.init, jax.random.key(0), shape(1, 28, 28, 1))
        costs.append((backward_flops(model, variables, (28, 28, 1)), residual_bytes(model, variables, (28, 28, 1))))
    flops, sizes = zip(*costs, strict=True)
    assert sorted(flops, reverse=True) == list(flops) and sorted(sizes, reverse=True) == list(sizes)
    assert flops[0] > 4 * flops[-1]
