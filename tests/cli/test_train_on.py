"""Training on: another number of epochs for a run that is there, and a run as what another one starts from."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import pytest
from pictures import dark_and_bright

from lbpwht_jax.cli import main
from lbpwht_jax.cli.run_flags import RunFlags
from lbpwht_jax.runs.config import RunConfig, check_unchanged
from lbpwht_jax.runs.folder import read_config
from lbpwht_jax.runs.metrics import read_metrics
from lbpwht_jax.train import Recipe
from lbpwht_jax.weights.files import load_weights

OPTIONS = ["--method", "full", "--train", "head", "--batch-size", "8", "--warmup-steps", "0", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of ten small images each: sixteen to train on, two steps an epoch."""
    return dark_and_bright(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *OPTIONS, "--dataset", f"folder:{images}", "--epochs", "2", "--output", str(folder)]) == 0
    return folder


@pytest.mark.heavy
def test_epochs_train_on(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    assert main(["finetune", "--resume", str(folder), "--epochs", "2"]) == 2
    assert "is finished; there is nothing to resume, but --epochs with a larger total trains on" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(folder), "--epochs", "1"]) == 2
    assert "--epochs 1: the run has done 4 steps of 2 an epoch, and --epochs is the total" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(folder), "--epochs", "4", "--lr", "1"]) == 2
    assert "--lr 1.0: the run" in capsys.readouterr().err
    assert (folder / "result.json").exists() and read_config(folder).extended == ()
    assert main(["finetune", "--resume", str(folder), "--epochs", "4"]) == 0
    rates = [float(Recipe(epochs, lr=1e-2, warmup_steps=0).schedule(2 * epochs)(4)) for epochs in (4, 2)]
    said = "4 epochs in all, until now 2: from step 4 on, the learning rate follows the cosine of all 4. "
    assert f"{said}It is {rates[0]:.3g} now; it would have been {rates[1]:.3g}." in capsys.readouterr().out
    steps, epochs = read_metrics(folder)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8] and len(epochs) == 4
    assert steps[:4] == read_metrics(run)[0]
    config = read_config(folder)
    assert (config.recipe.epochs, config.extended) == (4, ((4, 2),))
    assert json.loads((folder / "config.json").read_text())["steps"] == 8


def test_what_was_planned_after_a_checkpoint_is_forgotten():
    config = RunFlags(method="full").new_run(None)[0]
    again = RunConfig.from_json(json.dumps(config.with_epochs(20, 300).with_epochs(30, 400).to_json()))
    assert (again.recipe.epochs, again.extended) == (30, ((300, 15), (400, 20)))
    assert again.with_epochs(30, 350).extended == ((300, 15), (350, 20))
    assert again.with_epochs(15, 200).extended == ()
    # checkpoints from before a change, and from after it, are the run's
    for step, recorded in ((300, config), (350, config.with_epochs(20, 300)), (400, again)):
        check_unchanged(again, recorded.to_json(), Path("run"), step)
    with pytest.raises(ValueError, match=r"recipe.epochs is 15, but checkpoint 300 was made with 14"):
        check_unchanged(again, config.to_json() | {"recipe": config.to_json()["recipe"] | {"epochs": 14}}, Path("run"), 300)


@pytest.mark.heavy
def test_training_stops_where_validation_does_not_get_better(images, tmp_path, capsys):
    """With a learning rate of next to nothing no epoch beats the first: patience 2 ends it after the third."""
    folder = tmp_path / "run"
    options = [
        "--method",
        "full",
        "--train",
        "head",
        "--batch-size",
        "8",
        "--dataset",
        f"folder:{images}",
        "--validation",
        "0.2",
    ]
    options += ["--epochs", "9", "--patience", "2", "--lr", "1e-12", "--optimizer", "lion", "--class-weights", "balanced"]
    assert main(["finetune", *options, "--layer-decay", "0.5", "--output", str(folder)]) == 0
    assert "none of the last 2 epochs beat epoch 1, " in " ".join(capsys.readouterr().out.split())
    steps, epochs = read_metrics(folder)
    assert len(epochs) == 3 and steps[-1].number == epochs[-1].step
    before = (folder / "weights.safetensors").read_bytes()
    # a run that was cut off before its end was written does not train on
    (folder / "result.json").unlink()
    assert main(["finetune", "--resume", str(folder)]) == 0
    assert len(read_metrics(folder)[1]) == 3 and (folder / "weights.safetensors").read_bytes() == before
    assert main(["finetune", "--resume", str(folder), "--optimizer", "adamw"]) == 2
    assert "--optimizer adamw: the run" in capsys.readouterr().err


def test_alpha_dropout_and_batch_normalisation_reach_the_model():
    config = RunFlags(method="lora-4", lora_alpha=16.0, lora_dropout=0.1).new_run(None)[0]
    assert {(each.scale, each.dropout) for each in config.adapted().resolution.adaptations} == {(4.0, 0.1)}
    assert RunConfig.from_json(json.dumps(config.to_json())) == config
    for pretrained, frozen in (("none", False), ("bundled", True)):
        assert dataclasses.replace(config, pretrained=pretrained).module().settings.frozen_batch_norm is frozen


@pytest.mark.heavy
def test_a_run_as_a_start(run, images):
    config, _, notes = RunFlags(pretrained=str(run), dataset=f"folder:{images}").new_run(None)
    assert notes[1:] == [f"The head is that of {run}, which has the same classes."] and config.keeps_head()
    variables = config.start(config.adapted())
    chex.assert_trees_all_equal(variables, load_weights(run / "weights.safetensors")[0])
    other, _, notes = RunFlags(pretrained=str(run)).new_run(None)
    assert not notes[1:] and not other.keeps_head()
    fresh, trained = (tree["params"] for tree in (other.start(other.adapted()), variables))
    chex.assert_trees_all_equal(fresh["blocks_0"], trained["blocks_0"])
    assert fresh["head"]["kernel"].shape == (96, 10)
