"""Models under rules: low rank, LoRA and freezing, for Linen and NNX."""
