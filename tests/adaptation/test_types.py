"""What ``adapt`` returns, to a type checker (pyright reads this file) and when it runs."""

from typing import assert_type

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from lbpwht_jax import Freeze, adapt
from lbpwht_jax.adaptation import AdaptedModule

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x)


def test_a_linen_module_becomes_an_adapted_module():
    adapted = adapt(nn.Dense(4), [Freeze("^$")], X)
    assert_type(adapted, AdaptedModule)
    assert isinstance(adapted, AdaptedModule)


def test_an_nnx_module_keeps_its_class():
    model = Mlp(nnx.Rngs(0))
    adapted = adapt(model, [Freeze("fc")], X)
    assert_type(adapted, Mlp)
    assert isinstance(adapted, Mlp)
    x = jnp.arange(6.0).reshape(2, 3)
    chex.assert_trees_all_equal(adapted(x), model(x))
