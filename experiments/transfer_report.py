"""Tables, claims and plots of the transfer sweep, from its JSON, for ``experiments/results_page.py``."""

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

TRAINS = {"last_stage": "last stage and head", "all": "whole model"}
HEAD = "branches and head"
RANKS = (2, 4, 6, 8)
L1 = tuple(f"lp_l1-{r}" for r in RANKS)
FAMILIES: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "full": (("full",), "black", "*"),
    "LP L1-2, 4, 6, 8, fitted": (L1, "C0", "o"),
    "LP L1-2, 4, 6, 8, official": (tuple(f"{name} (official)" for name in L1), "C1", "s"),
    "LP Linf-2, 4": (("lp_linf-2", "lp_linf-4"), "C2", "^"),
    "LP L1-4, dW only": (("lp_l1-4 (dW only)",), "C4", "v"),
    "LoRA-8": (("lora-8",), "C3", "D"),
    "LoRA-8, 4 x rate": (("lora-8 (4 x lr)",), "C3", "x"),
    "LoRA-all-8": (("lora_all-8",), "C5", "D"),
    "LoRA-all-8, 4 x rate": (("lora_all-8 (4 x lr)",), "C5", "x"),
    "LP L1-4 + LoRA-all-8": (("lp_l1-4+lora_all-8",), "C6", "P"),
    "LP L1-4, residuals in few bits": (("lp_l1-4 (lean)", "lp_l1-4 (tiny)"), "C7", "h"),
    "full, residuals in few bits": (("full (lean)",), "grey", "*"),
    "plans": (
        (
            "plan, FLOPs of lp_l1-2",
            "plan, FLOPs of lora-8, branches and head",
            "plan, FLOPs of lp_l1-4",
            "plan, FLOPs of lora-8",
        ),
        "C8",
        "d",
    ),
}


