"""Clocks: the time that low-rank backpropagation saves in a layer and in a training step, and how far from the limit it is."""
