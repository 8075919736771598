"""ConvNeXt against timm. Those of the small size and above take long: ``pytest -m heavy parity/test_convnext.py`` by hand."""

import pytest
import timm

from lbpwht_jax.models import list_models
from parity import util

LARGE = {"convnext_small", "convnext_base", "convnextv2_tiny"}


def reference(name):
    return util.randomise(timm.create_model(name, num_classes=util.CLASSES))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * (name in LARGE)) for name in list_models("convnext*")]
)
def test_logits_and_round_trip(name):
    model = reference(name)
    util.check_logits(name, model)
    util.check_round_trip(name, model)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_another_size_and_gradients(name):
    """Maps of 250 pixels are rounded down at every stage."""
    util.check_logits(name, reference(name), 250)
    util.check_gradients(name, reference(name), 96)


def test_low_rank():
    util.check_low_rank("convnextv2_atto", reference("convnextv2_atto"), 96)
