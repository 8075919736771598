"""Layers with a low-rank backward pass, for Linen and NNX."""
