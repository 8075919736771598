"""Plans for the transfer sweep: each layer keeps its own functions, at the backward FLOPs of another method."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transfer_backbone import backbone_info
from transfer_variants import VARIANTS, Train, Variant, adapted_backbone

from lbpwht_jax.adaptation import AdaptedModule, Method, adapt
from lbpwht_jax.cost import backward_flops
from lbpwht_jax.data import ArraySplit, Dataset, Split
from lbpwht_jax.plan import plan
from lbpwht_jax.train import normalise

BATCHES, BATCH_SIZE = 2, 32  # as ``lbpwht plan`` measures on


def batch_of(split: Split, seed: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Images, normalised, and their labels."""
    if not isinstance(split, ArraySplit):
        raise TypeError(f"the images must be in memory, got {type(split).__name__}")
    chosen = np.random.default_rng(seed).permutation(len(split.images))[:count]
    images = jnp.asarray(split.images[chosen]).astype(jnp.float32) / 255
    return normalise(images, backbone_info()), jnp.asarray(split.labels[chosen])


def planned_backbone(variant: Variant, trained: Train, variables: Any, dataset: Dataset, seed: int) -> AdaptedModule:
    """The backbone under a plan from the run's own start, on its training images."""
    classes, shape = len(dataset.classes), backbone_info().images.shape
    allowed = next(each for each in VARIANTS if each.name == variant.flops_of)
    flops = {
        name: backward_flops(model, model.with_branches(jax.random.key(0), variables), shape)
        for name, model in (
            ("full", adapted_backbone(Variant("full"), trained, classes)),
            ("allowed", adapted_backbone(allowed, variant.flops_train or trained, classes)),
        )
    }
    model = adapted_backbone(variant, trained, classes)
    batches = [batch_of(dataset.train, BATCHES * seed + k, BATCH_SIZE) for k in range(BATCHES)]
    made = plan(model, variables, batches, f"flops={flops['allowed'] / flops['full']}")
    rules = Method(plan=made).rules(backbone_info(), trained)
    return adapt(model.module, rules, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