def accuracies(runs: Sequence[Mapping[str, Any]], train: str) -> dict[str, dict[int, float]]:
    """Test accuracy in percent, by variant and seed, of the runs that trained ``train``.

    Beside those of the whole model are LoRA's where its branches and the head alone were trained, and their names say so.
    """
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        names = {train: run["variant"]} | ({"head": f"{run['variant']}, {HEAD}"} if train == "all" else {})
        if run["train"] in names:
            found.setdefault(names[run["train"]], {})[run["seed"]] = 100 * run["test_accuracy"]
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the bounds of its 95 % confidence interval (Student's t); bounds are infinite for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that a difference of accuracies is at least ``bound``.

    Attributes:
      text: what is claimed.
      shown: the difference, in words.
      plus: variants; the difference is their mean accuracy less that of ``minus``.
      minus: variants.
      bound: least difference, in points.
      trains: what is trained in the runs that it is about.
    """

    text: str
    shown: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    bound: float = 0.0
    trains: tuple[str, ...] = tuple(TRAINS)

    def differences(self, found: Mapping[str, Mapping[int, float]]) -> list[float]:
        """The difference in points for each seed that has all of the runs."""
        names = (*self.plus, *self.minus)
        if any(name not in found for name in names):
            return []
        seeds = sorted(set.intersection(*(set(found[name]) for name in names)))
        return [
            statistics.mean(found[n][seed] for n in self.plus) - statistics.mean(found[n][seed] for n in self.minus)
            for seed in seeds
        ]

    def verdict(self, low: float, high: float) -> str:
        """What a confidence interval says about the claim."""
        return "holds" if low >= self.bound else "does not hold" if high < self.bound else "open"


CLAIMS = (
    Claim("LP_{L1-2} beats LoRA on the attention layers", "lp_l1-2 - lora-8", ("lp_l1-2",), ("lora-8",)),
    Claim("... also when LoRA has four times the rate", "lp_l1-2 - lora-8 (4 x lr)", ("lp_l1-2",), ("lora-8 (4 x lr)",)),
    Claim("Accuracy rises with r", "lp_l1-8 - lp_l1-2", ("lp_l1-8",), ("lp_l1-2",)),
    Claim("LP_{L1-8} is within 0.5 points of full", "lp_l1-8 - full", ("lp_l1-8",), ("full",), -0.5),
    Claim(
        "LP with LoRA is within 1 point of LoRA on all layers",
        "lp_l1-4+lora_all-8 - lora_all-8",
        ("lp_l1-4+lora_all-8",),
        ("lora_all-8",),
        -1.0,
    ),
    Claim(
        "`fitted` is at least as good as `official`",
        "fitted - official, mean over r = 2, 4, 6, 8",
        L1,
        tuple(f"{name} (official)" for name in L1),
    ),
    Claim(
        "Low rank on dW alone is at least as good as on both",
        "lp_l1-4 (dW only) - lp_l1-4",
        ("lp_l1-4 (dW only)",),
        ("lp_l1-4",),
    ),
    Claim(
        "LP_{L1-4} with `lean` residuals is within 0.3 points of plain ones",
        "lp_l1-4 (lean) - lp_l1-4",
        ("lp_l1-4 (lean)",),
        ("lp_l1-4",),
        -0.3,
    ),
    Claim("... and with `tiny` ones", "lp_l1-4 (tiny) - lp_l1-4", ("lp_l1-4 (tiny)",), ("lp_l1-4",), -0.3),
    Claim("So is full backpropagation", "full (lean) - full", ("full (lean)",), ("full",), -0.3),
    *(
        Claim(
            f"A plan beats LP_{{L1-{r}}} at its FLOPs",
            f"plan - lp_l1-{r}",
            (f"plan, FLOPs of lp_l1-{r}",),
            (f"lp_l1-{r}",),
        )
        for r in (2, 4)
    ),
    Claim("A plan beats LoRA on the attention layers at its FLOPs", "plan - lora-8", ("plan, FLOPs of lora-8",), ("lora-8",)),
    Claim(
        "... also where LoRA's branches and the head alone are trained",
        f"plan - lora-8, {HEAD}",
        (f"plan, FLOPs of lora-8, {HEAD}",),
        (f"lora-8, {HEAD}",),
        trains=("all",),
    ),
)


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(runs: Sequence[Mapping[str, Any]], train: str) -> str:
    """The runs of one kind of training as a Markdown table, one row per variant, in the order of ``FAMILIES``.

    Beside LoRA on the whole model stands what its branches and the head come to alone.
    """
    rows = []
    for name in (name for names, *_ in FAMILIES.values() for name in names):
        for part in (train, *["head"] * (train == "all")):
            own = [run for run in runs if run["train"] == part and run["variant"] == name]
            if own:
                values = [100 * run["test_accuracy"] for run in own]
                rows.append(
                    [
                        f"{name}, {HEAD}" if part == "head" else name,
                        f"{statistics.mean(values):.2f} % ({min(values):.2f} to {max(values):.2f})",
                        str(len(values)),
                        f"{own[0]['backward_flops'] / 1e6:.1f}",
                        f"{own[0]['saved_bytes'] / 1e6:.2f}",
                        f"{own[0]['trainable_parameters']:,}",
                    ]
                )
    header = [
        "method",
        "test accuracy, mean (lowest to highest)",
        "seeds",
        "backward MFLOPs/image",
        "MB kept per image",
        "trained parameters",
    ]
    return markdown(header, rows)


README_FAMILIES = ("full", "LP L1-2, 4, 6, 8, fitted", "LoRA-8", "LoRA-all-8")
README_METHODS = ("full", "lp_l1-8", "lp_l1-4", "lp_l1-2", "lora-8", "lora_all-8")


def readme_table(runs: Sequence[Mapping[str, Any]], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """The README's table: some of the methods, training the whole model.

    Args:
      runs: the sweep's runs.
      seconds: time of a step, by what is trained and the variant.
    """
    found, rows = accuracies(runs, "all"), []
    for name in README_METHODS:
        first = next(run for run in runs if run["train"] == "all" and run["variant"] == name)
        values = list(found[name].values())
        rows.append(
            [
                name,
                f"{statistics.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f})",
                f"{first['backward_flops'] / 1e6:.0f}",
                f"{first['saved_bytes'] / 1e6:.2f}",
                f"{seconds['all']['full'] / seconds['all'][name]:.2f}",
            ]
        )
    header = ["method", "test accuracy (lowest to highest)", "backward MFLOPs per image", "MB kept per image"]
    header.append("speed-up of a step")
    return markdown(header, rows)


def head_sentence(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the README says of LoRA where its branches and the head alone are trained."""
    parts = []
    for name in ("lora-8", "lora_all-8"):
        own = [run for run in runs if run["train"] == "head" and run["variant"] == name]
        accuracy = 100 * statistics.mean(run["test_accuracy"] for run in own)
        costs = f"{own[0]['backward_flops'] / 1e6:.0f} MFLOPs, {own[0]['saved_bytes'] / 1e6:.2f} MB"
        parts.append(f"{name} comes to {accuracy:.1f} % ({costs})")
    return " and ".join(parts)


def claims_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every claim, for both kinds of training: the difference paired over seeds, its confidence interval, the verdict."""
    rows = []
    for claim in CLAIMS:
        for train in claim.trains:
            words = TRAINS[train]
            values = claim.differences(accuracies(runs, train))
            if not values:
                rows.append([claim.text, words, claim.shown, "not run yet", "0", ""])
                continue
            mean, low, high = interval(values)
            bounds = f"({low:+.2f} to {high:+.2f})" if math.isfinite(low) else "(one seed)"
            rows.append([claim.text, words, claim.shown, f"{mean:+.2f} {bounds}", str(len(values)), claim.verdict(low, high)])
    return markdown(["claim", "trained", "difference", "points (95 % interval)", "seeds", "verdict"], rows)


def steps_table(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Time of a step and its speed-up over full backpropagation, by method, for each kind of training."""
    rows = []
    for name in next(iter(seconds.values())):
        own = [by_name[name] for by_name in seconds.values()]
        speedups = [by_name["full"] / by_name[name] for by_name in seconds.values()]
        rows.append([name, *(f"{1e3 * s:.0f} ms ({ratio:.2f}x)" for s, ratio in zip(own, speedups, strict=True))])
    return markdown(["method", *(TRAINS[train] for train in seconds)], rows)


def gradients_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean over the layers of the cosine similarity with the full gradient, one row per method."""
    columns = [(projection, dx) for dx in ("exact", "low_rank") for projection in ("fitted", "official")]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {(row["projection"], row["dx"]): row for row in rows if row["method"] == method}
        means = [
            f"{statistics.mean(own[c]['cosine'].values()):.3f} ({min(own[c]['cosine'].values()):.3f})" if c in own else ""
            for c in columns
        ]
        lines.append([method, str(next(iter(own.values()))["functions"]), *means])
    header = ["method", "functions"] + [f"{p}, {'dW alone' if dx == 'exact' else 'both'}" for p, dx in columns]
    return markdown(header, lines)
