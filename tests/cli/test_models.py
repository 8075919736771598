"""``lbpwht models``: its stored table, against the models and by hand."""

import json

import model_table
import pytest

from lbpwht_jax.cli import main
from lbpwht_jax.cli.models import stored
from lbpwht_jax.models import list_models, model_info

NAME = "vit_micro_patch4_28"


def test_the_table_has_every_model():
    assert list(stored()) == list_models()
    for name, row in stored().items():
        info = model_info(name)
        assert (row["image_size"], row["pattern"], row["family"]) == (
            info.images.size,
            info.layers.low_rank,
            info.module.__name__,
        )


def test_the_counts_are_the_models():
    assert stored()[NAME] == model_table.describe(NAME)


@pytest.mark.heavy
@pytest.mark.parametrize("name", list_models())
def test_all_counts_are_the_models(name):
    assert stored()[name] == model_table.describe(name)


def test_the_counts_by_hand():
    """Parameters as timm counts them; products from the architecture: 197 tokens, 12 blocks of 192 channels, 3 heads."""
    counted = stored()["vit_tiny_patch16_224"]
    assert (counted["parameters"], counted["low_rank_layers"]) == (5_717_416, 48)
    tokens, dim = 197, 192
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    assert counted["macs"] == 196 * 16 * 16 * 3 * dim + 12 * block + dim * 1000


def test_table_and_json(capsys):
    assert main(["models", "VIT_m*"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if NAME in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [NAME, "774,760", "0.04", "28", "24"]
    assert r"VisionTransformer: blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$" in out
    assert main(["models", "vit_m*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {NAME: stored()[NAME]}
    assert main(["models", "resnet*"]) == 2
    assert "no model matches 'resnet*'" in capsys.readouterr().err
