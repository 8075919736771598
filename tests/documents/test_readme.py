"""What the README says is so."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import results_costs
import transfer_report

from lbpwht_jax import create_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_the_layer_example_runs():
    names = {}
    exec(BLOCKS[0], names)
    x = jnp.ones((2, 1 + 14 * 14, 8))
    model = names["Mlp"]()
    variables = model.init(jax.random.key(0), x)
    assert model.apply(variables, x).shape == x.shape
    jax.grad(lambda v: model.apply(v, x).sum())(variables)


def test_the_rules_fit_a_model():
    model = create_model("vit_micro_patch4_28", num_classes=10, image_size=56)
    images = jnp.ones((1, 56, 56, 1))
    variables = model.init(jax.random.key(0), images)
    block = next(block for block in BLOCKS if "Freeze" in block).replace("print(", "table = str(")
    names = {"jax": jax, "model": model, "variables": variables, "images": images}
    exec(block, names)
    assert "LoRA + LowRank" in names["table"] and "14x14" in names["table"]
    assert names["logits"].shape == (1, 10)
    plain = model.apply(names["adapted"].merge(names["variables"]), images)
    assert float(jnp.abs(names["logits"] - plain).max()) < 1e-5


def test_the_table_is_what_the_sweep_measured():
    sweep, steps = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("transfer", "transfer_steps"))
    assert transfer_report.readme_table(sweep["runs"], steps["seconds"]) in README
    assert 10 * sweep["setting"]["train_per_class"] == 2_000
    # the claims beside it
    verdicts = {}
    for train in ("last_stage", "all"):
        found = transfer_report.accuracies(sweep["runs"], train)
        assert all(set(by_seed) == set(range(7)) for by_seed in found.values())
        for claim in transfer_report.CLAIMS:
            bounds = transfer_report.interval(claim.differences(found))[1:]
            verdicts[claim.shown, train] = claim.verdict(*bounds)
    assert verdicts["lp_l1-8 - lp_l1-2", "last_stage"] == verdicts["lp_l1-8 - lp_l1-2", "all"] == "holds"
    assert verdicts["lp_l1-8 - full", "all"] == verdicts["lp_l1-4+lora_all-8 - lora_all-8", "last_stage"] == "holds"
    assert verdicts["lp_l1-2 - lora-8", "last_stage"] == verdicts["lp_l1-2 - lora-8", "all"] == "open"


def test_the_steps_are_what_the_bench_measured():
    results = json.loads((RESULTS / "bench_step.json").read_text())
    assert results_costs.readme_steps(results) in README
    assert {(row["model"], row["train"], row["batch"]) for row in results["rows"]} == {("efficientformer_l1", "all", 16)}


def test_the_test_command_is_the_one_ci_runs():
    command = "pip install -e '.[test]' && pytest"
    assert f"\n{command}\n" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
