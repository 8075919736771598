"""Numerics on the device: the operation and the layers against float64 on the host, each difference with a written bound."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from accelerator_results import Row, fill
from accelerator_settings import Job
from flax import nnx

from lbpwht_jax import LowRankDense, LowRankSpec, low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.layers import LowRankLinear
from lbpwht_jax.ops import projection_matrices


class Case(NamedTuple):
    """Shapes and spec. A map is channels-last and has no other token axis than its grid's."""

    spec: LowRankSpec
    grid: tuple[int, ...]
    prefix: int = 0
    as_map: bool = False
    batch: int = 8
    channels: tuple[int, int] = (24, 40)


class Numbers(NamedTuple):
    """How numbers are computed, and the largest difference allowed, over the largest value."""

    dtype: str
    precision: jax.lax.Precision | None
    bound: float


_OFFICIAL = functools.partial(lp_l1, projection="official")
CASES = {
    "fitted": Case(lp_l1(4), (7, 7)),
    "official": Case(_OFFICIAL(4), (7, 7)),
    "prefix tokens": Case(lp_l1(4), (7, 7), 2),
    "official, prefix tokens": Case(_OFFICIAL(4), (5, 9), 1),
    "Linf": Case(lp_linf(2), (12, 9), 1),
    "named functions": Case(LowRankSpec(((0, 0), (0, 1), (1, 0), (2, 1), (2, 0), (1, 1))), (8, 8)),
    "blocks of 4": Case(lp_l1(3, block=4), (6, 10)),
    "a grid smaller than a block": Case(lp_l1(2), (3, 3)),
    "one axis": Case(lp_l1(3, ndim=1), (20,), 1),
    "three axes": Case(lp_l1(3, ndim=3, block=4), (3, 5, 4)),
    "several blocks": Case(lp_l1(4), (28, 20)),
    "several blocks, official": Case(_OFFICIAL(3), (28, 20), 2),
    "map": Case(lp_l1(4), (7, 9), as_map=True),
    "map of several blocks": Case(_OFFICIAL(4), (24, 28), as_map=True),
    "dx exact": Case(lp_l1(4, dx="exact"), (7, 7), 1),
    "dW exact": Case(lp_l1(4, dw="exact"), (7, 7), 1),
    "both exact": Case(lp_l1(4, dx="exact", dw="exact"), (7, 7)),
    "every function": Case(lp_l1(15), (7, 7)),
    "ViT-B's layer": Case(lp_l1(4), (14, 14), 1, channels=(768, 3072)),
    "EfficientFormer-L1's last stage": Case(lp_l1(4), (7, 7), batch=64, channels=(448, 1792)),
    "EfficientFormer-L1's first stage": Case(lp_l1(2), (56, 56), as_map=True, channels=(48, 192)),
    "SwinV2-S's layer": Case(lp_l1(6), (64, 64), as_map=True, batch=2, channels=(96, 384)),
}
NUMBERS = {
    # float32 sums of up to 8,192 products: rounding of 6e-8 each, added up
    "float32, highest precision": Numbers("float32", jax.lax.Precision.HIGHEST, 1e-5),
    # operands rounded to TF32 (5e-4) on a GPU or to bfloat16 (4e-3) on a TPU, twice: projection and product
    "float32, default precision": Numbers("float32", None, 1e-2),
    # coefficients and results are rounded to bfloat16 (4e-3), one after the other
    "bfloat16": Numbers("bfloat16", None, 2e-2),
}


