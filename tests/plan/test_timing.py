"""Budgets in seconds: what is timed, how plans use it, and where there is no clock. No test depends on a clock."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import ViT

from lbpwht_jax import LowRank, LowRankSpec, adapt, lp_l1, lp_linf
from lbpwht_jax.adaptation.plan import plan_from
from lbpwht_jax.ops.heuristic import choosing_for
from lbpwht_jax.plan import plan, timing
from lbpwht_jax.plan.observe import Site
from lbpwht_jax.plan.timing import Backward, LayerTimes

IMAGES = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
LAYERS = r"(query|key|value|out|fc[12])$"


def rank(spec):
    return 64 if spec is None else spec.rank


def by_functions(backward, specs):
    """Seconds that grow with the functions kept; an exact pass costs like half of them."""
    tokens, inputs = backward.x[:2], backward.x[2]
    unit = np.prod(tokens) * inputs * backward.outputs * 1e-9 * (backward.needs_dx + backward.needs_dw)
    return [unit * (32 if spec is None else spec.rank) for spec in specs]


@pytest.fixture(scope="module")
def model():
    module = ViT()
    adapted = adapt(module, [LowRank(LAYERS, lp_l1(1), (4, 4), prefix_tokens=1)], IMAGES)
    variables = jax.jit(module.init)(jax.random.key(1), IMAGES)
    return adapted, variables, [(IMAGES, jnp.arange(4) % 3)]


def test_a_plan_keeps_to_a_budget_of_seconds(model):
    made = plan(*model, "seconds=0.4", clock=by_functions)
    assert (made.budget, made.limit) == ("seconds", 0.4)
    assert 0.3 < made.used <= 0.4
    assert sum(layer.share for layer in made.layers) == pytest.approx(1)
    # a slower clock, the same plan: the budget is a share
    slower = plan(*model, "seconds=0.4", clock=lambda *each: [3 * time for time in by_functions(*each)])
    assert (slower.layers, slower.used) == (made.layers, pytest.approx(made.used))
    assert slower.cost == pytest.approx(3 * made.cost)
    assert plan_from({**dataclasses.asdict(made)}) == made


def test_a_budget_of_all_the_time_is_exact_where_exact_is_least_lossy(model):
    made = plan(*model, "seconds=1", clock=by_functions)
    assert made.used <= 1 and made.loss < 1e-9
    with pytest.raises(ValueError, match=r"seconds=0.01: the least possible is about seconds=0\.0\d+, where every layer keeps"):
        plan(*model, "seconds=0.01", clock=by_functions)


def test_what_is_timed(model):
    """The products of the layers at the batch's shapes, those of equal shapes once, exact and both families."""
    asked = []

    def clock(backward, specs):
        asked.append((backward, specs))
        return by_functions(backward, specs)

    made = plan(*model, "seconds=0.5", clock=clock)
    # query, key, value and out alike; fc1; fc2
    shapes = {(backward.x, backward.outputs) for backward, _ in asked}
    assert len(asked) == len(shapes) == 3
    assert {x[:2] for x, _ in shapes} == {(4, 17)}
    for _, specs in asked:
        assert specs[0] is None
        families = {frozenset(make(r).bases) for make in (lp_l1, lp_linf) for r in range(1, 9)}
        assert {frozenset(spec.bases) for spec in specs[1:]} == families
    # of two blocks, both products of query, key, value, out, fc1 and fc2
    total = 2 * 2 * 17 * (4 * 8 * 8 + 8 * 16 + 16 * 8) * 32e-9
    assert made.cost / made.used == pytest.approx(total, rel=1e-6)


def test_other_functions_are_charged_like_the_least_that_hold_them():
    site = Site("layer", (8, 8), 0, 8, 4, 6)
    product = dataclasses.make_dataclass("Product", ["tokens", "needs_dx", "needs_dw"])(64, 1, True)
    times = LayerTimes({"layer": site}, {"layer": [product]}, 2, lambda _, specs: [rank(spec) for spec in specs])

    def seconds(*functions):
        return 2 * times.seconds("layer", LowRankSpec(functions))

    # LP_{L1-2} has three functions and indices up to 1, LP_{Linf-2} four
    assert seconds((0, 0), (0, 1)) == 3 and seconds((1, 1)) == 3
    assert seconds((0, 0), (0, 1), (1, 0), (1, 1)) == 4
    # one function of index 7 along an axis takes what the functions up to 7 along both take, as LP_{L1-8} does
    assert seconds((0, 7)) == 36
    assert seconds(*itertools.islice(itertools.product(range(8), repeat=2), 40)) == 49 + 15
    assert 2 * times.seconds("layer", None) == 64


def test_frozen_products_take_no_time():
    site = Site("layer", (4, 4), 0, 8, 4, 6)
    product = dataclasses.make_dataclass("Product", ["tokens", "needs_dx", "needs_dw"])(16, 0, False)
    times = LayerTimes({"layer": site}, {"layer": [product]}, 2, by_functions)
    assert times.seconds("layer", None) == 0 == times.seconds("layer", lp_l1(2))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_the_default_clock_runs_the_cotangents_that_are_needed(monkeypatch, needs):
    ran = {}

    def instead(functions, rounds):
        ran.update({name: function() for name, function in functions.items()})
        return {name: float(name) for name in functions}

    monkeypatch.setattr(timing, "interleaved", instead)
    backward = Backward((3, 17, 4), 6, Site("", (4, 4), 1, 8, 4, 6), *needs)
    assert timing.clock("bfloat16")(backward, [None, lp_linf(8)]) == [0, 1]
    wanted = [shape for shape, need in zip(((3, 17, 4), (4, 6)), needs, strict=True) if need]
    for arrays in ran.values():
        assert [(array.shape, array.dtype) for array in arrays] == [(shape, jnp.bfloat16) for shape in wanted]
    for exact, all_kept in zip(*ran.values(), strict=True):  # eight bits of mantissa
        np.testing.assert_allclose(exact.astype(jnp.float32), all_kept.astype(jnp.float32), atol=0.2, rtol=0.05)


def test_no_clock_for_what_is_not_there(model, monkeypatch):
    with choosing_for("tpu"), pytest.raises(ValueError, match="layers are chosen for tpu, and what is at hand is cpu; plan on"):
        plan(*model, "seconds=0.5")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="make the plan in one process with lbpwht plan, and give it to all"):
        plan(*model, "seconds=0.5")
