"""What the README says of the results, compared with the JSON files in experiments/results."""

import json
from pathlib import Path

import transfer_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"

# The claims that the README repeats, by what is trained, and their verdicts.
CLAIMED = {
    ("lp_l1-8 - lp_l1-2", "last_stage"): "holds",
    ("lp_l1-8 - lp_l1-2", "all"): "holds",
    ("lp_l1-8 - full", "all"): "holds",
    ("lp_l1-4+lora_all-8 - lora_all-8", "last_stage"): "holds",
    ("lp_l1-2 - lora-8", "last_stage"): "open",
    ("lp_l1-2 - lora-8", "all"): "open",
    ("plan - lora-8", "last_stage"): "holds",
    ("plan - lora-8", "all"): "holds",
    ("plan - lora-8, branches and head", "all"): "holds",
}
SEEDS, IMAGES = 7, 2_000
STEPS = ("efficientformer_l1", "all", 16)


def problems() -> list[str]:
    """Every figure or claim of the README that was not measured so."""
    readme = (ROOT / "README.md").read_text()
    sweep, clock, bench = (
        json.loads((RESULTS / f"{n}.json").read_text()) for n in ("transfer", "transfer_steps", "bench_step")
    )
    wrong = []
    if transfer_report.readme_table(sweep["runs"], clock["seconds"]) not in readme:
        wrong.append("the table of accuracies is not that of transfer.json and transfer_steps.json")
    if transfer_report.head_sentence(sweep["runs"]) not in " ".join(readme.split()):
        wrong.append("the accuracies of branches and head alone are not those of transfer.json")
    seconds = {row["method"]: row["seconds"] for row in bench["rows"]}
    if f"{seconds['full'] / seconds['lp_l1-4']:.1f} times as fast with lp_l1-4" not in " ".join(readme.split()):
        wrong.append("the speed-up of EfficientFormer-L1 is not that of bench_step.json")
    if any((row["model"], row["train"], row["batch"]) != STEPS for row in bench["rows"]):
        wrong.append(f"bench_step.json has steps other than of {STEPS}")
    if 10 * sweep["setting"]["train_per_class"] != IMAGES:
        wrong.append(f"the sweep was not trained on {IMAGES:,} images")
    for train in transfer_report.TRAINS:
        found = transfer_report.accuracies(sweep["runs"], train)
        if any(set(by_seed) != set(range(SEEDS)) for by_seed in found.values()):
            wrong.append(f"not every method has seeds 0 to {SEEDS - 1} ({train})")
        for claim in transfer_report.CLAIMS:
            wanted = CLAIMED.get((claim.shown, train))
            if wanted is None:
                continue
            verdict = claim.verdict(*transfer_report.interval(claim.differences(found))[1:])
            if wanted != verdict:
                wrong.append(f"the verdict on {claim.shown} ({train}) is {verdict!r}, not {wanted!r}")
    return [f"README.md: {text}" for text in wrong]
