"""``lbpwht finetune``: adapts a pretrained vision transformer and reports what it cost."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax import run_folder, training_run
from lbpwht_jax.checkpoint import last_step
from lbpwht_jax.data import Augmentation, open_dataset
from lbpwht_jax.data.recipes import default_recipe, paper_recipe
from lbpwht_jax.methods import Train, parse_method
from lbpwht_jax.models import model_info
from lbpwht_jax.run_config import BUNDLED_WEIGHTS, DType, Projection, RunConfig
from lbpwht_jax.train import Placement, Recipe, Shard
from lbpwht_jax.train.processes import connect, is_first
from lbpwht_jax.training_run import Result
from lbpwht_jax.weights import BUNDLED
