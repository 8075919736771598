"""Norms, convolutions and attention of other people's models, keeping few bits for the backward pass: the rule ``Lean``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype

from lbpwht_jax.adaptation.replace import call_in_place
from lbpwht_jax.ops import norms
from lbpwht_jax.ops.convolution import ConvProduct
from lbpwht_jax.ops.recompute import recomputed
from lbpwht_jax.ops.residuals import Residuals


@dataclasses.dataclass(frozen=True)
class LeanModule:
    """A norm, a convolution or an attention that a ``Lean`` rule can reach.

    Attributes:
      path: the module's path.
      kind: its class.
      refusal: why it must stay as it is, in words; nothing if it need not.
    """

    path: str
    kind: str
    refusal: str = ""


_KINDS = (nn.LayerNorm, nn.BatchNorm, nn.Conv, nn.MultiHeadDotProductAttention)
KINDS = f"{', '.join(kind.__name__ for kind in _KINDS[:-1])} or {_KINDS[-1].__name__}"


def lean_module(module: Any) -> LeanModule | None:
    """What a module is to ``Lean`` rules; ``None`` for all that they do not know."""
    if not isinstance(module, _KINDS):
        return None
    return LeanModule("/".join(module.path), type(module).__name__, _refusal(module))


def is_lean(module: Any) -> bool:
    """Whether the module is ``lean_call``'s own."""
    if isinstance(module, nn.Conv):
        return isinstance(module.conv_general_dilated, ConvProduct)
    return isinstance(getattr(module, "attention_fn", None), _Attention)


def lean_call(module: Any, residuals: Residuals, args: Any, kwargs: Any) -> Any:
    """Calls a norm, a convolution or an attention so that it keeps what the setting says.

    Args:
      module: bound, without a ``refusal``, not being initialised.
      residuals: the setting.
      args, kwargs: the call's.

    Raises:
      ValueError: for a mask of a norm's input, for attention with dropout or whose weights are captured.
    """
    if isinstance(module, nn.LayerNorm):
        return _layer_norm(module, residuals, *args, **kwargs)
    if isinstance(module, nn.BatchNorm):
        return _batch_norm(module, residuals, *args, **kwargs)
    if isinstance(module, nn.Conv):
        replaced: dict[str, Any] = {"conv_general_dilated": ConvProduct(residuals.norm_bits)}
    else:
        replaced = {"attention_fn": _Attention("/".join(module.path), residuals)}
    return call_in_place(module.clone(parent=module.scope, **replaced), args, kwargs)


def _refusal(module: Any) -> str:
    if isinstance(module, nn.MultiHeadDotProductAttention):
        if module.qk_attn_weights_einsum_cls or module.attn_weights_value_einsum_cls:
            return "it has products of its own"
        return "" if module.attention_fn is nn.dot_product_attention else "it has an attention_fn of its own"
    if isinstance(module, nn.Conv):
        return _conv_refusal(module)
    if type(module) not in (nn.LayerNorm, nn.BatchNorm):
        return "its class may compute something else"
    if not module.use_fast_variance:
        return "it computes its variance in two passes"
    if not (module.use_scale and module.use_bias):
        return "it lacks a scale or a bias"
    if module.axis_name is not None:
        return "its statistics are taken over devices"
    axes = [module.axis] if isinstance(module, nn.BatchNorm) else [module.reduction_axes, module.feature_axes]
    return "" if all(axis in (-1, (-1,)) for axis in axes) else "it normalises other axes than the last"


def _conv_refusal(module: nn.Conv) -> str:
    if type(module).__call__ is not nn.Conv.__call__:
        return "its class may compute something else"
    if module.conv_general_dilated or module.conv_general_dilated_cls:
        return "it has a product of its own"
    if not isinstance(module.kernel_size, Sequence) or len(module.kernel_size) != 2:
        return "it is no convolution of maps, which have two axes"
    dilations: tuple[Any, ...] = (module.input_dilation, module.kernel_dilation)
    dilated = any(np.any(np.asarray(1 if dilation is None else dilation) != 1) for dilation in dilations)
    return "it is dilated" if dilated else ""


def _layer_norm(module: Any, residuals: Residuals, x: jax.Array, *, mask: Any = None) -> jax.Array:
    _refuse_mask(module, mask)
    scale, bias = (module.get_variable("params", name) for name in ("scale", "bias"))
    dtype = canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    return norms.layer_norm(x, scale, bias, module.epsilon, residuals.norm_bits, dtype)


def _batch_norm(
    module: Any, residuals: Residuals, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
) -> jax.Array:
    _refuse_mask(module, mask)
    running = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    scale, bias = (module.get_variable("params", name) for name in ("scale", "bias"))
    stored = [module.get_variable("batch_stats", name) for name in ("mean", "var")]
    dtype = canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    statistics = tuple(stored) if running else None
    y, found = norms.batch_norm(x, statistics, scale, bias, module.epsilon, residuals.norm_bits, dtype)
    if not running:
        for name, old, new in zip(("mean", "var"), stored, found, strict=True):
            module.put_variable("batch_stats", name, module.momentum * old + (1 - module.momentum) * new)
    return y


def _refuse_mask(module: Any, mask: Any) -> None:
    if mask is not None:
        path = "/".join(module.path)
        raise ValueError(f"adapt: {path} is called with a mask, which Lean does not take; leave it out of the rule's pattern")


@dataclasses.dataclass(frozen=True)
class _Attention:
    """``nn.dot_product_attention``, whose scores are computed again from queries, keys and values in few bits.

    Attributes:
      path: the module's, for messages.
      residuals: the setting.
    """

    path: str
    residuals: Residuals

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        force_fp32_for_softmax: bool = False,
        module: Any = None,
    ) -> jax.Array:
        if module is not None or (dropout_rate > 0 and not deterministic):
            what = "captures its weights" if module is not None else "has dropout"
            raise ValueError(f"adapt: {self.path} {what}, which Lean does not take; leave it out of the rule's pattern")
        function = _Product(dtype, precision, force_fp32_for_softmax)
        # a mask as Flax applies it: what is masked gets the least score that there is
        hidden = jnp.asarray(jnp.finfo(query.dtype).min, query.dtype)
        biases = [] if mask is None else [jnp.where(mask, jnp.zeros_like(hidden), hidden)]
        bits = self.residuals.attention_bits
        if not self.residuals.recompute_scores:
            return function(query, key, value, *biases)
        return recomputed(function, query, key, value, *biases, bits=(bits, bits, bits, *(None for _ in biases)))


@dataclasses.dataclass(frozen=True)
class _Product:
    dtype: Any
    precision: Any
    force_fp32_for_softmax: bool

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        return nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            deterministic=True,
            dtype=self.dtype,
            precision=self.precision,
            force_fp32_for_softmax=self.force_fp32_for_softmax,
        )
