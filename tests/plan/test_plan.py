"""Plans: what functions hold of gradients, the choice under a budget, and the rules that follow."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import ViT
from transformations import compiled_gradients

from lbpwht_jax import LoRA, LowRank, LowRankSpec, adapt, create_model, low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.adaptation import AdaptedModule, adapted_model, load_plan, parse_method, with_loops
from lbpwht_jax.cost import model_cost
from lbpwht_jax.models import model_info
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.plan import parse_budget, plan, planning
from lbpwht_jax.plan.candidates import candidate, selections
from lbpwht_jax.plan.knapsack import solve
from lbpwht_jax.plan.observe import Energies, Site, energies

MICRO = "vit_micro_patch4_28"


def measured(model):
    """The model, variables and two batches."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    rng = np.random.default_rng(0)
    # smooth images, as real ones are: low frequencies hold most
    coarse = rng.normal(size=(2, 8, 4, 4, 1)).astype(np.float32)
    images = jax.image.resize(jnp.asarray(coarse), (2, 8, 28, 28, 1), "linear")
    return model, variables, [(x, jnp.arange(8) % 10) for x in images]


@pytest.fixture(scope="module")
def micro():
    return measured(adapted_model(MICRO, "lp_l1-4", num_classes=10))


@pytest.fixture(scope="module")
def two_blocks():
    """The same of a model with two of its blocks."""
    module, rules = (
        VisionTransformer(10, 28, 4, dim=96, depth=2, heads=4),
        parse_method("lp_l1-4").rules(model_info(MICRO), "all"),
    )
    return measured(adapt(module, rules, jnp.zeros((1, 28, 28, 1))))


@pytest.fixture(scope="module")
def planned(two_blocks):
    return plan(*two_blocks, "flops=0.3")


@pytest.fixture(scope="module")
def for_micro(planned):
    """A plan for the whole model: that of two blocks, three times."""
    layers = [
        dataclasses.replace(layer, path=f"blocks_{2 * i + int(layer.path[7])}{layer.path[8:]}")
        for i in range(3)
        for layer in planned.layers
    ]
    return dataclasses.replace(planned, model=MICRO, image_size=28, layers=tuple(layers))


@pytest.mark.parametrize(("grid", "prefix"), [((8, 8), 0), ((7, 7), 1), ((14, 14), 0), ((5, 12), 2), ((16,), 1)])
def test_what_a_selection_loses_is_what_low_rank_loses(grid, prefix):
    rng = np.random.default_rng(0)
    tokens = prefix + int(np.prod(grid))
    x, w, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, tokens, 5), (5, 6), (3, tokens, 6)))
    site = Site("layer", grid, prefix, 8, 5, 6)
    found = jax.jit(energies, static_argnums=3)(x, g, g @ w.T, site)
    exact_dx, exact_dw = jax.vjp(lambda x, w: x @ w, x, w)[1](g)
    np.testing.assert_allclose(np.sum(found.dw), np.sum(exact_dw**2), rtol=1e-4)
    np.testing.assert_allclose(np.sum(found.dx), np.sum(exact_dx**2), rtol=1e-4)
    for kept in selections(found, site)[::12]:
        one = candidate(found, site, kept)
        low = compiled_gradients(lambda x, w, spec=one.spec: low_rank_matmul(x, w, spec, grid, prefix), (x, w), g)[1:]
        for lost, exact, own in zip((one.dx_lost, one.dw_lost), (exact_dx, exact_dw), low, strict=True):
            # float32 sums of squares, differences of nearly equal ones among them
            np.testing.assert_allclose(lost, np.sum((exact - own) ** 2) / np.sum(exact**2), rtol=1e-3, atol=1e-5)


def test_functions_picked_by_energy_lose_less_than_low_sequencies():
    rng = np.random.default_rng(1)
    site = Site("layer", (8, 8), 0, 8, 4, 4)
    high = np.zeros((1, 8, 8, 4), np.float32)
    high[:, ::2, ::2] = rng.normal(size=(1, 4, 4, 4))
    x = jnp.asarray(high.reshape(1, 64, 4))
    found = energies(x, x, x, site)
    lost = {sum(kept): candidate(found, site, kept).dw_lost for kept in reversed(selections(found, site))}
    low = candidate(found, site, tuple(sum(f) < 4 for f in site.functions))
    assert min(lost[n] for n in range(1, 11)) < 0.8 * low.dw_lost


