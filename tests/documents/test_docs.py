"""The documents' Python examples run and their commands parse; ``docs/check.py`` checks the rest."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

from lbpwht_jax import create_model
from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.execute import load

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


@pytest.mark.parametrize("page", [page for page, examples in EXAMPLES.items() if examples])
def test_the_examples_of_a_page_run_in_turn(page, capsys):
    names = {}
    for number, block in enumerate(EXAMPLES[page], 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)


def test_the_readmes_layer_runs():
    names = {}
    exec(blocks(ROOT / "README.md", "python")[0], names)
    x = jnp.ones((2, 1 + 14 * 14, 8))
    model = names["Mlp"]()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert jax.eval_shape(model.apply, variables, x).shape == x.shape
    jax.jit(jax.grad(lambda v: model.apply(v, x).sum()))(variables)


def test_the_readmes_rules_fit_a_model():
    model = create_model("vit_micro_patch4_28", num_classes=10, image_size=56)
    images = jnp.ones((1, 56, 56, 1))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    [block] = [block for block in blocks(ROOT / "README.md", "python") if "Freeze" in block]
    names = {"jax": jax, "model": model, "variables": variables, "images": images}
    exec(block.replace("print(", "table = str("), names)
    assert "LoRA + LowRank" in names["table"] and "14x14" in names["table"]
    assert names["logits"].shape == (1, 10)
    plain = jax.jit(model.apply)(names["adapted"].merge(names["variables"]), images)
    # merging adds products of the branches to the kernels in another order than the forward pass does
    assert float(jnp.abs(names["logits"] - plain).max()) < 1e-5


@pytest.mark.parametrize(("page", "arguments"), SHELL, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_commands_parse(page, arguments):
    tyro.cli(load(COMMANDS[arguments[0]]), args=arguments[1:])
