"""Times of the backward pass of one dense layer, exact and low-rank, each result compared with a slow reference first."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lbpwht_jax.bench import authors_form
from lbpwht_jax.bench.timing import bandwidth, interleaved, peak_flops
from lbpwht_jax.ops.basis import projection_matrices
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.heuristic import predicted_speedup
from lbpwht_jax.ops.matmul import low_rank_matmul
from lbpwht_jax.ops.spec import LowRankSpec

_AUTHORS_ROUNDS = 3


class Layer(NamedTuple):
    """Input channels, output channels, and height and width of the token grid."""

    inputs: int
    outputs: int
    grid: tuple[int, int]


# The layers of the paper's Table 8, then one of each other stage of EfficientFormer-L1.
TABLE_8 = (Layer(448, 1792, (7, 7)), Layer(1792, 448, (7, 7)), Layer(768, 3072, (7, 7)), Layer(3072, 768, (7, 7)))
STAGES = (Layer(48, 192, (56, 56)), Layer(96, 384, (28, 28)), Layer(224, 896, (14, 14)))


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer at one rank.

    Attributes:
      inputs: input channels.
      outputs: output channels.
      grid: height and width of the token grid.
      batch: number of images.
      r: the r of LP_{L1-r}.
      dense_seconds: time of the exact backward pass, which is two products.
      seconds: time of the low-rank backward pass, including the projection of the input in the forward pass.
      speedup: ``dense_seconds`` over ``seconds``.
      flop_ratio: FLOPs of the exact matrix products over those of the low-rank ones, Walsh transforms included.
      efficiency: ``speedup`` over ``flop_ratio``.
      floor_seconds: least time that the low-rank pass can take: its FLOPs at the measured peak, or the bytes of its inputs and
        outputs, each moved once, at the measured bandwidth, whichever takes longer.
      over_floor: ``seconds`` over ``floor_seconds``.
      authors_seconds: time of the authors' form, if asked for.
      predicted: the speed-up that the automatic choice expects (``predicted_speedup``).
      error: largest difference of a cotangent from the reference, over its largest value.
    """

    inputs: int
    outputs: int
    grid: tuple[int, int]
    batch: int
    r: int
    dense_seconds: float
    seconds: float
    speedup: float
    flop_ratio: float
    efficiency: float
    floor_seconds: float
    over_floor: float
    authors_seconds: float | None
    predicted: float
    error: float


class Limits(NamedTuple):
    """What the device can do: FLOP/s of a large product, and bytes/s."""

    peak_flops: float
    bandwidth: float

    @classmethod
    def measured(cls, dtype: Any) -> "Limits":
        """The default device's limits, for products of this dtype."""
        return cls(peak_flops(dtype), bandwidth())


def measure_layer(
    layer: Layer,
    batch: int,
    specs: Mapping[int, LowRankSpec],
    dtype: str,
    rounds: int,
    limits: Limits,
    authors: bool = False,
) -> list[LayerRow]:
    """Times one layer's backward pass, exact and at every rank in turn.

    Args:
      layer: its channels and grid.
      batch: number of images; they are random.
      specs: by their r.
      dtype: of inputs and kernel, ``"float32"`` or ``"bfloat16"``.
      rounds: number of samples of each time; the median counts.
      limits: what the floors are computed from.
      authors: whether the authors' form is timed too, which takes long.

    Returns:
      A row for each rank.

    Raises:
      ValueError: if a result is off the reference; nothing is timed then.
    """
    inputs, outputs, grid = layer
    keys = jax.random.split(jax.random.key(batch * inputs), 3)
    tokens = math.prod(grid)
    shapes = ((batch, tokens, inputs), (inputs, outputs), (batch, tokens, outputs))
    x, kernel, g = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    passes = {0: backward_pass(lambda x, kernel: x @ kernel)}
    for r, spec in specs.items():
        passes[r] = backward_pass(lambda x, kernel, spec=spec: low_rank_matmul(x, kernel, spec, grid))
    errors = {r: _error(passes[r](x, kernel, g), _reference(x, kernel, g, spec, grid)) for r, spec in specs.items()}
    for r, error in errors.items():
        if not error < _tolerance(dtype):
            raise ValueError(f"{inputs}->{outputs} on {grid}, r={r}: off the reference by {error:.1e}; nothing was timed")
    seconds = interleaved({str(r): (lambda f=f: f(x, kernel, g)) for r, f in passes.items()}, rounds)
    slow = {}
    if authors:
        forms = {
            r: jax.jit(lambda x, kernel, g, spec=spec: authors_form.backward(x, kernel, g, spec, grid))
            for r, spec in specs.items()
        }
        slow = interleaved({str(r): (lambda f=f: f(x, kernel, g)) for r, f in forms.items()}, min(rounds, _AUTHORS_ROUNDS))
    flops = {r: product_flops(f, x, kernel, g) for r, f in passes.items()}
    moved = sum(array.nbytes for array in (x, kernel, g, x, kernel))
    rows = []
    for r, spec in specs.items():
        floor = max(flops[r] / limits.peak_flops, moved / limits.bandwidth)
        speedup, ratio = seconds["0"] / seconds[str(r)], flops[0] / flops[r]
        times = (seconds["0"], seconds[str(r)], speedup, ratio, speedup / ratio, floor, seconds[str(r)] / floor)
        predicted = predicted_speedup(spec, grid, 0, inputs, outputs)
        rows.append(LayerRow(inputs, outputs, grid, batch, r, *times, slow.get(str(r)), predicted, errors[r]))
    return rows


def _tolerance(dtype: str) -> float:
    """Largest difference from the reference, over the largest value: rounding of sums of up to 800,000 products.

    By default accelerators round the operands of float32 products, to TF32 or to bfloat16.
    """
    if dtype == "bfloat16":
        return 3e-2
    return 1e-4 if jax.default_backend() == "cpu" else 1e-2


def backward_pass(product: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled cotangents of input and kernel; the forward product is not used and so not computed."""
    return jax.jit(lambda x, kernel, g: jax.vjp(product, x, kernel)[1](g))


def _reference(x: Any, kernel: Any, g: Any, spec: LowRankSpec, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents in float64 by the written-out matrices: dx of the first image, dW of all."""
    analysis, synthesis = projection_matrices(spec, grid)
    x, g = np.asarray(x), np.asarray(g)
    dw = np.zeros(kernel.shape)
    for one_x, one_g in zip(x, g, strict=True):
        dw += (analysis @ one_x.astype(np.float64)).T @ (analysis @ one_g.astype(np.float64))
    return synthesis @ (analysis @ g[0].astype(np.float64)) @ np.asarray(kernel, np.float64).T, dw


def _error(cotangents: tuple[jax.Array, jax.Array], reference: tuple[np.ndarray, np.ndarray]) -> float:
    pairs = zip((cotangents[0][0], cotangents[1]), reference, strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - e).max() / np.abs(e).max()) for a, e in pairs)
