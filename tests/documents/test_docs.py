"""The documents' Python examples run and their commands parse; the README's run as pasted. ``docs/check.py`` does the rest."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from pictures import dark_and_bright

from lbpwht_jax import create_model
from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.execute import load
from lbpwht_jax.weights import export_weights

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


EXAMPLES = {page.name: blocks(page, "python") for page in PAGES if page.name not in ("api.md", "README.md")}
SHELL = [
    (page.name, shlex.split(line.rpartition(" && ")[2], comments=True)[1:])
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.rpartition(" && ")[2].startswith("lbpwht ")
]


HEAVY = dict.fromkeys(("compile.md", "costs.md", "plan.md"), pytest.mark.heavy)  # they compile whole steps


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=HEAVY.get(page, ())) for page, examples in EXAMPLES.items() if examples]
)
def test_the_examples_of_a_page_run_in_turn(page, capsys):
    names = {}
    for number, block in enumerate(EXAMPLES[page], 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_each_of_the_readmes_snippets_runs_as_pasted(number, capsys):
    exec(compile(blocks(ROOT / "README.md", "python")[number], f"README.md, example {number + 1}", "exec"), {})


# the packages are there already, and the tests are what runs this
SHIM = """
set -e
pip() { true; }
pytest() { true; }
lbpwht() { "$PYTHON" -m lbpwht_jax.cli "$@"; }
"""
HUB_ID = "timm/efficientformer_l1.snap_dist_in1k"


def in_the_hubs_cache(home):
    """Puts random weights where the hub's client keeps those of ``HUB_ID``."""
    folder, commit = home / "hub" / f"models--{HUB_ID.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    model = create_model("efficientformer_l1")
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: np.asarray(rng.uniform(0.0, 0.1, leaf.shape), leaf.dtype), shapes)
    export_weights("efficientformer_l1", model, variables, folder / "snapshots" / commit / "model.safetensors", "timm")


@pytest.mark.heavy
@pytest.mark.parametrize("snippet", blocks(ROOT / "README.md", "sh"))
def test_each_of_the_readmes_shell_snippets_runs_as_pasted(snippet, tmp_path):
    (tmp_path / "pictures").mkdir()
    pictures = dark_and_bright(tmp_path / "pictures", 5)
    shutil.make_archive(str(tmp_path / "flowers"), "zip", pictures)
    shutil.copy(pictures / "bright" / "0.png", tmp_path / "image.jpg")  # what it is decides, not its name
    in_the_hubs_cache(tmp_path / "home")
    paths = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | paths
    done = subprocess.run(["bash", "-c", SHIM + snippet], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Run folder: runs/" in done.stdout
    if "export" in snippet:
        assert "image.jpg: " in done.stdout and (tmp_path / "flowers.safetensors").exists()


@pytest.mark.parametrize(("page", "arguments"), SHELL, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_commands_parse(page, arguments):
    tyro.cli(load(COMMANDS[arguments[0]]), args=arguments[1:])
