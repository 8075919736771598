"""What the README says is so."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import results_costs

from lbpwht_jax import create_model

ROOT = Path(__file__).parents[1]
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


def test_the_table_is_what_the_experiment_measured():
    spec = importlib.util.spec_from_file_location("digits", ROOT / "experiments" / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    results = json.loads((ROOT / "experiments" / "results" / "digits.json").read_text())
    assert digits.table(results) in README
    # the claim beside it
    means = {method: sum(run["test_accuracy"] for run in runs) / len(runs) for method, runs in results["runs"].items()}
    assert means["full"] - means["lp_l1-4"] <= 0.015
    assert len(results["runs"]["full"]) >= 3


def test_the_steps_are_what_the_bench_measured():
    results = json.loads((ROOT / "experiments" / "results" / "bench_step.json").read_text())
    assert results_costs.readme_steps(results) in README
    assert {(row["model"], row["train"], row["batch"]) for row in results["rows"]} == {("efficientformer_l1", "all", 16)}


def test_the_test_command_is_the_one_ci_runs():
    command = "pip install -e '.[test]' && pytest"
    assert f"\n{command}\n" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
