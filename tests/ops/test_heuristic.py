import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LoRA, LowRank, LowRankDense, adapt, lp_l1
from lbpwht_jax.ops.heuristic import choosing_for, chosen, predicted_speedup
from lbpwht_jax.ops.matmul import Link, low_rank_matmul

# A narrow layer that keeps nearly every function: its transforms cost more than they save.
SLOW, GRID = lp_l1(8, when="faster"), (7, 7)


def gradients(spec, x, kernel, g):
    return jax.vjp(lambda x, kernel: low_rank_matmul(x, kernel, spec, GRID), x, kernel)[1](g)


@pytest.mark.parametrize("layer", [(448, 1792), (1792, 448), (768, 3072), (3072, 768)], ids=str)
def test_the_papers_layers_are_low_rank_at_every_rank(layer):
    speedups = [predicted_speedup(lp_l1(r), (7, 7), 0, *layer) for r in (2, 4, 6, 8)]
    assert speedups == sorted(speedups, reverse=True) and speedups[-1] > 1
    # never more than the ratio of coefficients
    assert all(speedup < 49 / n for speedup, n in zip(speedups, (3, 10, 21, 34), strict=True))


def test_maps_of_fine_functions_are_exact():
    assert predicted_speedup(lp_l1(4), (56, 56), 0, 192, 48) > 1 > predicted_speedup(lp_l1(6), (56, 56), 0, 192, 48)
    assert predicted_speedup(lp_l1(4), (28, 28), 0, 384, 96) > 1 > predicted_speedup(lp_l1(8), (28, 28), 0, 384, 96)


def test_exact_on_one_side_gains_less():
    both = predicted_speedup(lp_l1(2), GRID, 0, 448, 1792)
    for fields in ({"dx": "exact"}, {"dw": "exact"}):
        assert 1 < predicted_speedup(lp_l1(2, **fields), GRID, 0, 448, 1792) < 2 < both


