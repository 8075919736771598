"""The transfer sweep's statistics and its bookkeeping; what it measures is in experiments/results."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import paper_tables
import pytest
import transfer
import transfer_backbone
import transfer_report
import transfer_variants
from PIL import Image
from scipy import stats
from transfer_backbone import backbone, backbone_info
from transfer_images import read_split
from transfer_plans import planned_backbone
from transfer_variants import Variant

from lbpwht_jax.cost import backward_flops
from lbpwht_jax.weights.files import load_bundled, save_weights


def run(variant, seed, accuracy, train="all"):
    return {"variant": variant, "train": train, "seed": seed, "test_accuracy": accuracy}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two classes, dark and bright, of images that are not square."""
    path, rng = tmp_path_factory.mktemp("images") / "shades.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 40), ("test", 4)):
            for label, name in enumerate(("bright", "dark")):
                for i in range(count):
                    pixels = rng.integers(0, 64, (20, 30, 3)) + 160 * (1 - label)
                    with file.open(f"shades/{split}/{name}/{i}.png", "w") as entry:
                        Image.fromarray(pixels.astype(np.uint8)).save(entry, "PNG")
    return path


def test_the_interval_is_students():
    values = [70.0, 71.0, 73.5]
    mean, low, high = transfer_report.interval(values)
    # the one-sample t test at the bound is significant at exactly 5 %
    assert mean == np.mean(values)
    for bound in (low, high):
        assert stats.ttest_1samp(values, bound).pvalue == pytest.approx(0.05)
    assert transfer_report.interval([70.0])[1:] == (-np.inf, np.inf)


def test_differences_are_paired_over_the_seeds_that_have_both():
    runs = [run("a", 0, 0.7), run("b", 0, 0.6), run("a", 1, 0.8), run("b", 1, 0.75), run("a", 2, 0.9)]
    claim = transfer_report.Claim("a beats b", "a - b", ("a",), ("b",))
    assert claim.differences(transfer_report.accuracies(runs, "all")) == pytest.approx([10, 5])
    assert claim.differences(transfer_report.accuracies(runs, "last_stage")) == []


def test_a_claim_is_open_unless_the_whole_interval_says_so():
    claim = transfer_report.Claim("near", "a - b", ("a",), ("b",), bound=-0.5)
    assert [claim.verdict(*bounds) for bounds in ((-0.4, 1), (-0.5, 0), (-0.6, 1), (-2, -0.6))] == [
        "holds",
        "holds",
        "open",
        "does not hold",
    ]


def test_every_claim_is_about_runs_of_the_sweep():
    names = {variant.name for variant in transfer_variants.VARIANTS}
    heads = {f"{each.name}, {transfer_report.HEAD}" for each in transfer_variants.VARIANTS if each.trained_as("head")}
    claimed = {name for claim in transfer_report.CLAIMS for name in (*claim.plus, *claim.minus)}
    assert claimed <= names | heads
    drawn = {name for group, *_ in transfer_report.FAMILIES.values() for name in group}
    assert drawn == names


def test_the_same_images_are_taken_each_time(archive):
    images, classes = read_split([archive], "train", 16, per_class=3)
    again, _ = read_split([archive], "train", 16, per_class=3)
    assert classes == ("bright", "dark") and images.images.shape == (6, 16, 16, 3)
    assert np.array_equal(images.images, again.images)
    assert images.images[images.labels == 0].mean() > 150 > images.images[images.labels == 1].mean()


def test_branches_and_head_alone_stand_beside_the_whole_model():
    names = {variant.name for variant in transfer_variants.VARIANTS if variant.trained_as("head")}
    assert names == {"lora-8", "lora_all-8", "lora-8 (4 x lr)", "lora_all-8 (4 x lr)"}
    costs = {"backward_flops": 2e6, "saved_bytes": 3e6, "trainable_parameters": 4_000}
    runs = [run("lora-8", 0, 0.5) | costs, run("full", 0, 0.7) | costs]
    runs += [run("lora-8", seed, accuracy, "head") | costs for seed, accuracy in ((0, 0.4), (1, 0.6))]
    rows = transfer_report.table(runs, "all").splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| full", "| lora-8", "| lora-8, branches and head"]
    assert "50.00 % (40.00 to 60.00) | 2 | 2.0 | 3.00 | 4,000 |" in rows[2]
    assert "head" not in transfer_report.table(runs, "last_stage")


def test_branches_and_head_alone_are_compared_as_methods_of_their_own():
    runs = [run("a", 0, 0.7), run("a", 1, 0.8), run("b", 0, 0.6), run("b", 0, 0.5, "head"), run("b", 1, 0.75, "head")]
    claim = transfer_report.Claim("", "", ("a",), ("b, branches and head",), trains=("all",))
    assert claim.differences(transfer_report.accuracies(runs, "all")) == pytest.approx([20, 5])
    assert "b, branches and head" not in transfer_report.accuracies(runs, "last_stage")


