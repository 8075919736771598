"""Fine-tuning on image folders as people have them: three layouts, any names, every kind of image, one that is broken."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from terminal import terminal

from lbpwht_jax.cli import main
from lbpwht_jax.cli.run_flags import RecipeFlags, RunFlags
from lbpwht_jax.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CLASSES = ("Häuser", "猫")


def write(folder, count):
    """Images of both classes, of every kind; the last one of each class is named in another script."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 128, (10, 14, 4)) + 127 * label
            file = folder / name / f"{number}"
            kind = number % 4
            if kind == 0:
                Image.fromarray(pixels[..., :3].astype(np.uint8)).save(f"{file}.png")
            elif kind == 1:
                Image.fromarray(pixels.astype(np.uint8), "CMYK").save(f"{file}.jpg")
            elif kind == 2:
                Image.fromarray((pixels[..., 0] * 256).astype(np.uint16)).save(f"{file}.png")
            else:
                exif = Image.Exif()
                exif[0x0112] = 6  # to be turned by a quarter
                Image.fromarray(pixels[..., :3].astype(np.uint8)).save(f"{folder / name}/фото {number}.jpg", exif=exif)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The same images as PATH/{train,val,test}/CLASS, in which train/猫 has a broken file."""
    root = tmp_path_factory.mktemp("übung")
    for part, count in (("train", 12), ("val", 4), ("test", 4)):
        write(root / part, count)
    (root / "train" / CLASSES[1] / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return root


def flags(path, **recipe):
    return RunFlags(dataset=f"folder:{path}", method="full", numbers=RecipeFlags(**recipe))


def test_three_layouts_and_a_batch_that_fits(images, tmp_path):
    config, dataset, notes = flags(images).new_run(None)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (25, 8, 8)
    assert config.classes == CLASSES and config.recipe.batch_size == 24
    # eight devices in the tests: the largest multiple of eight
    assert notes == ["Batch size 24: the recipe's 64 is more than the 25 training images."]
    for part in ("train", "test"):
        (tmp_path / "two" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "two" / part).symlink_to(images / part)
    config, dataset, _ = flags(tmp_path / "two", batch_size=8).new_run(None)
    assert (len(dataset.train), dataset.validation, len(dataset.test)) == (25, None, 8)
    assert config.recipe.batch_size == 8
    config, dataset, notes = flags(images / "train", batch_size=8).new_run(None)
    assert (len(dataset.train), dataset.validation, len(dataset.test), notes) == (20, None, 5, [])


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["train_val_test", "train_test", "flat", "zip"])
def test_each_layout_is_trained_on(images, layout, tmp_path, capsys):
    """Two epochs of one step on crops of whole images; what cannot be read is told, whichever part it is in."""
    path, run = {"train_val_test": images, "flat": images / "train"}.get(layout, tmp_path / layout), tmp_path / "run"
    if layout == "train_test":
        path.mkdir()
        for part in ("train", "test"):
            (path / part).symlink_to(images / part)
    elif layout == "zip":
        path = Path(shutil.make_archive(str(path), "zip", images))
    arguments = ["--dataset", f"folder:{path}", "--method", "lora-2", "--lora-dropout", "0.1", "--epochs", "2"]
    arguments += ["--crop-scale", "0.3", "1", "--crop-from", "image", "--flip", "True", "--output", str(run)]
    assert main(["finetune", *arguments]) == 0
    validated, tests = layout in ("train_val_test", "zip"), 5 if layout == "flat" else 8
    epochs = read_metrics(run)[1]
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert all((epoch.test_accuracy is None) == validated for epoch in epochs)
    [broken] = json.loads((run / "skipped.json").read_text())
    assert broken.endswith(f"{CLASSES[1]}/broken.jpg")
    config, adapter = (json.loads((run / name).read_text()) for name in ("config.json", "adapter/adapter_config.json"))
    assert config["classes"] == [*CLASSES] and config["lora_dropout"] == adapter["lora_dropout"] == 0.1
    # docs/command_line.md lists the folder's files; of these the run has all but what other flags, or damage, bring
    table = (ROOT / "docs" / "command_line.md").read_text().split("## The run folder")[1].split("\n\n")[2]
    listed = {re.sub("/.*", "/", name) for row in table.splitlines() for name in re.findall("`(.*?)`", row.split("|")[1])}
    made = {each.name + "/" * each.is_dir() for each in run.iterdir()}
    assert listed - made == {"compare/", "compare.json", "compare.png", "*.damaged"} and made <= listed
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert (found["accuracy"], found["images"] + len(found["skipped"])) == (accuracy, tests)
    assert [row["class"] for row in found["classes"]] == [*CLASSES]


@pytest.mark.heavy
def test_a_run_on_the_screen(images, tmp_path):
    run = tmp_path / "run"
    arguments = ["--dataset", f"folder:{images}", "--train", "head", "--method", "full", "--epochs", "2", "--output", str(run)]
    with terminal(80) as recording:
        assert main(["finetune", *arguments]) == 0
    assert max(map(len, recording.lines)) <= 80 and "…" not in recording.raw
    text = " ".join(" ".join(recording.lines).split())
    for part in (
        "25 training, 8 validation and 8 test images are listed, 2 classes",
        "Trained (head): 194 of 677,954 parameters, 0.03%.",
        "24 frozen (--when faster).",
        "Training losses contain label smoothing of 0.1; the others do not.",
        "Batch size 24: the recipe's 64 is more than the 25 training images.",
        "1 listed images could not be read and count nowhere",
        "images that could not be read and count nowhere: 1, listed in",
        "epoch 2/2: training loss ",
        ", validation loss ",
    ):
        assert part in text
    [(name, reason)] = json.loads((run / "skipped.json").read_text()).items()
    assert name.endswith("broken.jpg") and reason
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for epoch in (line for line in lines if line["kind"] == "epoch"):
        mean = np.mean([line["loss"] for line in lines if line["kind"] == "step" and line["number"] == epoch["step"]])
        assert f"training loss {mean:.3f}, validation loss {epoch['validation_loss']:.3f}" in text
    with terminal(80) as recording:
        assert (
            main(["predict", str(run), str(images / "test" / "*" / "0.*"), str(images / "train" / CLASSES[1]), "--top-k", "1"])
            == 0
        )
    text = "\n".join(recording.lines)
    assert text.count("%") == 2 + 12 and "broken.jpg" in text.replace("\n", "")
