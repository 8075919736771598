"""Every part of ``experiments/accelerator.py`` on the CPU, with the bundled model and few images."""

import dataclasses
import json
import math

import accelerator
import accelerator_finetune
import accelerator_layers
import accelerator_memory
import accelerator_numerics
import accelerator_page
import accelerator_profile
import accelerator_results
import accelerator_roofline
import accelerator_steps
import jax
import numpy as np
import pytest
from accelerator_settings import Job, Settings
from jax.profiler import ProfileData
from PIL import Image

from lbpwht_jax.bench import Layer, ModelSteps, machine

pytestmark = [
    pytest.mark.heavy,
    # JAX's reader of profiles, on Python 3.12 and later
    pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning"),
]

MODEL = "vit_micro_patch4_28"
STEPS = {"model", "method", "train", "batch", "seconds", "images_per_second", "speedup", "backward_flops", "saved_bytes"}
KEYS = {
    "numerics": {"subject", "case", "numbers", "bound", "errors", "within"},
    "layers": {"inputs", "outputs", "grid", "batch", "r", "dense_seconds", "seconds", "speedup", "flop_ratio", "efficiency"}
    | {"floor_seconds", "over_floor", "authors_seconds", "authors_error", "predicted", "error"},
    "steps": STEPS | {"planned_peak_bytes", "full_seconds"},
    "memory": {"model", "method", "batch", "peak_bytes", "planned_peak_bytes", "state_bytes", "reason"},
    "roofline": {"model", "method", "batch", "target", "roofline_seconds", "moved_bytes", "flops", "temp_bytes", "reason"},
    "profile": {"model", "method", "batch", "steps", "kernel_seconds", "different_kernels", "kernels"},
    "finetune": {"model", "method", "batch", "finished", "steps", "training_seconds", "images_per_second", "epochs"},
}
PREPARE, PREPARED = ModelSteps.prepare, {}


@pytest.fixture
def job(tmp_path):
    settings = Settings(models=(MODEL,), methods=("full", "lp_l1-2"), batch_size=2, layer_batch=2, ranks=(2,), rounds=1)
    settings = dataclasses.replace(settings, data=tmp_path / "cifar10", epochs=1, work=tmp_path / "work")
    file = tmp_path / "results" / "accelerator_cpu.json"
    accelerator_results.begin(file, machine())
    return Job(settings, file, machine(), MODEL)


