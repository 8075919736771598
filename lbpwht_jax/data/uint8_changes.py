"""Random changes to training images, on the device; uint8 in, uint8 out."""

import jax
import jax.numpy as jnp


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of ``[batch, height, width, channels]`` left to right with probability one half."""
    chosen = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def shift(key: jax.Array, images: jax.Array, pixels: int = 2) -> jax.Array:
    """Moves each image of ``[batch, height, width, channels]`` by up to ``pixels`` along both axes, repeating its edge."""
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pixels + 1)
    zero = jnp.zeros((), offsets.dtype)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], zero), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)
