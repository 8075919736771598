"""``lbpwht plan``, and runs by a plan."""

import dataclasses
import json

import chex
import pytest

from lbpwht_jax.adaptation import Plan, PlannedLayer, load_plan
from lbpwht_jax.cli import main
from lbpwht_jax.cli import plan as plan_command
from lbpwht_jax.cli.run_flags import PLANNED_LAYERS, RunFlags
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.train import loading

LAYER = PlannedLayer("blocks_0/mlp/fc1", ((0, 0),), (7, 7), 1, 0.5, 0.5, 1.0)
SOME = Plan((LAYER,), 8, "flops", 0.3, 0.3, 1.0, 0.1, 0.0, "vit_micro_patch4_28", 28)


@pytest.mark.heavy
def test_a_plan_is_made_printed_and_drawn(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "--budget", "flops=0.3", "--batches", "1", "--batch-size", "8", "--output", str(file)]) == 0
    made, printed = load_plan(file), capsys.readouterr().out
    assert (made.model, made.image_size, made.train) == ("vit_micro_patch4_28", 28, "all")
    assert 0.27 <= made.used <= 0.3 and f"flops={made.used:.4f} of full backpropagation" in printed
    assert all(layer.path in printed for layer in made.layers)
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert main(["cost", made.model, "--method", f"plan:{file}", "--num-classes", "10", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["backward_flops_matmul"] == made.cost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--budget", "flops=2"], "above 0 and at most 1"),
        (["plan", "--batches", "0"], "--batches must be positive, got 0"),
        (["plan", "--train", "head"], "--train head leaves no layer to plan"),
        (["plan", "--output", "plan.png"], "--output must be a new .json file in a folder that there is, got plan.png"),
        (["plan", "--output", "nowhere/plan.json"], "--output must be a new .json file in a folder that there is"),
        (["plan", "--output", "docs/api.md"], "--output must be a new .json file"),
        (["finetune", "--method", "auto"], "--method auto needs --budget, such as --budget flops=0.3"),
        (["finetune", "--budget", "flops=0.3"], "--budget goes with --method auto, not lp_l1-4"),
        (["finetune", "--method", "plan:nowhere.json"], "nowhere.json"),
        (["finetune", "--method", "plan"], "does not say which plan; write plan:FILE"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_process_of_a_run_measures_the_same_images(monkeypatch):
    """Each loads a share of the training images, and all must come to one plan."""
    config, dataset, _ = RunFlags(method=PLANNED_LAYERS).new_run(None)
    measured = []
    monkeypatch.setattr(plan_command, "plan", lambda model, variables, batches, *_, **__: measured.append(batches) or SOME)
    for process in range(2):
        share = {"shard_index": process, "shard_count": 2}
        monkeypatch.setattr(plan_command, "loading", lambda *a, share=share: dataclasses.replace(loading(*a), **share))
        plan_command.chosen_plan(config, dataset, "flops=0.3", print, batches=2, batch_size=8)
    first, second = measured
    assert [len(labels) for _, labels in first] == [8, 8]
    chex.assert_trees_all_equal(first, second)


def test_an_official_projection_does_not_go_with_a_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    SOME.save(file)
    arguments = ["finetune", "--method", f"plan:{file}", "--projection", "official", "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "projection official does not go with a plan, whose projections are fitted" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_run_chooses_first_keeps_its_plan_and_goes_on(tmp_path, capsys):
    run, short = tmp_path / "run", ["--epochs", "1", "--batch-size", "256"]
    assert main(["finetune", *short, "--method", "auto", "--budget", "flops=0.3", "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    config = run_folder.read_config(run)
    assert config.method == "plan" and config.plan is not None and 0.27 <= config.plan.used <= 0.3
    assert f"flops={config.plan.used:.4f}" in printed
    assert main(["evaluate", str(run)]) == 0
    assert main(["plan", str(run), "--batches", "1", "--output", str(tmp_path / "of_run.json")]) == 0
    assert load_plan(tmp_path / "of_run.json").model == config.model
    capsys.readouterr()
    for flags in (["--budget", "flops=0.5"], ["--method", "auto", "--budget", "flops=0.5"]):
        assert main(["finetune", "--resume", str(run), "--epochs", "2", *flags]) == 2
        assert "--method auto and --budget do not go with --resume" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(run), "--epochs", "2"]) == 0
    assert run_folder.read_config(run).plan == config.plan
    file = tmp_path / "own.json"
    config.plan.save(file)
    again = tmp_path / "again"
    assert main(["finetune", *short, "--method", f"plan:{file}+lora_all-2", "--output", str(again)]) == 0
    assert run_folder.read_config(again).method == "plan+lora_all-2"
    assert run_folder.read_config(again).plan == config.plan
