"""The operation: Walsh functions on a token grid, the projection onto them, and products whose backward pass uses it."""
