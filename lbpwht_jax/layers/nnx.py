"""NNX layers with a low-rank backward pass."""

from flax import nnx

from lbpwht_jax.ops.spec import Grid, LowRankSpec, lp_l1

_DEFAULT_SPEC = lp_l1(4)


class LowRankLinear(nnx.Linear):
    """``nnx.Linear`` with a low-rank backward pass along the token grid; the same arguments and parameters.

    Args:
      in_features: input channels.
      out_features: output channels.
      spec: the Walsh functions kept.
      grid: tokens along each axis, for inputs ``[..., prefix_tokens + tokens, channels]``; ``None`` for channels-last maps,
        ``[batch, height, width, channels]``.
      prefix_tokens: leading tokens outside the grid (class or register tokens), backpropagated exactly.
      rngs: random keys for the initial parameters.
      **arguments: the other arguments of ``nnx.Linear``, except ``dot_general``.

    Raises:
      TypeError: if ``dot_general`` is given.
      ValueError, TypeError: when called, whatever ``low_rank_matmul`` raises.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        spec: LowRankSpec = _DEFAULT_SPEC,
        grid: Grid | None = None,
        prefix_tokens: int = 0,
        rngs: nnx.Rngs,
        **arguments,
    ):
        if "dot_general" in arguments:
            raise TypeError("LowRankLinear: dot_general is what the layer sets itself; use nnx.Linear to pass your own")
        name = f"LowRankLinear({in_features}, {out_features})"
        dot_general = spec.dot_general(grid=grid, prefix_tokens=prefix_tokens, name=name)
        super().__init__(in_features, out_features, rngs=rngs, dot_general=dot_general, **arguments)
