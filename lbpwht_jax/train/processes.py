"""Several processes that train together."""

import os

import jax


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; does nothing for a single process. Call it before anything else that uses JAX.

    Without a coordinator, processes that SLURM started as several tasks of one step, and those of a TPU slice of several
    hosts, find each other by themselves.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      ValueError: if only some of the three are given, or one of them is out of range.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("--coordinator, --num-processes and --process-id go together; give all three or none")
        if ":" not in coordinator:
            raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, got {process_id}")
    elif not _several():
        return
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, num_processes, process_id)


def _several() -> bool:
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return slurm or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0