def test_the_solver_is_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = [rng.uniform(size=8) for _ in range(3)]
        costs = [rng.integers(1, 40, 8).astype(float) for _ in range(3)]
        budget = float(rng.integers(sum(int(c.min()) for c in costs), 100))
        best = min(
            sum(loss[i] for loss, i in zip(losses, picked, strict=True))
            for picked in itertools.product(range(8), repeat=3)
            if sum(cost[i] for cost, i in zip(costs, picked, strict=True)) <= budget
        )
        found = solve(losses, costs, budget)
        assert found.cost <= budget and found.gap == 0
        np.testing.assert_allclose(found.loss, best, rtol=1e-9)
        np.testing.assert_allclose(found.loss, sum(loss[i] for loss, i in zip(losses, found.chosen, strict=True)))
    with pytest.raises(ValueError, match="the least possible cost is 3, above the budget of 2"):
        solve([np.ones(2)], [np.array([3.0, 4.0])], 2.0)


@pytest.mark.heavy
@pytest.mark.parametrize("budget", ["flops=0.3", "bytes=0.8"])
def test_the_cost_is_that_of_the_cost_command(micro, budget, tmp_path):
    made = dataclasses.replace(plan(*micro, budget), model=MICRO, image_size=28)
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    cost = model_cost(MICRO, f"plan:{tmp_path / 'plan.json'}", num_classes=10)
    full = model_cost(MICRO, "full", num_classes=10)
    name = {"flops": "backward_flops_matmul", "bytes": "saved_activation_bytes"}[made.budget]
    assert made.cost == getattr(cost, name)
    assert made.used == made.cost / getattr(full, name)
    assert 0.9 * made.limit <= made.used <= made.limit


@pytest.mark.heavy
def test_a_plan_loses_no_more_than_the_best_uniform_selection(micro):
    model, variables, batches = micro
    full = model_cost(MICRO, "full", num_classes=10).backward_flops_matmul
    exact = gradients(adapted_model(MICRO, "full", num_classes=10), variables, batches)
    for r in (2, 4):
        uniform = model_cost(MICRO, f"lp_l1-{r}", num_classes=10).backward_flops_matmul
        made = plan(model, variables, batches, f"flops={uniform / full}")
        assert made.cost <= uniform
        assert made.loss <= uniform_loss(micro, lp_l1(r))
        if r == 4:  # and truly, when all errors have added up
            planned = gradients(adapt(model.module, made.rules(), batches[0][0]), variables, batches)
            low = gradients(adapted_model(MICRO, f"lp_l1-{r}", num_classes=10), variables, batches)
            assert distance(planned, exact) < distance(low, exact)


def uniform_loss(micro, spec):
    """The loss of one selection for all layers: that of the plan of a model that knows no other."""
    model, variables, batches = micro
    sites = planning._sites(model)
    exact = dataclasses.replace(model, resolution=dataclasses.replace(model.resolution, adaptations=()))
    found = planning._observe(exact, variables, batches, sites, planning.cross_entropy)
    whole = {path: float(np.sum(each.dw)) for path, each in found.items()}
    kept = tuple(function in spec.bases for function in itertools.product(range(8), repeat=2))
    lost = {path: candidate(found[path], sites[path], kept).dw_lost for path in sites}
    parts = sum(lost[path] * whole[path] for path in sites) / sum(whole.values())
    return 0.5 * np.mean(list(lost.values())) + 0.5 * parts


def gradients(model, variables, batches):
    def loss(params):
        x = jnp.concatenate([x for x, _ in batches])
        y = jnp.concatenate([y for _, y in batches])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model.apply({"params": params}, x, train=True)), y[:, None], 1))

    return jax.jit(jax.grad(loss))(variables["params"])


def distance(a, b):
    parts = jax.tree.map(lambda a, b: float(jnp.sum((a - b) ** 2)), a, b)
    return sum(jax.tree.leaves(parts))


def test_a_budget_of_all_is_exact(two_blocks):
    model, variables, batches = two_blocks
    made = plan(model, variables, batches, "flops=1")
    assert made.loss < 1e-9 and made.gap == 0
    exact = gradients(model.module, variables, batches)
    planned = gradients(adapt(model.module, made.rules(), batches[0][0]), variables, batches)
    chex.assert_trees_all_close(planned, exact, rtol=1e-4, atol=1e-6)  # float32 rounding


def test_the_same_batches_give_the_same_plan(two_blocks, planned):
    assert plan(*two_blocks, "flops=0.3") == planned


def test_equal_blocks_with_equal_functions_run_as_a_loop(two_blocks, planned):
    model, variables, batches = two_blocks
    assert len({layer.functions for layer in planned.layers if layer.path.endswith("fc1")}) > 1
    made = plan(model, variables, batches, "flops=0.3", same_within_stage=True)
    assert made.used <= 0.3 and made.loss >= planned.loss
    loops = with_loops(adapt(model.module, made.rules(), batches[0][0]), batches[0][0]).module.settings.loops
    assert [len(loop) for loop in loops] == [2]


