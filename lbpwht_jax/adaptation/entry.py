"""``adapt``: puts a Flax model under rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import flax.linen as nn
import jax
from flax import nnx

from lbpwht_jax.adaptation.dataflow import Seen, follow
from lbpwht_jax.adaptation.linen import AdaptedModule, LowRankModel
from lbpwht_jax.adaptation.linen_layers import find_layers, intercept_marked, joined
from lbpwht_jax.adaptation.loops import has_loops, unrolled, with_loops
from lbpwht_jax.adaptation.marker import without_marker
from lbpwht_jax.adaptation.matching import Found, check_mixing, resolve_rules
from lbpwht_jax.adaptation.nnx import adapt_nnx
from lbpwht_jax.adaptation.nnx_layers import as_rngs, find_nnx_layers, with_rngs
from lbpwht_jax.adaptation.resolution import Resolution
from lbpwht_jax.adaptation.rules import Rule
from lbpwht_jax.adaptation.shapes import abstract_call, abstract_program

M = TypeVar("M", bound=nnx.Module)


@overload
def adapt(model: nn.Module, rules: Sequence[Rule], *args: Any, rngs: None = None, **kwargs: Any) -> AdaptedModule: ...


@overload
def adapt(model: M, rules: Sequence[Rule], *args: Any, rngs: Any = None, **kwargs: Any) -> M: ...


def adapt(model: Any, rules: Sequence[Rule], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
    """Puts a model under rules; the model itself stays as it is.

    Args:
      model: any Linen module whose dense layers are ``nn.Dense``, ``nn.DenseGeneral``, 1x1 ``nn.Conv`` or ``LowRankDense``;
        or an NNX module with ``nnx.Linear``, ``nnx.LinearGeneral`` and 1x1 ``nnx.Conv``.
      rules: ``LowRank``, ``LoRA`` and ``Freeze``; and ``Lean``, which goes beside them. For each module the first rule that
        matches its path holds, and a module that no rule matches is trained with exact backpropagation. A layer under
        ``LowRank`` or ``LoRA`` backpropagates as the rule says, whatever it did before.
      *args, **kwargs: an example call of the model: arrays or ``jax.ShapeDtypeStruct``, and anything else as it is
        (``train=True``; for a Linen model also ``method="encode"``). Nothing is computed; the grids of maps and the shapes of
        LoRA's branches are read from it.
      rngs: an ``nnx.Rngs``, or a key, for an NNX model. Its stream ``params`` gives each of LoRA's branches a key of its own,
        for ``A`` and the dropout. If the model's call takes ``rngs``, the example call gets it too. Left out, or without such
        a stream, the branches are drawn from ``nnx.Rngs(0)``, the same ones each time, as ``with_branches`` and
        ``load_adapter`` then replace them.

    Returns:
      For a Linen module an ``AdaptedModule``. For an NNX module a copy of its class: frozen parameters are ``FrozenParam``,
      which ``nnx.grad`` and ``nnx.Optimizer`` leave out by default, and LoRA's branches are submodules of the layers.
      ``lbpwht_jax.adaptation.resolution_of`` returns how the rules apply.

    Raises:
      TypeError: if ``model`` is not a Flax module, ``rules`` is no list of rules, variables are given as the example call,
        or ``rngs`` for a Linen model, whose ``with_branches`` takes the key.
      ValueError: if a rule matches nothing, with the nearest paths, or nothing that rules before it leave; if layers' grids
        cannot be known or do not fit; if a layer that a rule matches has a ``dot_general`` of its own; if a Linen model has
        modules made by ``nn.jit``; if an NNX model is adapted already; if the model asks for arrays' values.
    """
    found = find(model, *args, rngs=rngs, **kwargs)
    resolution = _resolved(model, found, rules)
    if isinstance(model, nnx.Module):
        check_mixing(resolution.adaptations)
        given = nnx.Rngs(0) if rngs is None else as_rngs(rngs)
        return adapt_nnx(model, resolution, given if hasattr(given, "params") else nnx.Rngs(0))
    module = model.module if isinstance(model, LowRankModel) else model
    adapted = AdaptedModule(module, resolution)
    if has_loops(module):  # rules may treat the blocks of a loop differently
        adapted = with_loops(adapted, *args, **kwargs)
    variables = abstract_call(lambda *args, **kwargs: adapted.init(jax.random.key(0), *args, **kwargs), args, kwargs)
    square = any(layer.input_shape[-2:-1] == layer.input_shape[-1:] for layer in found.layers)
    wanted = [a for a in resolution.adaptations if a.rank or (a.grid is not None and square)]
    if not wanted:
        return adapted
    seen = _followed(adapted, without_marker(variables), args, kwargs)
    told = tuple(dataclasses.replace(a, layer=seen.told(a.layer)) if a in wanted else a for a in resolution.adaptations)
    check_mixing(told)
    return AdaptedModule(adapted.module, dataclasses.replace(resolution, adaptations=told))


def resolve(model: Any, rules: Sequence[Rule], *args: Any, **kwargs: Any) -> Resolution:
    """How rules apply to a model's layers; arguments and errors are those of ``adapt``."""
    return _resolved(model, find(model, *args, **kwargs), rules)


def _resolved(model: Any, found: Found, rules: Sequence[Rule]) -> Resolution:
    resolution = resolve_rules(found, rules)
    if not isinstance(model, LowRankModel):
        return resolution
    taken = {adaptation.layer.path for adaptation in resolution.adaptations}
    kept = [adaptation for adaptation in model.resolution.adaptations if adaptation.layer.path not in taken]
    return dataclasses.replace(resolution, adaptations=(*resolution.adaptations, *kept))


def find(model: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Found:
    """What an example call shows of a model; arguments and errors are those of ``adapt``."""
    if args and isinstance(args[0], Mapping) and "params" in args[0]:
        raise TypeError("adapt: the example call holds variables; give the model's inputs: adapt(model, rules, images)")
    if isinstance(model, nnx.Module):
        return find_nnx_layers(model, args, with_rngs(model, kwargs, rngs))
    if rngs is not None:
        raise TypeError("adapt: rngs is for NNX models; adapted.with_branches(key, variables) draws a Linen model's branches")
    if isinstance(model, AdaptedModule):
        raise TypeError("adapt: the model is adapted already; give all rules at once, with its .module")
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model must be a Linen or an NNX module, got {type(model).__name__}")
    return find_layers(model.module if isinstance(model, LowRankModel) else model, args, kwargs)


def _followed(adapted: AdaptedModule, variables: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """What reaches the products of the adapted layers in a call of the plain model."""
    module = unrolled(adapted.module)  # a loop stacks kernels first
    paths = {adaptation.layer.path for adaptation in adapted.resolution.adaptations}

    def call(variables, *args, **kwargs):
        with nn.intercept_methods(intercept_marked(paths)):
            module.apply(variables, *args, rngs={"params": jax.random.key(0)}, **{**kwargs, "mutable": _MUTABLE})
        return ()  # the model's output may be no arrays

    def layer_of(path):
        module, _, leaf = joined(path[1:]).rpartition("/")
        return module if path[0].key == "params" and leaf == "kernel" else ""

    return follow(abstract_program(call, (variables, *args), kwargs), variables, layer_of)


_MUTABLE = nn.DenyList(("params", "intermediates"))
