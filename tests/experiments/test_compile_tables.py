import json

import compile_families
import compile_layers
import compile_tables
import pytest

from lbpwht_jax.compile import CompilerError, Row


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled; the third step ends the run the first time."""
    done = []

    def compile_model(model, methods, target, train, batch_size, dtype):
        assert dtype == "bfloat16"
        done.append((model, *methods, train, target))
        if len(done) == 3:
            raise KeyboardInterrupt
        if methods == ("lora_all-8",):
            raise CompilerError("lora_all-8: the compiler ended with signal 6")
        size = 100 if methods == ("full",) else 80
        return [Row(model, methods[0], target, batch_size, temp_bytes=size * 2**20, moved_bytes=10**9, attention="plain")]

    monkeypatch.setattr(compile_tables, "compile_model", compile_model)
    return done


def test_a_run_that_was_cut_off_goes_on(compiled, tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = {"models": ("a", "b"), "methods": ("full", "lp_l1-4"), "targets": ("h100",), "output": file}
    with pytest.raises(KeyboardInterrupt):
        compile_tables.main(**arguments)
    assert len(json.loads(file.read_text())["rows"]) == 2
    compile_tables.main(**arguments)
    assert compiled == [
        ("a", "full", "all", "h100"),
        ("a", "lp_l1-4", "all", "h100"),
        *[("b", "full", "all", "h100")] * 2,
        (
            "b",
            "lp_l1-4",
            "all",
            "h100",
        ),
    ]
    assert "0.80" in capsys.readouterr().out


def test_a_step_that_does_not_compile_says_why(compiled, tmp_path):
    file = tmp_path / "rows.json"
    compiled += [None] * 3  # nothing ends this run
    assert compile_families.main(("a",), ("full", "lora_all-8"), ("h100",), output=file) == 2
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["train"], row.get("error")) for row in rows] == [
        ("full", "all", None),
        ("lora_all-8", "all", "lora_all-8: the compiler ended with signal 6"),
        ("full", "last_stage", None),
        ("lora_all-8", "last_stage", "lora_all-8: the compiler ended with signal 6"),
    ]


def test_layers_beside_the_exact_pass_and_what_is_possible(monkeypatch, tmp_path, capsys):
    layer = compile_layers.Layer(768, 3072, (7, 7))
    monkeypatch.setattr(compile_layers, "seconds", lambda layer, spec, batch, target: 1e-4 if spec is None else 5e-5)
    monkeypatch.setattr(compile_layers.Target, "check_installed", lambda target: None)
    monkeypatch.setattr(compile_layers.jax.config, "update", lambda *setting: None)
    file = tmp_path / "layers.json"
    compile_layers.main((2, 15), 256, (layer,), file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["speedup"] for row in rows] == [2, 2]
    moved = 2 * (256 * 49 * (768 + 768 + 3072) + 2 * 768 * 3072)
    assert rows[0]["bound"] == pytest.approx(1e-4 / (moved / 3350e9))
    assert [row["choice"] for row in rows] == ["low rank", "exact"]  # r = 15 keeps every function
    assert "768 -> 3072" in capsys.readouterr().out
