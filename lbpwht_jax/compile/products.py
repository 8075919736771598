"""FLOPs of the products among a program's instructions, 2 per multiply-add; other arithmetic is not counted."""

import math
import re

from lbpwht_jax.compile.hlo import Array, Instruction

# What a call's results hold beside its arrays: workspaces.
_WORKSPACE = "s8"


def product_flops(instruction: Instruction, operands: list[tuple[Array, ...]], kernel_flops: dict[str, int]) -> int:
    """FLOPs of one instruction: a dot, a convolution or a call of a library's or of Pallas's kernel; 0 for others.

    Args:
      instruction: any.
      operands: the arrays of each of its operands.
      kernel_flops: what Pallas's kernels say they cost, by name.
    """
    arrays = [array for leaves in operands for array in leaves]
    if instruction.opcode == "dot":
        return _dot(instruction, arrays)
    if instruction.opcode == "convolution":
        return _convolution(instruction, arrays)
    if instruction.opcode != "custom-call":
        return 0
    target = instruction.target
    if "cublas" in target and "matmul" in target or target.endswith("gemm"):
        return _dot(instruction, arrays)
    if "fmha" in target:
        return _attention(instruction, arrays)
    if "conv" in target:
        return _convolution(instruction, arrays)
    return _kernel(instruction, kernel_flops)


def _dot(instruction: Instruction, operands: list[Array]) -> int:
    """Twice the elements of the result times the length that is summed over."""
    contracted = instruction.dimensions("lhs_contracting_dimensions") or instruction.dimensions("lhs_contracting_dims")
    return 2 * instruction.results[0].size * math.prod(operands[0].shape[d] for d in contracted)


def _attention(instruction: Instruction, operands: list[Array]) -> int:
    """Of cuDNN's fused attention: 2 products of tokens x tokens x head size forward and 5 backward, for every head.

    Forward, with operands query ``[batch, tokens, heads, size]`` or ``[batch, heads, tokens, size]``, that is
    4 x batch x heads x tokens^2 x size; backward, 10 x the same.
    """
    layout = re.search(r'"?is_flash_attention', instruction.attributes)
    del layout
    backward = "Backward" in instruction.target
    query = next(array for array in operands if len(array.shape) == 4)
    batch, *middle, size = query.shape
    heads, tokens = _heads_and_tokens(instruction, middle)
    return (10 if backward else 4) * batch * heads * tokens**2 * size


def _heads_and_tokens(instruction: Instruction, middle: list[int]) -> tuple[int, int]:
    """Which of a query's two middle axes is which: the scores' shape, batch x heads x tokens x tokens, stands in the call."""
    scores = re.search(r'"intermediate_tensor_shape":\{[^}]*?"dimensions":\["\d+","(\d+)","(\d+)"', instruction.attributes)
    if scores:
        return int(scores[1]), int(scores[2])
    return (middle[1], middle[0]) if middle[0] >= middle[1] else (middle[0], middle[1])


def _convolution(instruction: Instruction, operands: list[Array]) -> int:
    """2 x batch x input features a group x output features x pairs of output and kernel position inside the input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    lhs, rhs, out = (dict(zip(text, range(len(text)), strict=True)) for text in labels.groups())
    image, kernel, result = operands[0].shape, operands[1].shape, instruction.results[0].shape
    window = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\dx_-]+)", _window(instruction))}
    pairs = 1
    for axis in (label for label in labels[1] if label.isdigit()):
        n = int(axis)
        options = {name: values[n] for name, values in window.items()}
        pairs *= _positions(image[lhs[axis]], kernel[rhs[axis]], result[out[axis]], options)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = image[lhs["b"]] // (int(groups[1]) if groups else 1)
    return 2 * pairs * batch * kernel[rhs["i"]] * kernel[rhs["o"]]


def _window(instruction: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    return found[1] if found else ""


def _positions(image: int, kernel: int, result: int, options: dict[str, str]) -> int:
    """Pairs of an output and a kernel position along one axis that meet an element of the input, not padding or a gap."""
    stride, low = int(options.get("stride", 1)), int(options.get("pad", "0_0").split("_")[0])
    spread, gap = int(options.get("lhs_dilate", 1)), int(options.get("rhs_dilate", 1))
    end = (image - 1) * spread
    at = (o * stride + k * gap - low for o in range(result) for k in range(kernel))
    return sum(0 <= position <= end and position % spread == 0 for position in at)


def _kernel(instruction: Instruction, kernel_flops: dict[str, int]) -> int:
    estimate = re.search(r'"?cost_estimate"?\s*:\s*\{[^}]*?"?flops"?\s*:\s*"?(\d+)', instruction.attributes)
    if estimate:
        return int(estimate[1])
    return next((flops for name, flops in kernel_flops.items() if name in instruction.attributes), 0)


def is_workspace(array: Array) -> bool:
    """Whether a library call's result is scratch memory."""
    return array.dtype == _WORKSPACE and len(array.shape) == 1
