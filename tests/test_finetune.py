import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from lbpwht_jax.cli import main
from lbpwht_jax.data import digits
from lbpwht_jax.models import create_model, model_info
from lbpwht_jax.train import evaluate, make_eval_step
from lbpwht_jax.weights import load_weights


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A short run beside full backpropagation and LP_{L1-2}: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["finetune", "--epochs", "3", "--compare", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def folders(folder):
    return {"lp_l1-4": folder, "full": folder / "compare" / "full", "lp_l1-2": folder / "compare" / "lp_l1-2"}


def test_the_run_folder_is_complete(compared):
    for method, folder in folders(compared[0]).items():
        config = json.loads((folder / "config.json").read_text())
        assert config["method"] == method and config["dataset"] == "digits"
        assert config["recipe"]["epochs"] == 3
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["number"] for line in lines if line["kind"] == "step"] == list(range(1, 67))
        accuracies = [line["test_accuracy"] for line in lines if line["kind"] == "epoch"]
        assert len(accuracies) == 3
        assert json.loads((folder / "result.json").read_text())["test_accuracy"] == accuracies[-1]
        with Image.open(folder / "curves.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5


def test_the_weights_rebuild_the_model(compared):
    variables, metadata = load_weights(compared[0] / "weights.safetensors")
    model = create_model(metadata["model"], num_classes=len(metadata["classes"]))
    step = make_eval_step(model, model_info(metadata["model"]))
    accuracy, _ = evaluate(step, variables, digits(28, 0).test, 64)
    assert accuracy == json.loads((compared[0] / "result.json").read_text())["test_accuracy"]
    # three of fifteen epochs: far from chance, short of the end
    assert accuracy > 0.5


def test_the_table_shows_every_method(compared):
    folder, printed = compared
    for method, path in folders(folder).items():
        result = json.loads((path / "result.json").read_text())
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {method} "))
        for value in (
            f"{result['test_accuracy']:.2%}",
            f"{result['backward_flops'] / 1e6:.1f}",
            f"{result['saved_bytes'] / 1e3:,.0f}",
        ):
            assert value in row
    assert str(folder) in printed


def test_low_rank_is_cheaper_than_full(compared):
    results = {m: json.loads((path / "result.json").read_text()) for m, path in folders(compared[0]).items()}
    for key in ("backward_flops", "saved_bytes"):
        assert results["lp_l1-2"][key] < results["lp_l1-4"][key] < results["full"][key]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lp_l1"], "unknown method 'lp_l1'; write full, lp_l1-R or lp_linf-R"),
        (["--method", "lp_l1-0"], "lp_l1: r must be from 1 to 15"),
        (["--method", "lp_linf-9"], "lp_linf: r must be from 1 to 8"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--batch-size", "5000"], "--batch-size must be at most 1437, the number of training images"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--output", "/proc/run"], "cannot write the run folder /proc/run: "),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_output_folder_is_never_overwritten(compared, capsys):
    before = (compared[0] / "metrics.jsonl").read_bytes()
    assert main(["finetune", "--output", str(compared[0])]) == 2
    assert "already holds a run; name another --output, or delete it" in capsys.readouterr().err
    assert (compared[0] / "metrics.jsonl").read_bytes() == before


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["finetune", "--output", str(tmp_path / "file")]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    for option in ("method", "projection", "epochs", "batch-size", "lr", "seed", "output", "compare"):
        assert f"--{option}" in text
    assert "lp_linf-R" in text and "Run folder" not in text
