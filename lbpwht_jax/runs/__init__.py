"""Training runs: what a run is, its folder, how it trains, and what it came to."""

from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.finished import FinishedRun, load_run
from lbpwht_jax.runs.metrics import read_metrics

__all__ = ["FinishedRun", "RunConfig", "load_run", "read_metrics"]