def _operation(case: Case, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    grid = None if case.as_map else case.grid
    return low_rank_matmul(x, kernel, case.spec, grid, case.prefix, bias=bias, precision=precision)


def _linen(case: Case, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    grid = None if case.as_map else case.grid
    layer = LowRankDense(kernel.shape[1], case.spec, grid, case.prefix, precision=precision)
    return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)  # pyright: ignore[reportReturnType]


def _nnx(case: Case, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    arguments = {"grid": None if case.as_map else case.grid, "prefix_tokens": case.prefix, "precision": precision}
    layer = LowRankLinear(*kernel.shape, spec=case.spec, rngs=nnx.Rngs(0), param_dtype=kernel.dtype, **arguments)
    layer.kernel, layer.bias = nnx.Param(kernel), nnx.Param(bias)
    return layer(x)


def _injected(case: Case, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    product = case.spec.dot_general(grid=None if case.as_map else case.grid, prefix_tokens=case.prefix)
    layer = nn.Dense(kernel.shape[1], precision=precision, dot_general=product)
    return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)  # pyright: ignore[reportReturnType]


def _convolution(case: Case, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    layer = nn.Conv(kernel.shape[1], (1, 1), precision=precision, conv_general_dilated=case.spec.conv_general_dilated())
    return layer.apply({"params": {"kernel": kernel[None, None], "bias": bias}}, x)  # pyright: ignore[reportReturnType]


# What is called, and on which cases.
SUBJECTS: dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]] = {
    "low_rank_matmul": (_operation, tuple(CASES)),
    "LowRankDense": (_linen, ("prefix tokens", "map", "ViT-B's layer")),
    "LowRankLinear": (_nnx, ("prefix tokens", "map", "ViT-B's layer")),
    "nn.Dense(dot_general=...)": (_injected, ("prefix tokens", "map")),
    "nn.Conv(conv_general_dilated=...)": (_convolution, ("map", "EfficientFormer-L1's first stage")),
}


def arrays(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """Random x, kernel, bias and cotangent."""
    rng = np.random.default_rng(0)
    tokens = case.grid if case.as_map else (case.prefix + math.prod(case.grid),)
    inputs, outputs = case.channels
    shapes = ((case.batch, *tokens, inputs), (inputs, outputs), (outputs,), (case.batch, *tokens, outputs))
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)


def reference(case: Case, x: Any, kernel: Any, bias: Any, g: Any) -> dict[str, np.ndarray]:
    """``y, dx, dw, db`` in float64, by the written-out matrices of projection and expansion."""
    x, kernel, bias, g = (np.asarray(a).astype(np.float64) for a in (x, kernel, bias, g))
    analysis, synthesis = projection_matrices(case.spec, case.grid, case.prefix)
    flat_x, flat_g = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, g))
    low_x, low_g = analysis @ flat_x, analysis @ flat_g
    dx = flat_g @ kernel.T if case.spec.dx == "exact" else synthesis @ (low_g @ kernel.T)
    left, right = (flat_x, flat_g) if case.spec.dw == "exact" else (low_x, low_g)
    dw = left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
    return {"y": x @ kernel + bias, "dx": dx.reshape(x.shape), "dw": dw, "db": flat_g.sum((0, 1))}


@functools.lru_cache(maxsize=1)
def _case(name: str, dtype: str) -> tuple[tuple[jax.Array, ...], dict[str, np.ndarray], dict[str, float]]:
    """Arrays, what is wanted of them, and the sizes that differences are compared with.

    That of ``db`` is the largest sum of absolute values, because its terms cancel and each is rounded.
    """
    given = arrays(CASES[name], dtype)
    wanted = reference(CASES[name], *given)
    sizes = {key: float(np.abs(value).max()) for key, value in wanted.items()}
    g = np.abs(np.asarray(given[-1]).astype(np.float64))
    return given, wanted, {**sizes, "db": float(g.reshape(-1, g.shape[-1]).sum(0).max())}


def measure(subject: str, name: str, numbers: str) -> Row:
    """The largest differences of value and cotangents from float64, each over the size of what is wanted."""
    function, how = functools.partial(SUBJECTS[subject][0], CASES[name], NUMBERS[numbers].precision), NUMBERS[numbers]
    (x, kernel, bias, g), wanted, sizes = _case(name, how.dtype)

    @jax.jit
    def value_and_cotangents(x, kernel, bias, g):
        y, pullback = jax.vjp(function, x, kernel, bias)
        return y, *pullback(g)

    found = value_and_cotangents(x, kernel, bias, g)
    errors = {
        key: float(np.abs(np.asarray(a).astype(np.float64) - e).max()) / sizes[key]
        for a, (key, e) in zip(found, wanted.items(), strict=True)
    }
    facts = {"subject": subject, "case": name, "numbers": numbers, "bound": how.bound}
    return {**facts, "errors": errors, "within": all(error <= how.bound for error in errors.values())}


def run(job: Job) -> None:
    """Measures the part.

    Raises:
      ValueError: if a difference is larger than its bound; all rows are written all the same.
    """
    wanted: Mapping[str, Callable[[], Row]] = {
        f"{subject}: {case}, {numbers}": functools.partial(measure, subject, case, numbers)
        for numbers in NUMBERS
        for case in CASES
        for subject, (_, cases) in SUBJECTS.items()
        if case in cases
    }
    bounds = {name: how.bound for name, how in NUMBERS.items()}
    rows = fill(job.file, "numerics", {"machine": job.machine, "bounds": bounds}, wanted, job.settings.minutes)
    broken = [row for row in rows if not row.get("within")]
    if broken:
        lines = [f"{row['name']}: {row.get('failed') or row['errors']}, bound {row.get('bound')}" for row in broken]
        raise ValueError("differences from float64 that are larger than their bounds:\n" + "\n".join(lines))
