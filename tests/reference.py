"""Low-rank backprop written out slowly in float64 numpy, sharing nothing with the package but the spec's fields."""

import itertools

import numpy as np
import scipy.linalg


def walsh(n):
    """Sylvester's Hadamard matrix with its rows sorted by their number of sign changes."""
    rows = scipy.linalg.hadamard(n).astype(np.float64)
    return rows[np.argsort((np.diff(rows, axis=1) != 0).sum(1))]


def first_padding(length, block):
    return (-length % block + 1) // 2


def axis_blocks(length, block):
    """For each block of an axis: the tokens in it and their places inside the block."""
    first = first_padding(length, block)
    blocks = {}
    for token in range(length):
        blocks.setdefault((token + first) // block, []).append((token, (token + first) % block))
    return [([t for t, _ in pairs], [p for _, p in pairs]) for pairs in blocks.values()]


def fitted_projector(spec, grid):
    """Orthogonal projector onto the span of the selected functions restricted to each block's tokens, by pseudo-inverse.

    It equals the package's definition for selections closed downwards.
    """
    functions = walsh(spec.block)
    tokens = np.arange(np.prod(grid)).reshape(grid)
    projector = np.zeros((tokens.size, tokens.size))
    for parts in itertools.product(*(axis_blocks(length, spec.block) for length in grid)):
        index = tokens[np.ix_(*(members for members, _ in parts))].ravel()
        span = []
        for basis in spec.bases:
            column = np.ones(1)
            for k, (_, places) in zip(basis, parts, strict=True):
                column = np.kron(column, functions[k, places])
            span.append(column)
        span = np.array(span).T
        projector[np.ix_(index, index)] = span @ np.linalg.pinv(span, rcond=1e-10)
    return projector


def official_gradients(x, kernel, g, spec, grid):
    """``(dx, dw)`` by the authors' description: reflect, sum x and average g over every function, multiply, expand, crop."""
    functions, n, channels = walsh(spec.block), spec.block, x.shape[-1]
    pads = [(first_padding(length, n), -length % n - first_padding(length, n)) for length in grid]

    def blocks(a):
        a = np.pad(a.reshape(-1, *grid, a.shape[-1]), [(0, 0), *pads, (0, 0)], mode="reflect")
        shape = [size for length in a.shape[1:-1] for size in (length // n, n)]
        return a.reshape(a.shape[0], *shape, a.shape[-1])

    def analyse(a, basis):
        a = blocks(a)
        for axis in reversed(range(len(grid))):
            a = np.einsum("...k,k->...", np.moveaxis(a, 2 + 2 * axis, -1), functions[basis[axis]])
        return a

    dw = np.zeros_like(kernel)
    dx = np.zeros_like(blocks(x))
    for basis in spec.bases:
        xs, gs = analyse(x, basis), analyse(g, basis) / n ** len(grid)
        dw += xs.reshape(-1, channels).T @ gs.reshape(-1, g.shape[-1])
        term = gs @ kernel.T
        for axis, k in enumerate(basis):
            term = np.expand_dims(term, 2 + 2 * axis)
            term = term * functions[k].reshape([-1 if d == 2 + 2 * axis else 1 for d in range(term.ndim)])
        dx += term
    dx = dx.reshape(x.shape[0], *(d1 * n for d1 in dx.shape[1:-1:2]), channels)
    crop = tuple(slice(first, first + length) for (first, _), length in zip(pads, grid, strict=True))
    return dx[(slice(None), *crop)].reshape(x.shape), dw


def gradients(x, kernel, g, spec, grid, prefix_tokens=0):
    """``(dx, dw)`` for x of shape ``[batch, prefix_tokens + tokens, in]``, all float64."""
    head, x = x[:, :prefix_tokens], x[:, prefix_tokens:]
    g_head, g = g[:, :prefix_tokens], g[:, prefix_tokens:]
    if spec.projection == "fitted":
        projector = fitted_projector(spec, grid)
        low_x = np.einsum("tu,buc->btc", projector, x)
        low_g = np.einsum("tu,buc->btc", projector, g)
        dx, dw = low_g @ kernel.T, np.einsum("bti,bto->io", low_x, low_g)
    else:
        dx, dw = official_gradients(x, kernel, g, spec, grid)
    if spec.dx == "exact":
        dx = g @ kernel.T
    if spec.dw == "exact":
        dw = np.einsum("bti,bto->io", x, g)
    dw = dw + np.einsum("bti,bto->io", head, g_head)
    return np.concatenate([g_head @ kernel.T, dx], axis=1), dw
