"""DINOv3 against timm. Those of the base size and above take long: ``pytest -m heavy parity/test_dinov3.py`` by hand."""

import pytest
import timm

from lbpwht_jax.models import list_models
from parity import util

SMALL = "vit_small_patch16_dinov3_qkvb"


def reference(name):
    return util.randomise(timm.create_model(name, num_classes=util.CLASSES))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * ("_small_" not in name)) for name in list_models("*dinov3*")]
)
def test_logits_and_round_trip(name):
    model = reference(name)
    util.check_logits(name, model)
    util.check_round_trip(name, model)


def test_logits_at_another_size():
    util.check_logits(SMALL, reference(SMALL), 336)


def test_gradients():
    util.check_gradients(SMALL, reference(SMALL), 224)
