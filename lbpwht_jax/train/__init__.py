"""Training: the recipe, one step, the loop over epochs, on any number of devices."""

from lbpwht_jax.train.details import Details, detailed
from lbpwht_jax.train.evaluation import Evaluation, Evaluator, loading
from lbpwht_jax.train.memory import keep_freed_memory
from lbpwht_jax.train.placement import Placement, Shard, bytes_on_a_device
from lbpwht_jax.train.recipe import Recipe
from lbpwht_jax.train.state import TrainState, everything, initial_state
from lbpwht_jax.train.step import Metrics, Sums, make_eval_step, make_train_step, normalise, placed_step
from lbpwht_jax.train.trainer import Diverged, Epoch, Snapshot, Step, Trainer

__all__ = [
    "Details",
    "Diverged",
    "Epoch",
    "Evaluation",
    "Evaluator",
    "Metrics",
    "Placement",
    "Recipe",
    "Shard",
    "Snapshot",
    "Step",
    "Sums",
    "TrainState",
    "Trainer",
    "bytes_on_a_device",
    "detailed",
    "everything",
    "initial_state",
    "keep_freed_memory",
    "loading",
    "make_eval_step",
    "make_train_step",
    "normalise",
    "placed_step",
]
