"""The flags of ``lbpwht finetune``: what is refused before anything is written, and what the help says."""

import dataclasses

import pytest

from lbpwht_jax.cli import main, run_flags
from lbpwht_jax.cli.run_flags import RunFlags
from lbpwht_jax.weights.timm_config import TimmConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lp_l1"], "unknown method 'lp_l1'; write full, lp_l1-R or lp_linf-R"),
        (["--method", "lp_l1-0"], "lp_l1: r must be from 1 to 15"),
        (["--method", "lp_linf-9"], "lp_linf: r must be from 1 to 8"),
        (["--method", "lora-8+lora_all-8"], "method 'lora-8+lora_all-8' names two of a kind; write full, lp_l1-R"),
        (["--lora-dropout", "0.1"], "--lora-dropout goes with a method that has LoRA, such as lora-8, not lp_l1-4"),
        (["--method", "full", "--lora-alpha", "4"], "--lora-alpha goes with a method that has LoRA, such as lora-8, not full"),
        (["--method", "lora-8", "--lora-dropout", "1"], "lora_dropout must be less than 1, got 1.0"),
        (["--train", "head"], "training the head alone leaves low-rank backpropagation no layer"),
        (["--epochs", "0"], "epochs must be greater than 0, got 0"),
        (["--lr", "-1"], "lr must be greater than 0, got -1.0"),
        (["--batch-size", "0"], "batch_size must be greater than 0, got 0"),
        (["--seed", "-1"], "seed must be greater than or equal to 0, got -1"),
        (["--seed", str(2**64)], "seed must be less than 4294967296, got 18446744073709551616"),
        (["--lr", "inf"], "lr must be a finite number, got inf"),
        (["--weight-decay", "inf"], "weight_decay must be a finite number, got inf"),
        (["--clip", "inf"], "clip must be a finite number, got inf"),
        (["--mixup", "nan"], "mixup must be a finite number, got nan"),
        (["--randaugment", "1000000", "5"], "randaugment.0 must be less than or equal to 100, got 1000000"),
        (["--image-size", "0"], "image_size must be greater than 0, got 0"),
        (["--workers", "0"], "workers must be positive, got 0"),
        (["--method", "lp_l1-\uff14"], "unknown method 'lp_l1-\uff14'"),
        (["--validation", "1"], "--validation must be a share of the training images, from 0 to less than 1, got 1.0"),
        (["--validation", "nan"], "--validation must be a share of the training images, from 0 to less than 1, got nan"),
        (["--batch-size", "5000"], "batch size 5000 is larger than the 1437 training images; lower it"),
        (["--batch-size", "60"], "a batch of 60 images cannot be shared equally by 8 devices"),
        (["--model", "vit_tiny"], "unknown model 'vit_tiny'; nearest: vit_tiny_patch16_224"),
        (["--model", "deit_tiny_patch16_224"], "no weights of deit_tiny_patch16_224 come with this package; give --pretrained"),
        (["--pretrained", "nowhere.safetensors"], "nowhere.safetensors: no such file or folder"),
        (["--dataset", "mnist"], "unknown data set 'mnist'"),
        (["--recipe", "paper"], "the paper has no recipe for digits"),
        (["--resume-step", "3"], "--resume-step goes with --resume RUN"),
        (["--checkpoint-every", "-1"], "--checkpoint-every must not be negative"),
        (["--coordinator", "localhost:1"], "--coordinator, --num-processes and --process-id go together"),
        (["--output", "/proc/run"], "cannot write the run folder /proc/run: "),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["finetune", "--output", str(tmp_path / "file")]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    for option in (
        "method",
        "projection",
        "epochs",
        "batch-size",
        "lr",
        "seed",
        "output",
        "compare",
        "train",
        "resume",
        "shard",
    ):
        assert f"--{option}" in text
    assert "lp_linf-R" in text and "Run folder" not in text


def test_every_flag_that_decides_what_a_run_computes_can_be_told_from_a_flag_not_given():
    def given(flags):
        for field in dataclasses.fields(flags):
            value = getattr(flags, field.name)
            yield from given(value) if dataclasses.is_dataclass(value) else [value]

    assert set(given(RunFlags())) == {None, False}


@pytest.mark.parametrize("known", [True, False])
def test_weights_of_the_hub_without_their_configuration_are_noted(monkeypatch, known):
    published = TimmConfig("config.json", "vit_tiny_patch16_224", {}) if known else None
    monkeypatch.setattr(run_flags, "timm_config", lambda source: published)
    name = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    config, _, notes = RunFlags(pretrained=name).new_run(None)
    assert config.model == "vit_tiny_patch16_224"
    expected = [] if known else [f"No config.json of {name} could be had: images are prepared as {config.model}'s usually are."]
    assert notes == expected
