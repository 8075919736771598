"""Bytes kept by kind, against what layers are said to cost; the kinds are read off the traced backward pass."""

import pytest
from kept_by_kind import CLASSES, kept_by_kind

from lbpwht_jax.adaptation import adapted_model
from lbpwht_jax.cost import abstract_variables, layer_costs, residual_bytes
from lbpwht_jax.models import model_info


@pytest.mark.parametrize("residuals", ["plain", "lean"])
@pytest.mark.parametrize("method", ["full", "lp_l1-4"])
def test_dense_layers_keep_what_they_cost_and_the_kinds_are_all(method, residuals):
    name = "vit_micro_patch4_28"
    model, shape = adapted_model(name, method, num_classes=CLASSES, residuals=residuals), model_info(name).images.shape
    variables = abstract_variables(model, shape)
    found = kept_by_kind(name, method, residuals)
    costs = layer_costs(model, variables, shape)
    dense = sum(layer.saved_activation_bytes for layer in costs if layer.kind == "dense" and layer.path != "patch_embed/proj")
    assert found["dense layers"] == pytest.approx(dense / 1e6)
    assert sum(found.values()) == pytest.approx(residual_bytes(model, variables, shape) / 1e6)
    # the MLP's slopes, 4 bytes or 1, of as many numbers as the second layers' inputs have, or of 17 rows in place of 50
    exact = layer_costs(adapted_model(name, "full", num_classes=CLASSES), variables, shape)
    hidden = [layer for layer in exact if layer.path.endswith("mlp/fc2")]
    slopes = sum(layer.saved_activation_bytes for layer in hidden) / (4 if residuals == "lean" else 1)
    slopes *= 17 / 50 if (method, residuals) == ("lp_l1-4", "lean") else 1
    assert found["activations"] == pytest.approx(slopes / 1e6)
