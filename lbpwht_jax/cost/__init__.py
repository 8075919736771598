"""What training costs: backward FLOPs and bytes kept, by layer and by model, and as the paper counts."""

from lbpwht_jax.cost.backward import abstract_variables, backward_flops, residual_bytes
from lbpwht_jax.cost.report import LayerCost, ModelCost, layer_costs, model_cost

__all__ = ["LayerCost", "ModelCost", "abstract_variables", "backward_flops", "layer_costs", "model_cost", "residual_bytes"]
