"""The selections of Walsh functions that a layer may be given, and what each loses of the kernel's gradient."""

import dataclasses

import numpy as np

from lbpwht_jax.ops.spec import Basis, LowRankSpec
from lbpwht_jax.plan.observe import Energies, Site

Kept = tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to backpropagate a layer.

    Attributes:
      spec: the functions kept; ``None`` for an exact backward pass.
      dw_lost: energy of what is lost of the kernel's gradient, over the gradient's; above 1 where parts cancelled each other.
      dx_lost: the same of the input's cotangent.
    """

    spec: LowRankSpec | None
    dw_lost: float
    dx_lost: float


def selections(energies: Energies, site: Site) -> list[Kept]:
    """LP_{L1-r} and LP_{Linf-r} for each r, and the functions picked one by one by what they hold of the kernel's gradient.

    Args:
      energies: what the layer's functions hold, summed over batches.
      site: the layer.
    """
    functions = site.functions
    kept = [tuple(sum(f) < r for f in functions) for r in range(1, len(site.grid) * (site.block - 1) + 2)]
    kept += [tuple(max(f) < r for f in functions) for r in range(1, site.block + 1)]
    kept += _greedy(np.asarray(energies.dw, np.float64))
    return list(dict.fromkeys(kept))


def candidate(energies: Energies, site: Site, kept: Kept | None) -> Candidate:
    """What it means for a layer to keep these functions; ``None`` for an exact backward pass."""
    if kept is None:
        return Candidate(None, 0.0, 0.0)
    spec = LowRankSpec(bases(site, kept), block=site.block)
    return Candidate(spec, dw_lost(energies, kept), dx_lost(energies, kept))


def dw_lost(energies: Energies, kept: Kept) -> float:
    """The share of the kernel's gradient, as an energy, that is lost where these functions, and prefix tokens, are kept."""
    lost = np.append(~np.asarray(kept), False)
    dw = np.asarray(energies.dw, np.float64)
    return _share(dw[np.ix_(lost, lost)].sum(), dw.sum())


def dx_lost(energies: Energies, kept: Kept) -> float:
    """The share of the input's cotangent, as an energy, that is lost where these functions, and prefix tokens, are kept."""
    dx = np.asarray(energies.dx, np.float64)
    return _share(dx[:-1][~np.asarray(kept)].sum(), dx.sum())


def _share(part: float, whole: float) -> float:
    return float(max(part / whole, 0.0)) if whole > 0 else 0.0


def bases(site: Site, kept: Kept) -> tuple[Basis, ...]:
    """The functions of a layer's block that are kept."""
    return tuple(function for function, keep in zip(site.functions, kept, strict=True) if keep)


def _greedy(dw: np.ndarray) -> list[Kept]:
    """Adds the function that leaves the least energy lost, again and again.

    What is lost is ``|sum of the shares not kept|^2``; without function k it is less by ``2 <k, lost> - |k|^2``.
    """
    kept, steps = np.zeros(len(dw) - 1, bool), []
    while not kept.all():
        lost = np.append(~kept, False)
        gain = 2 * dw[:-1][:, lost].sum(1) - np.diag(dw)[:-1]
        kept[np.argmax(np.where(kept, -np.inf, gain))] = True
        steps.append(tuple(kept.tolist()))
    return steps
