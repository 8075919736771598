"""The largest batch that fits a chip's memory, found with few compilations."""

from collections.abc import Callable

from lbpwht_jax.compile.request import Row

_MOST = 10  # compilations
_PRECISION = 64  # the answer is short of the largest by a 64th at most


def largest_batch(first: Row, chips: int, memory: int, compile_batch: Callable[[int], Row]) -> int:
    """Images of all chips, a multiple of their number; 0 if not even one on each fits.

    What a step takes grows about as a straight line with the batch, so that two compiled batches foretell where it meets the
    memory; each further compilation narrows the bracket.

    Args:
      first: a batch that was compiled.
      chips: that share the batch.
      memory: bytes of a chip.
      compile_batch: compiles a batch.
    """
    known = {first.batch_size: first}
    low, high = 0, None
    for _ in range(_MOST):
        fitting = [size for size, row in known.items() if row.fits]
        too_large = [size for size, row in known.items() if not row.fits]
        low, high = max(fitting, default=0), min(too_large, default=None)
        if high is not None and high - low <= max(chips, low // _PRECISION):
            break
        size = _next(known, low, high, chips, memory)
        known[size] = compile_batch(size)
    return max((size for size, row in known.items() if row.fits), default=0)


def _next(known: dict[int, Row], low: int, high: int | None, chips: int, memory: int) -> int:
    """A batch strictly between what fits and what does not, a multiple of ``chips``."""
    guess = _foretold(known, memory)
    if guess is None:
        guess = low * 2 if high is None else (low + high) / 2
    elif high is not None and guess >= high:
        guess = high - max(chips, high // (2 * _PRECISION))
    elif guess <= low:
        guess = low + max(chips, low // _PRECISION)
    for unit in (_unit(guess, chips), chips):
        size = int(guess) // unit * unit
        if low < size and (high is None or size < high):
            return size
    return low + chips if high is None else (low + high) // 2 // chips * chips


def _unit(size: float, chips: int) -> int:
    """The largest of ``chips``, twice as many, four times as many ... that is no more than a 64th of a batch: round batches
    compile faster, and are what one would train with."""
    unit = chips
    while 2 * unit * _PRECISION <= size:
        unit *= 2
    return unit


def _foretold(known: dict[int, Row], memory: int) -> float | None:
    """Where the line through the two largest batches that were measured meets the memory; ``None`` without two."""
    measured = sorted((size, row.total_bytes) for size, row in known.items() if row.temp_bytes is not None)[-2:]
    if len(measured) < 2:
        return None
    (a, small), (b, large) = measured
    return None if large <= small else a + (memory - small) * (b - a) / (large - small)
