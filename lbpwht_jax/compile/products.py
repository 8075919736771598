"""FLOPs of the products among a program's instructions, 2 per multiply-add; other arithmetic is not counted."""

import math
import re

from lbpwht_jax.compile.hlo import Array, Instruction
from lbpwht_jax.compile.kernels import KernelFlops, flops_of_call

_ESTIMATE = re.compile(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)')  # of a TPU's kernel


def product_flops(instruction: Instruction, operands: list[tuple[Array, ...]], kernel_flops: KernelFlops) -> int:
    """FLOPs of one instruction: a dot, a convolution or a call of a library's or of Pallas's kernel; 0 for others.

    Args:
      instruction: any.
      operands: the arrays of each of its operands.
      kernel_flops: of the Pallas kernels, by their shapes.
    """
    arrays = [array for leaves in operands for array in leaves]
    if instruction.opcode == "dot":
        return _dot(instruction, arrays)
    if instruction.opcode == "convolution":
        return _convolution(instruction, arrays)
    if instruction.opcode != "custom-call":
        return 0
    target = instruction.target
    if target.startswith("__cublas"):
        return _dot(instruction, arrays)
    if "fmha" in target:
        return _attention(instruction, arrays)
    if "conv" in target:
        return _convolution(instruction, arrays)
    estimate = _ESTIMATE.search(instruction.attributes)
    return int(estimate[1]) if estimate else flops_of_call(instruction, arrays, kernel_flops)


def _dot(instruction: Instruction, operands: list[Array]) -> int:
    """Twice the elements of the result times the length that is summed over."""
    contracted = instruction.dimensions("lhs_contracting_dimensions") or instruction.dimensions("lhs_contracting_dims")
    return 2 * instruction.results[0].size * math.prod(operands[0].shape[d] for d in contracted)


def _attention(instruction: Instruction, operands: list[Array]) -> int:
    """FLOPs of cuDNN's fused attention: 2 products of tokens x tokens x head size per head forward, 5 backward.

    The call says how large the scores are that it never writes: batch x heads x tokens x tokens.
    """
    scores = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d", ]*)\]', instruction.attributes)
    size = operands[0].shape[-1]
    if scores is None:
        raise ValueError(f"cuDNN's attention {instruction.name} does not say how large its scores are; its FLOPs are unknown")
    products = 5 if "Backward" in instruction.target else 2
    return 2 * products * size * math.prod(int(n) for n in re.findall(r"\d+", scores[1]))


def _convolution(instruction: Instruction, operands: list[Array]) -> int:
    """2 x batch x input features a group x output features x pairs of output and kernel position inside the input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    lhs, rhs, out = (dict(zip(text, range(len(text)), strict=True)) for text in labels.groups())
    image, kernel, result = (array.shape for array in _image_kernel_result(instruction, operands))
    window = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\dx_-]+)", _window(instruction))}
    pairs = 1
    for axis in (label for label in labels[1] if label.isdigit()):
        n = int(axis)
        options = {name: values[n] for name, values in window.items()}
        pairs *= _positions(image[lhs[axis]], kernel[rhs[axis]], result[out[axis]], options)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = image[lhs["b"]] // (int(groups[1]) if groups else 1)
    return 2 * pairs * batch * kernel[rhs["i"]] * kernel[rhs["o"]]


def _image_kernel_result(instruction: Instruction, operands: list[Array]) -> tuple[Array, Array, Array]:
    """Which arrays the labels speak of: cuDNN's backward passes keep those of the forward convolution."""
    first, second, made = operands[0], operands[1], instruction.results[0]
    if "BackwardFilter" in instruction.target:
        return first, made, second
    return (made, second, first) if "BackwardInput" in instruction.target else (first, second, made)


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
