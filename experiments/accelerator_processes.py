"""Work in a process of its own, which gives all memory of the device back when it ends."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


def in_a_process(cache: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of a module in a fresh Python.

    Args:
      cache: folder of compiled programs, from which later processes take them.
      function: what is called.
      *arguments: for it.

    Returns:
      What it returns.

    Raises:
      concurrent.futures.process.BrokenProcessPool: if the process dies; otherwise whatever the function raises.
    """
    with _pool(cache, 1) as pool:
        return pool.submit(function, *arguments).result()


def side_by_side(
    cache: Path, function: Callable[..., Any], arguments: Sequence[Any], seconds: float
) -> list[BaseException | None]:
    """Calls a function once for each argument, each in a fresh Python of its own, all at the same time.

    Args:
      cache: folder of compiled programs.
      function: gets one of the arguments, a barrier that all calls have to reach, and a lock for what one may do at a time.
      arguments: one for each call.
      seconds: how long a call may wait at the barrier for the others.

    Returns:
      What each call raised; ``None`` where it did not.
    """
    with multiprocessing.get_context("spawn").Manager() as shared, _pool(cache, len(arguments)) as pool:
        all_ready, turn = shared.Barrier(len(arguments), timeout=seconds), shared.Lock()
        return [call.exception() for call in [pool.submit(function, one, all_ready, turn) for one in arguments]]


def begun(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[..., Any]]:
    """Begins all calls in threads of their own, and returns what waits for each and returns or raises what it did."""
    pool = concurrent.futures.ThreadPoolExecutor(max(1, len(calls)))
    started = {name: pool.submit(call).result for name, call in calls.items()}
    pool.shutdown(wait=False)
    return started


def _pool(cache: Path, processes: int) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, _keep_compiled, (str(cache),))


def _keep_compiled(cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
