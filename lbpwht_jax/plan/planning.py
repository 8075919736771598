"""``plan``: which Walsh functions each layer keeps under a budget, from the gradients of a few batches."""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbpwht_jax.adaptation import AdaptedModule, unrolled
from lbpwht_jax.adaptation.plan import Plan, PlannedLayer, Unit
from lbpwht_jax.cost import residual_bytes
from lbpwht_jax.cost.layers import matmul_flops, saved_bytes
from lbpwht_jax.cost.trace import Product, layer_records
from lbpwht_jax.ops.spec import Basis, LowRankSpec
from lbpwht_jax.plan import timing
from lbpwht_jax.plan.candidates import Candidate, candidate, selections
from lbpwht_jax.plan.knapsack import Choice, solve
from lbpwht_jax.plan.observe import Energies, Observer, Site
from lbpwht_jax.plan.timing import Clock, LayerTimes

Loss = Callable[[AdaptedModule, Mapping[str, Any], Any], jax.Array]

_UNITS: tuple[Unit, ...] = ("flops", "bytes", "seconds")
_TRIALS = 8


def parse_budget(text: str) -> tuple[Unit, float]:
    """What a budget such as ``"flops=0.3"`` counts, and the share of full backpropagation.

    Raises:
      ValueError: if the unit is unknown or the share is not above 0 and at most 1.
    """
    match = re.fullmatch(r"(\w+)=([0-9.eE+-]+)", text)
    if match is None or match[1] not in _UNITS:
        units = " or ".join(f"{unit}=SHARE" for unit in _UNITS)
        raise ValueError(f"budget must be {units}, such as flops=0.3, got {text!r}")
    try:
        share = float(match[2])
    except ValueError:
        raise ValueError(f"budget {text!r}: {match[2]!r} is no number; write a share such as flops=0.3") from None
    if not 0 < share <= 1:
        raise ValueError(f"budget {text!r}: the share of full backpropagation must be above 0 and at most 1")
    return match[1], share  # pyright: ignore[reportReturnType]


