"""Weights on disk, both ways: safetensors, torch files, timm's, transformers' and the authors' names, PEFT's adapters."""
