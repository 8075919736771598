"""The methods by their short names on the command line, and the rules they stand for."""

import dataclasses
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lbpwht_jax.adaptation.entry import adapt
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.loops import with_loops
from lbpwht_jax.adaptation.plan import Plan, Train, load_plan
from lbpwht_jax.adaptation.rules import NOTHING, Freeze, LoRA, LowRank, Rule
from lbpwht_jax.models import model_info, plain_model
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.spec import LowRankSpec, lp_l1, lp_linf

_SELECTIONS = {"lp_l1": lp_l1, "lp_linf": lp_linf}
_BRANCHES = {"lora": "attention", "lora_all": "all"}
_HELP = (
    "write full, lp_l1-R or lp_linf-R (low-rank backpropagation, such as lp_l1-4), lora-R or lora_all-R (LoRA of rank R on the "
    "attention layers or on all, such as lora-8), a sum of one of each kind, such as lp_l1-4+lora_all-8, or plan:FILE (what "
    "lbpwht plan wrote), which may be summed with LoRA"
)
_PLANNED = re.compile(r"plan(?::(?P<file>.+?))?(?:\+(?P<branches>lora(?:_all)?-[0-9]{1,9}))?")


@dataclasses.dataclass(frozen=True)
class Method:
    """What a short name stands for.

    Attributes:
      spec: the functions that low-rank backpropagation keeps; ``None`` backpropagates exactly.
      branches: which layers get a LoRA branch.
      rank: rank of the branches; layers that make query, key and value at once get three times as much.
      alpha: the branches are multiplied by it over their rank; it is three times as much where the rank is.
      dropout: probability of zeros in the branches' inputs while training, as in ``LoRA``.
      plan: the functions that each layer keeps, in place of ``spec``.
    """

    spec: LowRankSpec | None = None
    branches: Literal["none", "attention", "all"] = "none"
    rank: int = 0
    alpha: float = 8
    dropout: float = 0.0
    plan: Plan | None = None

    @property
    def default_train(self) -> Train:
        """What the commands train unless told.

        ``"head"`` (branches and head) for LoRA without low rank; what a plan was made for; else ``"all"``.
        """
        if self.plan is not None:
            return self.plan.train
        return "head" if self.branches != "none" and self.spec is None else "all"

    def rules(self, info: ModelInfo, train: Train = "all") -> tuple[Rule, ...]:
        """The rules for a model of the registry: the paper's choice of layers, where the paper has the family.

        Args:
          info: what the registry knows of the model.
          train: ``"all"``; ``"last_stage"``, the last stage (``info.layers.last_stage``) and the head alone; ``"head"``, the
            head and LoRA's branches alone, the other layers being backpropagated exactly.

        Raises:
          ValueError: if ``train`` is none of these, or is ``"head"`` and the method adapts layers without training a branch.
        """
        layers, spec = info.layers.low_rank, self.spec
        rules: list[Rule] = []
        pattern = {"none": NOTHING, "all": layers, "attention": _both(info.layers.attention, layers)}[self.branches]
        branch = {"rank": self.rank, "alpha": self.alpha, "fused": info.layers.fused, "dropout": self.dropout}
        if self.plan is not None:
            rules.extend(self.plan.rules(pattern, **branch))
        elif self.branches != "none":
            rules.append(LoRA(pattern, spec=spec, **branch))
        if train not in get_args(Train):
            raise ValueError(f"train must be one of {', '.join(get_args(Train))}, got {train!r}")
        if train == "head":
            if spec is not None and not rules:
                raise ValueError(
                    "training the head alone leaves low-rank backpropagation no layer; use the method full, a sum with LoRA, "
                    "or train the last stage"
                )
            return (*rules, Freeze(_outside(info.layers.head)))
        if spec is not None and self.branches != "all":
            rules.append(LowRank(layers, spec))
        if train == "last_stage":
            rules.insert(0, Freeze(_outside(info.layers.last_stage)))
        return tuple(rules)


def _both(first: str, second: str) -> str:
    """A regular expression found where both are."""
    return f"^(?=.*(?:{first}))(?=.*(?:{second}))"


def _outside(pattern: str) -> str:
    """A regular expression found where ``pattern`` is not."""
    return f"^(?!.*(?:{pattern}))"


def stored_method(method: str) -> tuple[str, Plan | None]:
    """A method's name without the file of its plan, and that plan: ``"plan:FILE+lora-8"`` becomes ``"plan+lora-8"``.

    Raises:
      FileNotFoundError, ValueError: as ``load_plan``.
    """
    planned = _PLANNED.fullmatch(method)
    if planned is None or planned["file"] is None:
        return method, None
    return "+".join(["plan", *([planned["branches"]] if planned["branches"] else [])]), load_plan(planned["file"])


