"""Benchmarks: the time that low rank saves in a layer and in a training step, and how far that is from the limit."""
