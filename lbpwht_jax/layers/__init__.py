"""Layers with a low-rank backward pass, for Linen and NNX."""

from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.layers.nnx import LowRankLinear

__all__ = ["LowRankDense", "LowRankLinear"]
