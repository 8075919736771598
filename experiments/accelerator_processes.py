"""Work in a process of its own, which gives all memory of the device back when it ends."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
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
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _keep_compiled, (str(cache),)) as pool:
        return pool.submit(function, *arguments).result()


def _keep_compiled(cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