def test_create_model_takes_a_plan(for_micro):
    model = create_model(MICRO, num_classes=10, plan=for_micro)
    kept = {adaptation.layer.path: adaptation.spec.bases for adaptation in model.resolution.adaptations}
    assert kept == {layer.path: layer.functions for layer in for_micro.layers if layer.functions is not None}
    with pytest.raises(ValueError, match="a plan says what each layer keeps; leave spec and layers out"):
        create_model(MICRO, plan=for_micro, spec=lp_l1(2))
    with pytest.raises(ValueError, match="the plan was made for model 'vit_micro_patch4_28', not 'vit_tiny_patch16_224'"):
        create_model("vit_tiny_patch16_224", plan=for_micro)


def test_a_plan_is_summed_with_lora(for_micro, tmp_path):
    for_micro.save(tmp_path / "a+b.json")
    model = adapted_model(MICRO, f"plan:{tmp_path / 'a+b.json'}+lora_all-2", num_classes=10)
    for adaptation, layer in zip(
        model.resolution.adaptations, sorted(for_micro.layers, key=lambda each: each.path), strict=True
    ):
        assert adaptation.rank == (6 if "qkv" in layer.path else 2)
        assert (None if adaptation.spec is None else adaptation.spec.bases) == layer.functions
    attention = adapted_model(MICRO, f"plan:{tmp_path / 'a+b.json'}+lora-2", num_classes=10)
    assert {a.layer.path for a in attention.resolution.adaptations if a.rank} == {
        layer.path for layer in for_micro.layers if "attn" in layer.path
    }
    with pytest.raises(ValueError, match="the plan was made for --train 'all', not 'last_stage'"):
        adapted_model(MICRO, f"plan:{tmp_path / 'a+b.json'}", "last_stage", 10)


def test_models_of_others_are_planned():
    model = ViT()
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = model.init(jax.random.key(1), images)
    rules = [LowRank(r"(query|key|value|out|fc[12])$", lp_l1(1), (4, 4), prefix_tokens=1)]
    adapted = adapt(model, rules, images)
    made = plan(adapted, variables, [(images, jnp.arange(4))], "flops=0.7")
    assert made.used <= 0.7 and made.model == "" and {layer.prefix_tokens for layer in made.layers} == {1}
    again = adapt(model, made.rules(), images)
    assert isinstance(again, AdaptedModule)
    assert {a.layer.path for a in again.resolution.adaptations} <= {a.layer.path for a in adapted.resolution.adaptations}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0.3", "budget must be flops=SHARE or bytes=SHARE or seconds=SHARE, such as flops=0.3, got '0.3'"),
        ("time=0.3", "budget must be flops=SHARE"),
        ("flops=0", "above 0 and at most 1"),
        ("flops=1.5", "above 0 and at most 1"),
        ("bytes=1e", "'1e' is no number"),
    ],
)
def test_budgets_that_there_are_not(budget, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(budget)


def test_what_cannot_be_planned(two_blocks):
    model, variables, batches = two_blocks
    with pytest.raises(ValueError, match=r"flops=0.01: the least possible is about flops=0\.\d+, where every layer"):
        plan(model, variables, batches, "flops=0.01")
    with pytest.raises(ValueError, match="there is no batch to measure on"):
        plan(model, variables, [], "flops=0.3")
    broken = [(batches[0][0] * np.nan, batches[0][1])]
    with pytest.raises(ValueError, match=r"the gradients of 8 layers, such as .* are not finite; check weights and images"):
        plan(model, variables, broken, "flops=0.3")
    with pytest.raises(ValueError, match="no layer of the model is low-rank"):
        plan(adapted_model(MICRO, "full", num_classes=10), variables, batches, "flops=0.3")
    branched = adapt(model.module, [LoRA("qkv", 2, spec=lp_linf(2))], batches[0][0])
    with pytest.raises(ValueError, match="the model has LoRA branches"):
        plan(branched, branched.with_branches(jax.random.key(0), variables), batches, "flops=0.3")
    with pytest.raises(TypeError, match="model must be a Linen model under rules, as adapt returns it, got VisionTransformer"):
        plan(model.module, variables, batches, "flops=0.3")


def test_files_that_hold_no_plan(planned, tmp_path):
    file = tmp_path / "plan.json"
    for text in ("", "[]", "{}", json.dumps({**dataclasses.asdict(planned), "block": 7})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"plan.json holds no plan .*; lbpwht plan writes one"):
            load_plan(file)
    with pytest.raises(FileNotFoundError):
        parse_method(f"plan:{tmp_path / 'none.json'}")
    with pytest.raises(ValueError, match="method 'plan' does not say which plan"):
        parse_method("plan")


def test_energies_start_at_zero():
    zeros = Energies.zeros(Site("layer", (4, 4), 1, 8, 4, 4))
    assert zeros.dw.shape == (65, 65) and zeros.dx.shape == (65,) and not zeros.dw.any()
    assert LowRankSpec(Site("layer", (4, 4), 1, 8, 4, 4).functions).rank == 64
