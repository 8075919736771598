"""Backward FLOPs as the authors of LBP-WHT counted them.

Tables 5 and 7 of the paper (Yang et al., 2023, arXiv 2309.15275) give FLOPs per image, read from a GPU's hardware counters; the
paper states no formula. This count comes to within 7 % of every row by these rules, with 2 FLOPs per multiply-add.

- Dense layers: dx and dW as needed, every number of channels and every LoRA rank rounded up to 16, as GPU kernels do.
- Convolutions: dx and dW, multiplications with padding left out. Attention: two products for each of the forward pass.
- Low-rank layers: dx and dW with R coefficients for each of ceil(h / 8) * ceil(w / 8) blocks, and sums over all 64 tokens of a
  block for each coefficient of input, output gradient and input gradient.
- Element-wise work costs a fixed number of FLOPs per element, bias gradients one.

Where they come from: R coefficients per block, blocks padded to 8x8 and the sums over all 64 tokens are what the authors' layer
computes. The rounding to 16 and the FLOPs per element stand nowhere in the paper: they were chosen by hand to meet the rows of
Tables 5 and 7, all of them in view. Fitted to every other row instead, the FLOPs per element are within 2.5 % (rms; 6.8 % at
worst) of the rows between, the ones here within 2.4 % (6.6 %): ``experiments/cost_constants.py``. The rows fix their sum well
and each of them poorly: a single constant is no measurement. Table 6 is arithmetic on the layers' shapes at batch 64, which
``experiments/cost_tables.py`` repeats.
"""

import math

from lbpwht_jax.cost.trace import Product, Record
from lbpwht_jax.ops.spec import LowRankSpec

_LANES = 16
FLOPS_PER_ELEMENT = {
    "gelu": 120,
    "layer_norm": 14,
    "pooling": 11,
    "batch_norm": 7,
    "layer_scale": 4,
    "softmax": 4,
    "add": 1,
}


def paper_flops(record: Record, spec: LowRankSpec | None = None) -> int:
    """Backward FLOPs of one image, as the authors count.

    Args:
      record: of the forward pass.
      spec: of its backward pass; ``None`` for an exact one.
    """
    if not isinstance(record, Product):
        return FLOPS_PER_ELEMENT[record.kind] * record.elements
    gradients = record.needs_dx + record.needs_dw
    inputs, outputs = record.channels
    bias = record.tokens * outputs * record.needs_db
    if not gradients:
        return bias
    if record.kind != "dense":
        return 2 * record.inside_macs * gradients + bias
    wide = _round_up(inputs) * _round_up(outputs)
    if spec is None:
        return 2 * record.tokens * wide * gradients + bias
    if record.grid is None:
        raise ValueError(f"{record.path}: its token grid is not known, so it cannot be low-rank")
    tokens = record.prefix_tokens + math.prod(record.grid)
    blocks = math.prod(math.ceil(n / spec.block) for n in record.grid)
    coefficients = (record.tokens // tokens) * (record.prefix_tokens + blocks * spec.rank)
    sums = inputs * (record.needs_dw + record.needs_dx) + outputs
    return coefficients * (2 * wide * gradients + spec.block**spec.ndim * sums) + bias


def _round_up(channels: int) -> int:
    return math.ceil(channels / _LANES) * _LANES