def parse_method(method: str, plan: Plan | None = None, **fields: Any) -> Method:
    """The method that a short name stands for.

    Args:
      method: ``"full"`` (exact backpropagation); ``"lp_l1-R"`` or ``"lp_linf-R"``; ``"lora-R"`` (LoRA of rank R on the
        attention layers) or ``"lora_all-R"`` (on every layer of the family's default choice); or a sum, such as
        ``"lp_l1-4+lora_all-8"``, where the low-rank backward also serves the branches; or ``"plan:FILE"``, alone or summed with
        LoRA; ``"plan"`` stands for the plan given beside.
      plan: what ``"plan"`` stands for.
      **fields: of the ``LowRankSpec``, such as ``projection``.

    Raises:
      ValueError: if the name is none of these, or R is out of range; if a file holds no plan.
      FileNotFoundError: if there is no such file.
    """
    if method == "full":
        return Method()
    planned = _PLANNED.fullmatch(method)
    if planned is not None:
        plan = plan if planned["file"] is None else load_plan(planned["file"])
        if plan is None:
            raise ValueError(f"method {method!r} does not say which plan; write plan:FILE, with what lbpwht plan wrote")
        return dataclasses.replace(parse_method(planned["branches"] or "full"), plan=plan)
    found: dict[str, Any] = {}
    for part in method.split("+"):
        match = re.fullmatch(r"(lp_l1|lp_linf|lora|lora_all)-([0-9]{1,9})", part)
        if match is None:
            raise ValueError(f"unknown method {method!r}; {_HELP}")
        kind, rank = match[1], int(match[2])
        new = (
            {"spec": _SELECTIONS[kind](rank, **fields)} if kind in _SELECTIONS else {"branches": _BRANCHES[kind], "rank": rank}
        )
        if found.keys() & new.keys():
            raise ValueError(f"method {method!r} names two of a kind; {_HELP}")
        if new.get("rank") == 0:
            raise ValueError(f"method {method!r}: LoRA's rank must be at least 1")
        found |= new
    return Method(**found)


class LayerCounts(NamedTuple):
    """How the layers that low rank adapts by default are backpropagated under a method.

    Attributes:
      low_rank: at low rank.
      exact_by_choice: exactly, since the method does not make them low-rank.
      exact_for_speed: exactly, since low rank is predicted to be slower there and ``when`` is ``"faster"``.
      frozen: neither trained nor adapted.
    """

    low_rank: int
    exact_by_choice: int
    exact_for_speed: int
    frozen: int

    def __str__(self) -> str:
        parts = [
            f"{self.low_rank} low-rank",
            f"{self.exact_by_choice} exact by choice",
            f"{self.exact_for_speed} exact for speed",
        ]
        return ", ".join(parts + [f"{self.frozen} frozen"] * (self.frozen > 0))


def layer_counts(info: ModelInfo, adapted: AdaptedModule) -> LayerCounts:
    """Counts how the layers of the family's default choice are backpropagated.

    Args:
      info: what the registry knows of the model.
      adapted: the model under rules.
    """
    known = {adaptation.layer.path: adaptation for adaptation in adapted.resolution.adaptations}
    counts = dict.fromkeys(LayerCounts._fields, 0)
    for path, _ in adapted.resolution.parameters:
        if re.search(info.layers.low_rank, path):
            how = known.get(path)
            if how is None:
                kind = "frozen" if path in adapted.resolution.frozen else "exact_by_choice"
            else:
                kind = "low_rank" if how.spec else "exact_for_speed" if how.slower else "exact_by_choice"
            counts[kind] += 1
    return LayerCounts(**counts)


def default_train(method: str) -> Train:
    """What the commands train under a method by its short name unless told, as ``Method.default_train``.

    Raises:
      ValueError: as ``parse_method``.
    """
    return parse_method(method).default_train


def adapted_model(
    name: str,
    method: str = "full",
    train: Train = "all",
    num_classes: int = 1000,
    image_size: int | None = None,
    when: Literal["always", "faster"] = "always",
    scan_blocks: bool = False,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    plan: Plan | None = None,
    **fields: Any,
) -> AdaptedModule:
    """A model of the registry under a method, with batch normalisation on its running statistics.

    Args:
      name: the model's name.
      method: a short name, as for ``parse_method``.
      train: what is trained, as for ``Method.rules``.
      num_classes: outputs of the head.
      image_size: height and width of the images, in pixels; by default the model's.
      when: whether layers that low rank would make slower stay exact, as in ``LowRankSpec``.
      scan_blocks: runs equal blocks as a loop, as in ``create_model``.
      lora_alpha, lora_dropout: of LoRA's branches, as in ``Method``.
      plan: what the method ``"plan"`` stands for.
      **fields: further arguments of ``create_model``, such as ``dtype`` and ``remat``.

    Raises:
      ValueError: if a name is unknown, or as ``Method.rules`` does.
    """
    info = model_info(name)
    parsed = dataclasses.replace(parse_method(method, plan, when=when), alpha=lora_alpha, dropout=lora_dropout)
    rules = parsed.rules(info, train)
    module = plain_model(name, num_classes=num_classes, image_size=image_size, frozen_batch_norm=True, **fields)
    if parsed.plan is not None:
        parsed.plan.check(name, module.image_size, train)
    images = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, info.images.channels), jnp.float32)
    adapted = adapt(module, rules, images)
    return with_loops(adapted, images) if scan_blocks else adapted