def test_faster_leaves_slow_layers_exact_and_others_low_rank():
    assert chosen(SLOW, GRID, 0, 4, 4) == lp_l1(8, when="faster", dx="exact", dw="exact")
    assert chosen(lp_l1(8), GRID, 0, 4, 4) == lp_l1(8)
    assert chosen(SLOW, GRID, 0, 448, 1792) == SLOW
    rng = np.random.default_rng(0)
    x, kernel, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 49, 4), (4, 4), (2, 49, 4)))
    dx, dw = gradients(SLOW, x, kernel, g)
    # float32 sums of 98 products of order 1
    chex.assert_trees_all_close(dx, g @ kernel.T, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(dw, np.einsum("bti,bto->io", x, g), rtol=0, atol=1e-4)
    assert np.abs(gradients(lp_l1(8), x, kernel, g)[0] - dx).max() > 0.1


# The roofline, summed over the kernels that XLA compiles for an H100 (bfloat16, batch 256), of exact over low rank.
@pytest.mark.parametrize(
    ("layer", "compiled"),
    [
        ((448, 1792), (1.671, 1.251, 0.881)),
        ((1792, 448), (1.162, 0.912, 0.672)),
        ((768, 3072), (2.723, 1.814, 1.190)),
        ((3072, 768), (1.922, 1.380, 0.956)),
    ],
    ids=str,
)
def test_a_gpu_is_predicted_as_its_compiler_says(layer, compiled):
    predicted = [predicted_speedup(lp_l1(r), (7, 7), 0, *layer, platform="cuda") for r in (2, 4, 6)]
    # the prediction leaves out reading and writing the kernel: 3 % of the bytes
    np.testing.assert_allclose(predicted, compiled, rtol=0.05)


def test_joined_layers_gain_more_on_a_gpu():
    """By hand, in elements moved per token at LP_{L1-4} of whole blocks, whose 10 coefficients count as 10/64 of a token."""
    share = 10 / 64
    for edge, inputs in ((56, 96), (16, 384)):
        for place, layer, transformed in (
            ("first", (inputs, 4 * inputs), 2 * inputs),
            ("second", (4 * inputs, inputs), 5 * inputs),
        ):
            at = lp_l1(4), (edge, edge), 0, *layer
            alone, joined = (predicted_speedup(*at, platform="cuda", place=p) for p in (None, place))
            own = 2 * share * 5 * inputs + (1 + share) * transformed
            assert joined > alone
            if edge == 56:  # at few channels nothing is bound by its FLOPs
                np.testing.assert_allclose(joined, 2 * 5 * inputs / own, rtol=1e-3)
            assert predicted_speedup(*at, place=place) == predicted_speedup(*at)
    # a grid that has no kernels
    large = lp_l1(4, block=16), (16, 16), 0, 384, 1536, "cuda"
    assert predicted_speedup(*large, "first") == predicted_speedup(*large)


def test_rules_see_which_layers_are_joined():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            link = Link()
            h = LowRankDense(768, grid=GRID, name="fc1")(x, link)
            return LowRankDense(192, grid=GRID, activation="gelu", name="fc2")(h, link)

    x, spec = jax.ShapeDtypeStruct((1, 49, 192), jnp.float32), lp_l1(4, when="faster")
    with choosing_for("cuda"):
        assert chosen(spec, GRID, 0, 768, 192) != spec
        adapted = adapt(Model(), [LowRank("", spec, grid=GRID)], x)
        beside_branches = adapt(Model(), [LoRA("", 2, spec=spec, grid=GRID)], x)
    assert adapted.spec("fc1") == adapted.spec("fc2") == spec
    # the product beside a branch is not joined
    assert beside_branches.spec("fc1") == spec and beside_branches.spec("fc2") is None


def test_a_tpu_leaves_maps_exact():
    # by the v5e's compiler ViT-B moves 0.91 of the bytes of full backpropagation; three MLPs of 48 channels at 56x56, of 224 at
    # 14x14 and of 448 at 7x7 move 2.0, 1.5 and 1.7 times as much (LP_{L1-4})
    for layer in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
        assert predicted_speedup(lp_l1(4), (14, 14), 1, *layer, platform="tpu") > 1
    for edge, inputs in ((56, 48), (14, 224), (7, 448)):
        for layer in ((inputs, 4 * inputs), (4 * inputs, inputs)):
            assert predicted_speedup(lp_l1(4), (edge, edge), 0, *layer, platform="tpu") < 1


def test_the_choice_is_the_platforms():
    spec, layer = lp_l1(6, when="faster"), ((7, 7), 0, 1792, 448)
    exact = lp_l1(6, when="faster", dx="exact", dw="exact")
    assert chosen(spec, *layer) == spec
    with choosing_for("cuda"):
        assert chosen(spec, *layer) == exact
        with choosing_for("cpu"):
            assert chosen(spec, *layer) == spec
    with pytest.raises(RuntimeError), choosing_for("tpu"):
        raise RuntimeError
    assert chosen(spec, *layer) == spec


@pytest.mark.parametrize("fields", [{"dx": "exact"}, {"dw": "exact"}])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_exact_on_one_side_gains_less_on_accelerators(platform, fields):
    layer = ((7, 7), 0, 768, 3072, platform)
    assert predicted_speedup(lp_l1(2, **fields), *layer) < predicted_speedup(lp_l1(2), *layer)
    assert predicted_speedup(lp_l1(2, dx="exact", dw="exact"), *layer) == 1


def test_adapts_table_says_so():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1024, name="wide")(LowRankDense(256, grid=GRID, name="narrow")(x))

    x = jax.ShapeDtypeStruct((1, 49, 4), jnp.float32)
    adapted = adapt(Model(), [LowRank("", SLOW, grid=GRID)], x)
    assert adapted.spec("narrow") is None and adapted.spec("wide") == SLOW
    lines = {line.split()[1]: line for line in str(adapted.resolution).splitlines() if "Rank" in line}
    assert "full: LowRank is slower" in lines["narrow"] and "slower" not in lines["wide"]
    variables = adapted.init(jax.random.key(0), jnp.ones((1, 49, 4)))
    chex.assert_shape(jax.eval_shape(adapted.apply, variables, x), (1, 49, 1024))
    forced = adapt(Model(), [LowRank("", lp_l1(8), grid=GRID)], x)
    assert forced.spec("narrow") == lp_l1(8)
