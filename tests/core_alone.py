"""Uses the core as somebody without any extra does; ``.ci/core`` runs it where nothing else is installed.

Every public name of every room is loaded, and a step of training is taken with the layer and with an adapted model.
"""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbpwht_jax

ROOMS = ("ops", "layers", "models", "adaptation", "weights", "cost", "plan")


def load_every_name() -> None:
    """Loads each name that the root and the rooms list."""
    for module in (lbpwht_jax, *(importlib.import_module(f"lbpwht_jax.{room}") for room in ROOMS)):
        for name in module.__all__:
            getattr(module, name)


def losses_before_and_after_a_step(loss, params):
    """The loss at the parameters, and after a step down its gradient."""
    optimizer = optax.sgd(1e-3)
    before, gradient = jax.jit(jax.value_and_grad(loss))(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params))
    return float(before), float(jax.jit(loss)(optax.apply_updates(params, updates)))


def train_the_layer() -> tuple[float, float]:
    """Fits one LowRankDense to a smooth target."""
    model = nn.Sequential([lbpwht_jax.LowRankDense(8, spec=lbpwht_jax.lp_l1(4), grid=(8, 8)), nn.gelu, nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (2, 64, 4))
    variables = model.init(jax.random.key(1), x)
    return losses_before_and_after_a_step(lambda v: jnp.mean((model.apply(v, x) - 1) ** 2), variables)


def train_a_model() -> tuple[float, float]:
    """Takes a step with the model that comes with the package, adapted."""
    model = lbpwht_jax.create_model("vit_micro_patch4_28", num_classes=10)
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    labels = jnp.arange(4)
    rules = [lbpwht_jax.LowRank(r"(attn|mlp)/", lbpwht_jax.lp_l1(4))]
    adapted = lbpwht_jax.adapt(model, rules, images)
    variables = adapted.init(jax.random.key(0), images)

    def loss(variables):
        return optax.softmax_cross_entropy_with_integer_labels(adapted.apply(variables, images), labels).mean()

    return losses_before_and_after_a_step(loss, variables)


def main() -> None:
    """Does all of it; raises if something is amiss."""
    load_every_name()
    for before, after in (train_the_layer(), train_a_model()):
        if not after < before:
            raise SystemExit(f"a step did not lower the loss: {before} -> {after}")


if __name__ == "__main__":
    main()
