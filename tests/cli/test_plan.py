"""``lbpwht plan``, and runs by a plan."""

import json

import pytest

from lbpwht_jax.adaptation import load_plan
from lbpwht_jax.cli import main
from lbpwht_jax.runs import folder as run_folder


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
        (["finetune", "--method", "auto"], "--method auto needs --budget, such as --budget flops=0.3"),
        (["finetune", "--budget", "flops=0.3"], "--budget goes with --method auto, not lp_l1-4"),
        (["finetune", "--method", "plan:nowhere.json"], "nowhere.json"),
        (["finetune", "--method", "plan"], "does not say which plan; write plan:FILE"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


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
    assert main(["finetune", "--resume", str(run), "--epochs", "2"]) == 0
    assert run_folder.read_config(run).plan == config.plan
    file = tmp_path / "own.json"
    config.plan.save(file)
    again = tmp_path / "again"
    assert main(["finetune", *short, "--method", f"plan:{file}+lora_all-2", "--output", str(again)]) == 0
    assert run_folder.read_config(again).method == "plan+lora_all-2"
    assert run_folder.read_config(again).plan == config.plan
