"""What commands do unless told: layers that low rank would slow down stay exact, LoRA alone trains branches and head."""

import json

import pytest

from lbpwht_jax.adaptation import adapted_model, default_train, layer_counts
from lbpwht_jax.bench import ModelSteps
from lbpwht_jax.cli import cost, main
from lbpwht_jax.cli.run_flags import RunFlags
from lbpwht_jax.compile.compiling import check
from lbpwht_jax.cost import report
from lbpwht_jax.models import model_info

MICRO = "vit_micro_patch4_28"


@pytest.mark.parametrize(
    ("method", "train"),
    [("full", "all"), ("lp_l1-4", "all"), ("lora-8", "head"), ("lora_all-8", "head"), ("lp_l1-4+lora_all-8", "all")],
)
def test_what_is_trained_is_the_same_in_every_command(method, train, capsys, monkeypatch):
    def model_cost(*arguments):
        raise ValueError(f"asked for {arguments[1:3]}")

    monkeypatch.setattr(cost, "model_cost", model_cost)
    assert main(["cost", MICRO, "--method", method]) == 2
    assert f"asked for {(method, train)}" in capsys.readouterr().err
    assert default_train(method) == train
    assert ModelSteps(MICRO, None).trained(f"{method}+remat") == train
    [request] = check(MICRO, (method,), "cpu:1", 8, "float32", None, 10, "faster", "data", False, False)
    assert request.train == train
    assert RunFlags(method=method).new_run(None)[0].train == train
    # the functions of Python keep theirs, which the paper's tables are made with
    assert ModelSteps(MICRO).trained(method) == "all"


def test_what_low_rank_would_slow_down_is_counted_as_it_is_trained(capsys):
    """All 78 functions of LP_{L1-12} are more than the 49 tokens that a layer of this model has: low rank is slower."""
    names = ("low_rank_layers", "exact_by_choice", "exact_for_speed", "frozen")
    always = report.model_cost(MICRO, "lp_l1-12")
    assert [getattr(always, name) for name in names] == [24, 0, 0, 0]
    assert main(["cost", MICRO, "--method", "lp_l1-12", "--json"]) == 0
    faster = json.loads(capsys.readouterr().out)
    assert [faster[name] for name in names] == [0, 0, 24, 0]
    # as full backpropagation, whose FLOPs the ratio compares with
    assert faster["speedup_vs_full_paper"] == 1 > always.speedup_vs_full_paper


@pytest.mark.parametrize(
    ("method", "train", "counts"),
    [
        ("full", "all", (0, 24, 0, 0)),
        ("lp_l1-2", "last_stage", (4, 0, 0, 20)),
        ("lora-8", "head", (0, 12, 0, 12)),  # attention has branches, the other layers are frozen
        ("lp_l1-2+lora-8", "all", (24, 0, 0, 0)),
    ],
)
def test_layers_by_how_they_are_backpropagated(method, train, counts):
    assert layer_counts(model_info(MICRO), adapted_model(MICRO, method, train, 10)) == counts
