"""How long layers' backward passes take on the device at hand, for budgets in seconds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.bench.timing import interleaved
from lbpwht_jax.cost.trace import Product
from lbpwht_jax.ops.heuristic import platform
from lbpwht_jax.ops.matmul import low_rank_matmul
from lbpwht_jax.ops.spec import LowRankSpec
from lbpwht_jax.plan.candidates import Kept, bases
from lbpwht_jax.plan.observe import Site

_ROUNDS = 5
_DEVICES = {"gpu": "cuda"}


@dataclasses.dataclass(frozen=True)
class Backward:
    """The backward pass of one product of a layer, for a batch.

    Attributes:
      x: shape of the input, ``[images times windows, prefix tokens + tokens, inputs]``.
      outputs: output channels.
      site: the layer, without its path, so that layers of the same shapes are equal.
      needs_dx: whether the input's cotangent is computed.
      needs_dw: whether the kernel's gradient is.
    """

    x: tuple[int, int, int]
    outputs: int
    site: Site
    needs_dx: bool
    needs_dw: bool

    @classmethod
    def of(cls, site: Site, product: Product, batch: int) -> "Backward":
        """That of a layer's product, which is described per image."""
        tokens = site.prefix_tokens + int(np.prod(site.grid))
        shape = batch * product.tokens // tokens, tokens, site.inputs
        return cls(
            shape, site.outputs, dataclasses.replace(site, path="", contracted=1), bool(product.needs_dx), product.needs_dw
        )


# Seconds of a backward pass with each of these specs; ``None`` stands for the exact one.
Clock = Callable[[Backward, Sequence[LowRankSpec | None]], Sequence[float]]


def clock(dtype: Any) -> Clock:
    """Measures on the default device, on random numbers of ``dtype``; the specs take turns, and medians count.

    Raises:
      ValueError: if there are several processes, whose times would differ; or if layers are chosen for a device of another kind
        than JAX's default one, as in ``lbpwht_jax.ops.heuristic.choosing_for``.
    """
    at_hand = _DEVICES.get(jax.default_backend(), jax.default_backend())
    if platform() != at_hand:
        raise ValueError(
            f"plan: a budget in seconds needs a clock on the device itself: layers are chosen for {platform()}, and what is at "
            f"hand is {at_hand}; plan on that device, or with a budget such as flops=0.3"
        )
    if jax.process_count() > 1:
        raise ValueError(
            "plan: each process of a run would measure other times and come to another plan; make the plan in one process with "
            "lbpwht plan, and give it to all as --method plan:FILE"
        )

    def measure(backward: Backward, specs: Sequence[LowRankSpec | None]) -> list[float]:
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = backward.x, (backward.x[-1], backward.outputs), (*backward.x[:-1], backward.outputs)
        x, kernel, g = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
        passes = {str(n): _pass(backward, spec) for n, spec in enumerate(specs)}
        found = interleaved({name: lambda run=run: run(x, kernel, g) for name, run in passes.items()}, _ROUNDS)
        return [found[name] for name in passes]

    return measure


def _pass(backward: Backward, spec: LowRankSpec | None) -> Callable[..., Any]:
    """The compiled cotangents that are needed, with the projection of ``x``; the forward product is not computed."""
    site = backward.site

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel) if spec is None else low_rank_matmul(x, kernel, spec, site.grid, site.prefix_tokens)

    def run(x: jax.Array, kernel: jax.Array, g: jax.Array) -> list[jax.Array]:
        cotangents = jax.vjp(product, x, kernel)[1](g)
        return [each for each, need in zip(cotangents, (backward.needs_dx, backward.needs_dw), strict=True) if need]

    return jax.jit(run)


class LayerTimes:
    """Seconds per image of layers' backward passes, by layer and functions.

    LP_{L1-r} and LP_{Linf-r} with r up to the block's edge are measured, once for layers of the same shapes. Other functions
    are charged what the fastest of those takes that has at least as many, and as high ones along each axis: their time depends
    on how many they are, and on the sizes of the pieces on which all of them are constant.
    """

    def __init__(self, sites: Mapping[str, Site], products: Mapping[str, Sequence[Product]], batch: int, clock: Clock):
        self._batch = batch
        self._calls = {path: [Backward.of(site, product, batch) for product in products[path]] for path, site in sites.items()}
        self._found: dict[Backward, list[tuple[Kept | None, float]]] = {}
        for each in {call: None for calls in self._calls.values() for call in calls if call.needs_dx or call.needs_dw}:
            kept = [None, *_measured(each.site)]
            specs = [None if one is None else LowRankSpec(bases(each.site, one), block=each.site.block) for one in kept]
            self._found[each] = list(zip(kept, clock(each, specs), strict=True))

    def seconds(self, path: str, spec: LowRankSpec | None) -> float:
        """Seconds per image of a layer whose backward pass keeps a spec's functions; ``None`` for an exact one."""
        return sum(self._of(call, spec) for call in self._calls[path] if call in self._found) / self._batch

    def _of(self, call: Backward, spec: LowRankSpec | None) -> float:
        times = self._found[call]
        if spec is None:
            return times[0][1]
        return min(time for kept, time in times[1:] if kept is not None and _holds(bases(call.site, kept), spec.bases))


def _measured(site: Site) -> list[Kept]:
    families = [tuple(sum(f) < r for f in site.functions) for r in range(1, site.block + 1)]
    families += [tuple(max(f) < r for f in site.functions) for r in range(1, site.block + 1)]
    return list(dict.fromkeys(families))


def _holds(larger: Sequence[tuple[int, ...]], smaller: Sequence[tuple[int, ...]]) -> bool:
    """Whether there are at least as many functions, and as high ones along each axis."""
    highest = [[max(axis) for axis in zip(*functions, strict=True)] for functions in (larger, smaller)]
    return len(larger) >= len(smaller) and all(a >= b for a, b in zip(*highest, strict=True))
