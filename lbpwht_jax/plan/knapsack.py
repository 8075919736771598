"""The multiple-choice knapsack: one candidate for each layer, the least summed loss under a budget."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse

_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
      chosen: for each layer, the index of its candidate.
      loss: summed loss.
      cost: summed cost.
      gap: at most this much of ``loss`` lies above the least possible one; 0 where the solution is the best there is.
    """

    chosen: tuple[int, ...]
    loss: float
    cost: float
    gap: float


def solve(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float) -> Choice:
    """Chooses by HiGHS' branch and bound, as mixed-integer linear programming.

    Args:
      losses: for each layer, the losses of its candidates.
      costs: their costs, of the same shapes.
      budget: the most that the costs may sum to.

    Raises:
      ValueError: if even the cheapest candidates cost more than the budget.
    """
    least = sum(float(np.min(own)) for own in costs)
    if least > budget:
        raise ValueError(f"the least possible cost is {least:g}, above the budget of {budget:g}")
    kept = [_undominated(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    loss, cost = (np.concatenate([own[k] for own, k in zip(values, kept, strict=True)]) for values in (losses, costs))
    layer = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    scale = max(float(np.max(np.abs(loss))), 1e-300), max(budget, 1e-300)
    one_each = sparse.csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    found = optimize.milp(
        loss / scale[0],
        integrality=np.ones(len(loss)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint((cost / scale[1]).reshape(1, -1), ub=1),
        ],
        options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
    )
    picked = _within(found, layer, loss, cost, budget)
    total = float(loss[picked].sum())
    bound = 0.0 if found.mip_dual_bound is None else found.mip_dual_bound * scale[0]
    gap = 0.0 if found.status == 0 or total <= 0 else max(0.0, 1 - bound / total)
    chosen = tuple(int(k[np.searchsorted(np.flatnonzero(layer == n), picked[n])]) for n, k in enumerate(kept))
    return Choice(chosen, total, float(cost[picked].sum()), gap)


def _within(found: optimize.OptimizeResult, layer: np.ndarray, loss: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The candidates found, one per layer; the cheapest where nothing was found in time or rounding left the budget."""
    count = int(layer[-1]) + 1
    groups = [np.flatnonzero(layer == n) for n in range(count)]
    cheapest = np.array([group[np.argmin(cost[group])] for group in groups])
    if found.x is None:
        return cheapest
    picked = np.array([group[np.argmax(found.x[group])] for group in groups])
    while cost[picked].sum() > budget:  # the solver takes the budget to within its tolerance
        cheaper = [group[cost[group] < cost[own]] for group, own in zip(groups, picked, strict=True)]
        steps = {n: own[np.argmin(loss[own])] for n, own in enumerate(cheaper) if len(own)}
        layer_of_least = min(steps, key=lambda n: loss[steps[n]] - loss[picked[n]])
        picked[layer_of_least] = steps[layer_of_least]
    return picked


def _undominated(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Candidates than which no other costs no more and loses less."""
    order = np.lexsort((loss, cost))
    best, kept = np.inf, []
    for index in order:
        if loss[index] < best:
            best = loss[index]
            kept.append(index)
    return np.array(kept)