@pytest.mark.heavy
def test_a_plan_stays_within_the_other_methods_flops(archive):
    dataset = transfer.read_dataset([archive], backbone_info().images.size, 40, 4, None)
    variables = jax.jit(backbone(2).init)(jax.random.key(0), jnp.zeros((1, *backbone_info().images.shape)))
    shape, classes = backbone_info().images.shape, 2
    for trained, other, others_train in (("last_stage", "lp_l1-2", None), ("all", "lora-8", "head")):
        plan = Variant("lp_l1-4", flops_of=other, flops_train=others_train)
        planned = planned_backbone(plan, trained, variables, dataset, seed=0)
        allowed = transfer_variants.adapted_backbone(Variant(other), others_train or trained, classes)
        most = backward_flops(allowed, allowed.with_branches(jax.random.key(1), variables), shape)
        assert 0.95 * most < backward_flops(planned, variables, shape) <= most


@pytest.mark.heavy
def test_a_sweep_goes_on_where_it_stopped(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer_backbone, "DEPTHS", (1, 1))  # compiles sooner
    info, weights, output = backbone_info(), tmp_path / "backbone.safetensors", tmp_path / "sweep.json"
    shape = (1, *info.images.shape)
    variables = jax.jit(backbone(5).init)(jax.random.key(0), jnp.zeros(shape))
    save_weights(weights, variables, {"test_accuracy": 0.2})
    setting = transfer_variants.Setting(train_per_class=8, test_per_class=4, epochs=2, batch_size=16)
    common = {"weights": weights, "output": output, "trains": ("last_stage",), "seeds": (0,), "setting": setting}
    transfer.main(archive, methods=("lp_l1-2",), limit=1, **common)
    transfer.main(archive, methods=("lp_l1-2",), **common)
    assert "1 runs done, 0 to do" in capsys.readouterr().out
    results = json.loads(output.read_text())
    [found] = results["runs"]
    assert found["variant"] == "lp_l1-2" and found["test_accuracy"] in np.arange(9) / 8
    # the last stage, the last norm and the two heads alone are trained
    stage = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["stages_1"]))
    width = info.arguments["dims"][-1]
    assert found["trainable_parameters"] == stage + 2 * width + 2 * (width + 1) * 2
    with pytest.raises(SystemExit, match=r"--processes must be between 1 and the \d+ cores, got 1000"):
        transfer.main(archive, methods=("full",), processes=1000, **common)
    with pytest.raises(SystemExit, match="another setting"):
        transfer.main(archive, methods=("full",), **{**common, "setting": transfer_variants.Setting(lr=1.0)})


def test_the_papers_tables_have_their_runs_and_say_what_is_missing(tmp_path, capsys):
    assert len(paper_tables.table_runs("5")) == 6 * 28
    assert len({each.name for each in paper_tables.table_runs("5")}) == 6 * 28
    with pytest.raises(SystemExit):
        paper_tables.main("7", tmp_path, dry_run=True)
    printed = capsys.readouterr().out
    assert "0 of 7 runs" in printed
    assert "lbpwht prepare tfds:places365_small" in printed and "timm/efficientformer_l1" in printed


@pytest.mark.heavy
def test_the_papers_tables_go_on_where_they_stopped(archive, tmp_path, capsys, monkeypatch):
    model, weights, runs = "vit_micro_patch4_28", tmp_path / "weights", tmp_path / "runs"
    chosen = [paper_tables.Run(model, "cifar10", method, "last_stage") for method in ("full", "lp_l1-2")]
    monkeypatch.setattr(paper_tables, "table_runs", lambda number: chosen)
    weights.mkdir()
    variables, metadata = load_bundled()
    save_weights(weights / f"{model}.safetensors", variables, metadata)
    (tmp_path / "cifar10.zip").symlink_to(archive)

    def run_table(**arguments):
        where = {"weights": weights, "runs": runs, "output": tmp_path / "table.json"}
        paper_tables.main("5", tmp_path, epochs=1, models=(model,), **where, **arguments)
        return json.loads((tmp_path / "table.json").read_text())["rows"]

    with pytest.raises(FileNotFoundError):
        run_table(dry_run=True)
    [first] = run_table(limit=1)
    before = (tmp_path / "table.json").stat()
    run_table(dry_run=True)
    assert (tmp_path / "table.json").stat().st_ino == before.st_ino
    assert first["method"] == "full" and first["test_accuracy"] in np.arange(9) / 8
    assert first["recipe"]["batch_size"] == 64 and first["recipe"]["epochs"] == 1
    rows = run_table()
    assert rows[0] == first and rows[1]["method"] == "lp_l1-2"
    assert rows[1]["backward_flops"] < first["backward_flops"]
    # one that was cut off is resumed from its last checkpoint
    (runs / "table_5" / f"{chosen[1].name}-float32-1" / "result.json").unlink()
    capsys.readouterr()
    assert run_table()[1]["test_accuracy"] == rows[1]["test_accuracy"]
    assert "lbpwht finetune --resume" in capsys.readouterr().out