def rows_of(job, part):
    found = json.loads(job.file.read_text())["parts"][part]
    assert not found["left_out"]
    for row in found["rows"]:
        assert KEYS[part] <= row.keys() and "failed" not in row
    return {row["name"]: row for row in found["rows"]}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Steps are compiled for the first test that needs them."""

    def prepare(self, method):
        key = dataclasses.astuple(self), method
        if key not in PREPARED:
            PREPARED[key] = PREPARE(self, method)
        return PREPARED[key]

    monkeypatch.setattr(ModelSteps, "prepare", prepare)


@pytest.fixture
def few_cases(monkeypatch):
    cases = {name: accelerator_numerics.CASES[name] for name in ("prefix tokens", "map")}
    monkeypatch.setattr(accelerator_numerics, "CASES", cases)
    monkeypatch.setattr(
        accelerator_numerics,
        "SUBJECTS",
        {name: (f, tuple(c for c in own if c in cases)) for name, (f, own) in accelerator_numerics.SUBJECTS.items()},
    )
    return cases


def test_numerics_compares_the_operation_and_every_layer(job, few_cases):
    accelerator_numerics.run(job)
    rows = rows_of(job, "numerics")
    assert {row["subject"] for row in rows.values()} == accelerator_numerics.SUBJECTS.keys()
    assert {row["numbers"] for row in rows.values()} == accelerator_numerics.NUMBERS.keys()
    assert all(0 < max(row["errors"].values()) <= row["bound"] for row in rows.values())


@pytest.mark.parametrize("wrong", ["y", "dx", "dw", "db"])
def test_a_broken_bound_fails_once_all_is_written(job, few_cases, monkeypatch, wrong):
    correct = accelerator_numerics.reference
    highest = {"float32, highest precision": accelerator_numerics.NUMBERS["float32, highest precision"]}
    monkeypatch.setattr(accelerator_numerics, "NUMBERS", highest)
    monkeypatch.setattr(
        accelerator_numerics,
        "SUBJECTS",
        {"low_rank_matmul": (accelerator_numerics.SUBJECTS["low_rank_matmul"][0], tuple(few_cases))},
    )

    def reference(case, *arrays):
        wanted = correct(case, *arrays)
        if case.as_map:
            wanted[wrong] = wanted[wrong] * (1 + 1e-3)  # a hundred times the bound
        return wanted

    accelerator_numerics._case.cache_clear()
    monkeypatch.setattr(accelerator_numerics, "reference", reference)
    with pytest.raises(ValueError, match="low_rank_matmul: map, float32, highest precision"):
        accelerator_numerics.run(job)
    accelerator_numerics._case.cache_clear()
    assert [row["within"] for row in rows_of(job, "numerics").values()] == [True, False]


def test_layers_are_timed_beside_the_authors_form(job, monkeypatch):
    monkeypatch.setattr(accelerator_layers, "LAYERS", (Layer(16, 32, (7, 7)),))
    accelerator_layers.run(job)
    [row] = rows_of(job, "layers").values()
    assert row["authors_seconds"] > 0 and row["seconds"] > 0 and row["authors_error"] is None


def test_steps_go_on_where_they_were_cut_off(job, monkeypatch):
    measure = accelerator_steps.Comparison.measure

    def cut_off(self, method):
        if method != "full":
            raise KeyboardInterrupt
        return measure(self, method)

    monkeypatch.setattr(accelerator_steps.Comparison, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        accelerator_steps.run(job)
    before = json.loads(job.file.read_text())["parts"]["steps"]
    assert [row["method"] for row in before["rows"]] == ["full"] and before["left_out"] == [f"{MODEL} lp_l1-2"]
    monkeypatch.setattr(accelerator_steps.Comparison, "measure", measure)
    accelerator_steps.run(job)
    rows = rows_of(job, "steps")
    assert rows[f"{MODEL} full"] == before["rows"][0]
    low = rows[f"{MODEL} lp_l1-2"]
    assert low["speedup"] == pytest.approx(low["full_seconds"] / low["seconds"])
    with pytest.raises(ValueError, match="measured with batch=2, not 4"):
        accelerator_steps.run(dataclasses.replace(job, settings=dataclasses.replace(job.settings, batch_size=4)))


def test_what_there_is_no_time_for_is_left_out_until_the_next_run(job):
    wanted = dict.fromkeys("abc", dict)
    assert accelerator_results.fill(job.file, "steps", {}, wanted, minutes=-1) == []
    assert json.loads(job.file.read_text())["parts"]["steps"]["left_out"] == ["a", "b", "c"]
    assert [row["name"] for row in accelerator_results.fill(job.file, "steps", {}, wanted, minutes=1)] == ["a", "b", "c"]


def test_a_row_that_does_not_fit_the_memory_says_so(job):
    def fails():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    rows = accelerator_results.fill(job.file, "steps", {}, {"a": fails, "b": dict}, minutes=1)
    assert rows == [{"name": "a", "failed": "RESOURCE_EXHAUSTED: out of memory"}, {"name": "b"}]
    assert accelerator.problems(job.file, "steps") == ["steps: a: RESOURCE_EXHAUSTED: out of memory"]


class TooLarge(ModelSteps):
    """Steps of which full backpropagation does not fit the memory."""

    def prepare(self, method):
        if method == "full":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return super().prepare(method)


def test_without_full_backpropagation_there_is_nothing_to_compare_with():
    comparison = accelerator_steps.Comparison(TooLarge(MODEL, "all", 2, "bfloat16"), 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        comparison.measure("full")
    row = comparison.measure("lp_l1-2")
    assert row["seconds"] > 0 and row["speedup"] is None and row["full_seconds"] is None


def test_a_step_that_did_not_compile_beside_others_fails_where_it_is_timed():
    comparison = accelerator_steps.Comparison(TooLarge(MODEL, "all", 2, "bfloat16"), 1)
    comparison.compile(("full", "lp_l1-2"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        comparison.measure("full")
    assert comparison.measure("lp_l1-2")["seconds"] > 0


def test_models_side_by_side_compile_at_once_and_take_turns(job, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as it is set, and restored behind the test
    settings = dataclasses.replace(job.settings, models=(MODEL, MODEL), methods=("full",), side_by_side=True, output=job.file)
    accelerator.main(("steps", "profile"), settings)
    assert list(rows_of(job, "steps")) == list(rows_of(job, "profile")) == [f"{MODEL} full"]


def test_memory_of_a_step(job, monkeypatch):
    monkeypatch.setattr(accelerator_memory, "in_a_process", lambda cache, function, *arguments: function(*arguments))
    accelerator_memory.run(dataclasses.replace(job, settings=dataclasses.replace(job.settings, methods=("full",))))
    [row] = rows_of(job, "memory").values()
    assert row["peak_bytes"] is None and row["reason"] == accelerator_memory.NOT_TOLD


def test_a_step_smaller_than_its_compilation_is_run_once_more(monkeypatch):
    answers = iter([{"reason": accelerator_memory.COMPILING}, {"reason": None}])
    monkeypatch.setattr(accelerator_memory, "in_a_process", lambda *_: next(answers))
    assert accelerator_memory.measure(None, MODEL, "full", 2) == {"reason": None}


@pytest.mark.parametrize(
    "device, target",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("TPU v5 lite", "v5e:1x1"),
        ("TPU v6 lite", "v6e:1x1"),
        ("cpu", "cpu:1"),
        ("Quantum 9", None),
    ],
)
def test_the_target_of_a_device(device, target):
    assert accelerator_roofline.target_of(device) == target


def test_what_cannot_be_predicted_has_a_reason(job):
    results = json.loads(job.file.read_text())
    job.file.write_text(json.dumps({**results, "device": "Quantum 9"}))
    accelerator_roofline.run(job)
    rows = rows_of(job, "roofline")
    assert len(rows) == 2
    assert all(row["roofline_seconds"] is None and "--target" in row["reason"] for row in rows.values())


def test_the_profile_names_kernels(job, monkeypatch):
    monkeypatch.setattr(accelerator_profile, "METHODS", ("lp_l1-2",))
    accelerator_profile.run(job)
    [row] = rows_of(job, "profile").values()
    assert 1 <= len(row["kernels"]) <= 10
    assert all(kernel["seconds"] > 0 and kernel["runs"] > 0 and kernel["operations"] for kernel in row["kernels"])
    assert sum(kernel["share"] for kernel in row["kernels"]) <= 1 + 1e-9


def trace(plane, *lines):
    """A profile with one plane: lines are a name and events, each a kernel and its microseconds."""
    names = list(dict.fromkeys(name for _, events in lines for name, _ in events))
    metadata = "".join(f'event_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}\n' for n, name in enumerate(names, 1))
    text = ""
    for line, events in lines:
        made = "".join(f"events {{ metadata_id: {names.index(name) + 1} duration_ps: {us * 10**6} }}\n" for name, us in events)
        text += f'lines {{ name: "{line}" {made} }}\n'
    return ProfileData.from_text_proto(f'planes {{ name: "{plane}" {metadata} {text} }}')


def test_a_tpus_steps_and_programs_do_not_count_beside_their_operations():
    profile = trace(
        "/device:TPU:0", ("Steps", [("1", 9)]), ("XLA Modules", [("jit_f", 8)]), ("XLA Ops", [("dot", 5), ("add", 2)])
    )
    found = accelerator_profile.dearest(profile, steps=2)
    assert [(kernel["name"], kernel["runs"]) for kernel in found["kernels"]] == [("dot", 0.5), ("add", 0.5)]
    assert found["kernel_seconds"] == pytest.approx(3.5e-6)


def test_all_streams_of_a_gpu_count():
    lines = (
        ("Stream #1(Compute)", [("gemm", 4), ("gemm", 4)]),
        ("Stream #2(MemcpyD2D)", [("copy", 1)]),
        ("XLA Modules", [("f", 9)]),
    )
    found = accelerator_profile.dearest(trace("/device:GPU:0", *lines), steps=1)
    assert [(kernel["name"], kernel["runs"]) for kernel in found["kernels"]] == [("gemm", 2), ("copy", 1)]
    assert found["kernels"][0]["share"] == pytest.approx(8 / 9)


@pytest.fixture
def images(job):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 1)):
        for name in ("cat", "dog"):
            folder = job.settings.data / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{n}.png")


def test_finetune(job, images, monkeypatch):
    monkeypatch.setattr(accelerator_finetune, "MODEL", MODEL)
    monkeypatch.setattr(accelerator_finetune, "BATCH", 8)
    accelerator_finetune.run(job)
    [row] = rows_of(job, "finetune").values()
    assert row["finished"] and row["steps"] == 1 and len(row["epochs"]) == 1 and math.isfinite(row["last_loss"])
    assert row["images_per_second"] == pytest.approx(8 / row["median_step_seconds"])


def test_finetune_needs_images(job, capsys):
    accelerator_finetune.run(job)
    assert "is not there" in capsys.readouterr().out
    assert "finetune" not in json.loads(job.file.read_text())["parts"]


def test_parts_run_in_processes_of_their_own_and_the_page_shows_them(job, monkeypatch):
    settings = dataclasses.replace(job.settings, output=job.file, minutes=-1)
    accelerator.main(("steps", "roofline"), settings)
    parts = json.loads(job.file.read_text())["parts"]
    assert parts["steps"]["left_out"] == parts["roofline"]["left_out"] == [f"{MODEL} full", f"{MODEL} lp_l1-2"]
    monkeypatch.setattr(accelerator_page, "RESULTS", job.file.parent)
    page = accelerator_page.render()
    assert "## cpu" in page and f"- steps: {MODEL} full" in page and "Not measured yet." in page
    with pytest.raises(ValueError, match="measurements of cpu"):
        accelerator_results.begin(job.file, {"device": "TPU v9"})


def test_the_page_without_measurements(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_page, "RESULTS", tmp_path)
    assert accelerator_page.NOTHING in accelerator_page.render()