def cross_entropy(model: AdaptedModule, variables: Mapping[str, Any], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross-entropy on a batch of images and labels, in training; dropout is drawn from key 0."""
    images, labels = batch
    others = [name for name in variables if name != "params"]
    logits, _ = model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=others)
    logits = jnp.asarray(logits, jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plan(
    model: AdaptedModule,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    budget: str,
    *,
    loss: Loss = cross_entropy,
    same_within_stage: bool = False,
    dtype: Any = jnp.float32,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Chooses for each low-rank layer of a model which Walsh functions it keeps.

    One backward pass per batch says how much of a layer's kernel gradient each selection of functions would lose. The plan has
    the least summed loss among all that cost no more than the budget, or a bound on how far it is from that. The loss is the
    mean over layers of the lost share of the layer's own gradient, averaged with the lost share of all these gradients
    together. What a layer loses of its input's cotangent, which reaches the layers before it, is told but not counted:
    weighing it in did not help at every budget (docs/plan.md).

    Args:
      model: a Linen model under ``LowRank`` rules, whose layers are planned whatever functions the rules name; layers that
        backpropagate exactly stay so. It is called as ``model.apply(variables, images, train=True)``.
      variables: its variables.
      batches: what ``loss`` takes, tuples whose first are images ``[batch, height, width, channels]``; by default pairs of
        normalised images and integer labels ``[batch]``.
      budget: ``"flops=SHARE"``, FLOPs of the backward pass's products, or ``"bytes=SHARE"``, bytes kept for it per image, as
        shares of those of the model with all layers exact, as ``lbpwht cost`` counts both; or ``"seconds=SHARE"``, the time of
        the planned layers' backward passes, measured one by one at the batch's size, as a share of that of exact ones.
      loss: called as ``loss(model, variables, batch)``, returning a scalar.
      same_within_stage: gives equal layers of consecutive blocks the same functions, so that the blocks can run as a loop.
      dtype: what the layers' products are timed in, where the budget is in seconds.
      clock: says how long backward passes take; by default ``lbpwht_jax.plan.timing.clock(dtype)``, which measures them.
      progress: called with what is done next.

    Returns:
      The plan; its ``rules`` are for ``adapt``.

    Raises:
      ValueError: if the budget is unknown, or less than the least possible; if the model has no low-rank layer, or LoRA
        branches; if there is no batch, or gradients are not finite; if a budget in seconds has no clock, as
        ``lbpwht_jax.plan.timing.clock`` says.
      TypeError: if the model is not an ``AdaptedModule``.
    """
    unit, share = parse_budget(budget)
    if not isinstance(model, AdaptedModule):
        raise TypeError(f"plan: model must be a Linen model under rules, as adapt returns it, got {type(model).__name__}")
    if any(adaptation.rank for adaptation in model.resolution.adaptations):
        raise ValueError("plan: the model has LoRA branches; plan it without them, and add them to the plan's rules")
    sites = _sites(model)
    if not sites:
        raise ValueError("plan: no layer of the model is low-rank; put a LowRank rule on those to plan")
    exact = unrolled(dataclasses.replace(model, resolution=dataclasses.replace(model.resolution, adaptations=())))
    batches = list(batches)
    if not batches:
        raise ValueError("plan: there is no batch to measure on; give at least one")
    clock = (clock or timing.clock(dtype)) if unit == "seconds" else None
    progress("measuring gradients")
    energies = _observe(exact, variables, batches, sites, loss)
    wrong = [path for path, each in energies.items() if not (np.isfinite(each.dw).all() and np.isfinite(each.dx).all())]
    if wrong:
        raise ValueError(
            f"plan: the gradients of {len(wrong)} layers, such as {wrong[0]}, are not finite; check weights and images"
        )
    progress("choosing" if clock is None else "timing layers")
    menu = _Menu(model, exact, variables, batches[0][0].shape, sites, energies, unit, clock)
    return menu.plan(share, _groups(sites, menu.products, same_within_stage))


def _sites(model: AdaptedModule) -> dict[str, Site]:
    sites = {}
    for adaptation in model.resolution.adaptations:
        grid = adaptation.grid or adaptation.shown_grid
        if adaptation.spec is not None and grid is not None:
            layer = adaptation.layer
            sites[layer.path] = Site(
                layer.path,
                grid,
                adaptation.prefix_tokens,
                adaptation.spec.block,
                layer.inputs,
                layer.outputs,
                layer.contracted,
            )
    return sites


def _observe(
    exact: AdaptedModule, variables: Mapping[str, Any], batches: Sequence[Any], sites: Mapping[str, Site], loss: Loss
) -> dict[str, Energies]:
    """The energies of all layers, summed over the batches."""

    @jax.jit
    def measure(variables: Mapping[str, Any], batch: Any) -> dict[str, Energies]:
        def observed(taps: Mapping[str, Energies]) -> jax.Array:
            with nn.intercept_methods(Observer(sites, taps)):
                return loss(exact, variables, batch)

        return jax.grad(observed)({path: Energies.zeros(site) for path, site in sites.items()})

    found = [jax.device_get(measure(variables, batch)) for batch in batches]
    return jax.tree.map(lambda *each: np.sum(each, axis=0), *found)


def _groups(sites: Mapping[str, Site], products: Mapping[str, list[Product]], same_within_stage: bool) -> list[list[str]]:
    """Layers that keep the same functions: each alone, or those that differ in the number of their block."""
    groups: dict[Hashable, list[str]] = {}
    for path, site in sites.items():
        shapes = tuple((product.channels, product.tokens) for product in products[path])
        place = re.sub(r"^(.*?)\d+(?=/[^0-9]+\d?$)", r"\1N", path)
        groups.setdefault((place, site.grid, shapes) if same_within_stage else path, []).append(path)
    return list(groups.values())


def _at(site: Site, product: Product) -> Product:
    """A product with the tokens and channels of its layer, which layers of others do not tell."""
    tokens = product.macs // (site.inputs * site.outputs)
    at = {"tokens": tokens, "channels": (site.inputs, site.outputs), "grid": site.grid, "prefix_tokens": site.prefix_tokens}
    return dataclasses.replace(product, **at)


def _bases(spec: LowRankSpec | None) -> tuple[Basis, ...] | None:
    return None if spec is None else spec.bases


@dataclasses.dataclass(frozen=True)
class _Option:
    """What the layers of a group may do: the same for all of them."""

    chosen: Mapping[str, Candidate]
    loss: float
    cost: float


class _Menu:
    """What may be chosen for each layer of a model, and what all of it would cost."""

    def __init__(
        self,
        model: AdaptedModule,
        exact: AdaptedModule,
        variables: Mapping[str, Any],
        images: tuple[int, int, int, int],
        sites: Mapping[str, Site],
        energies: Mapping[str, Energies],
        unit: Unit,
        clock: Clock | None,
    ):
        self.model, self.exact, self.variables, self.image_shape = model, exact, variables, images[1:]
        self.sites, self.energies = sites, energies
        self.unit: Unit = unit
        records = layer_records(exact, variables, self.image_shape, exact.trainable)
        products = [record for record in records if isinstance(record, Product)]
        self.products = {
            path: [_at(site, product) for product in products if product.path == path] for path, site in sites.items()
        }
        order = list(dict.fromkeys(product.path for product in products))
        self.order = sorted(sites, key=order.index)
        self.times = None if clock is None else LayerTimes(sites, self.products, images[0], clock)
        layers = sum(self._layer_cost(path, None) for path in self.order)
        if unit == "flops":
            self.full = sum(matmul_flops(product, None) for product in products)
        else:
            self.full = residual_bytes(exact, variables, self.image_shape) if unit == "bytes" else layers
        self.fixed = self.full - layers
        own = {path: float(np.sum(each.dw)) for path, each in energies.items()}
        total = sum(own.values()) or 1.0
        self.weights = {path: 0.5 / len(own) + 0.5 * energy / total for path, energy in own.items()}

    def plan(self, share: float, groups: Sequence[Sequence[str]]) -> Plan:
        """The plan under a budget."""
        options = [self._options(group) for group in groups]
        limit = share * self.full
        least = self.fixed + sum(min(option.cost for option in each) for each in options)
        allowed = (limit - self.fixed) * (1 + 1e-12)  # times are summed in one order here, in another one by the solver
        for _ in range(_TRIALS):
            if self.fixed + allowed < least:
                break
            losses, costs = ([np.array([getattr(o, name) for o in each]) for each in options] for name in ("loss", "cost"))
            choice = solve(losses, costs, allowed)
            picked = [each[index] for each, index in zip(options, choice.chosen, strict=True)]
            chosen = {path: one for option in picked for path, one in option.chosen.items()}
            cost = self._cost(chosen)
            if cost <= limit:
                return self._made(chosen, choice, cost, share)
            allowed -= cost - limit  # an array that several layers share is kept as long as one of them needs it
        raise ValueError(
            f"budget {self.unit}={share:g}: the least possible is about {self.unit}={least / self.full:.4f}, where every layer "
            "keeps as little as can be; the rest of the model takes what is left"
        )

    def _options(self, group: Sequence[str]) -> list[_Option]:
        kept = dict.fromkeys(each for path in group for each in selections(self.energies[path], self.sites[path]))
        options = []
        for each in (None, *kept):
            chosen = {path: candidate(self.energies[path], self.sites[path], each) for path in group}
            loss = sum(self.weights[path] * one.dw_lost for path, one in chosen.items())
            cost = sum(self._layer_cost(path, one.spec) for path, one in chosen.items())
            options.append(_Option(chosen, loss, float(cost)))
        return options

    def _layer_cost(self, path: str, spec: LowRankSpec | None) -> float:
        if self.times is not None:
            return self.times.seconds(path, spec)
        if self.unit == "flops":
            return sum(matmul_flops(product, spec) for product in self.products[path])
        return sum(saved_bytes(product, spec) for product in self.products[path])

    def _cost(self, chosen: Mapping[str, Candidate]) -> float:
        """What the model costs, FLOPs and bytes counted as ``lbpwht cost`` does."""
        if self.unit != "bytes":
            return self.fixed + sum(self._layer_cost(path, chosen[path].spec) for path in self.order)
        resolution = self.model.resolution
        adaptations = [
            dataclasses.replace(adaptation, spec=chosen[adaptation.layer.path].spec)
            for adaptation in resolution.adaptations
            if adaptation.layer.path in chosen and chosen[adaptation.layer.path].spec is not None
        ]
        planned = dataclasses.replace(self.exact, resolution=dataclasses.replace(resolution, adaptations=tuple(adaptations)))
        return residual_bytes(planned, self.variables, self.image_shape)

    def _made(self, chosen: Mapping[str, Candidate], choice: Choice, cost: float, share: float) -> Plan:
        by_path = {adaptation.layer.path: adaptation for adaptation in self.model.resolution.adaptations}
        taken = {path: self._layer_cost(path, one.spec) for path, one in chosen.items()}
        layers = [
            PlannedLayer(
                path,
                _bases(chosen[path].spec),
                by_path[path].grid,
                by_path[path].prefix_tokens,
                1 - chosen[path].dw_lost,
                1 - chosen[path].dx_lost,
                taken[path] / (sum(taken.values()) or 1),
            )
            for path in self.order
        ]
        block = next(iter(self.sites.values())).block
        return Plan(tuple(layers), block, self.unit, share, cost / self.full, float(cost), choice.loss, choice.gap)
