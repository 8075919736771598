"""Training steps and inference in PyTorch, and where a step spends its time; for step_profile.py and inference_speed.py."""

import statistics
from collections import defaultdict
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]

# torchvision, which timm imports, misses these operators in a CPU build of torch.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402  # pyright: ignore[reportMissingImports]

TIMM = timm.__version__

_KINDS = {
    "mm": "dense layers",
    "addmm": "dense layers",
    "bmm": "attention",
    "_softmax": "attention",
    "_softmax_backward_data": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "gelu": "activations, biases",
    "gelu_backward": "activations, biases",
    "clamp_min": "activations, biases",
    "clamp_min_": "activations, biases",
    "threshold_backward": "activations, biases",
    "avg_pool2d": "poolings",
    "avg_pool2d_backward": "poolings",
}
_CONVOLUTIONS = ("mkldnn_convolution", "convolution_backward", "_slow_conv2d_forward", "thnn_conv2d")


def _model_and_images(name: str, batch: int, size: int, classes: int, channels_last: bool) -> tuple[Any, Any]:
    """timm's model and random images, in a memory layout."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = timm.create_model(name, num_classes=classes)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    return model.to(memory_format=layout), images


class TorchStep:
    """One training step of timm's model: loss with smoothed labels, clipped gradients, AdamW; frozen batch norms.

    Attributes:
      name: timm's name.
      batch: images.
      size: their height and width.
      classes: outputs.
      channels_last: the memory layout of images and weights.
    """

    def __init__(self, name: str, batch: int, size: int, classes: int, channels_last: bool):
        self._model, self._images = _model_and_images(name, batch, size, classes, channels_last)
        self._model.train()
        for module in self._model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        self._labels = torch.randint(0, classes, (batch,))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=5e-4, weight_decay=1e-5)
        self._loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def __call__(self) -> float:
        """Makes the next step and returns its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        logits: Any = self._model(self._images)
        logits = (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits
        loss = self._loss(logits, self._labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 5.0)
        self._optimizer.step()
        return loss.item()


class TorchInference:
    """Class probabilities by timm's model.

    Attributes:
      name: timm's name.
      batch: images.
      size: their height and width.
      classes: outputs.
      channels_last: the memory layout of images and weights.
    """

    def __init__(self, name: str, batch: int, size: int, classes: int, channels_last: bool):
        self._model, self._images = _model_and_images(name, batch, size, classes, channels_last)
        self._model.eval()

    def __call__(self) -> Any:
        """Classifies the images."""
        with torch.inference_mode():
            return torch.softmax(self._model(self._images), -1)


def torch_operations(step: TorchStep, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each kind and operation with its shapes, in one step; of a call, those that it calls are left out."""
    samples: list[dict[tuple[str, str], float]] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for event in profiled.events() or ():
            sums[_kind(event)] += event.self_cpu_time_total / 1e6
        samples.append(sums)
    keys = {key for sums in samples for key in sums}
    return {key: statistics.median(sums.get(key, 0.0) for sums in samples) for key in keys}


def _kind(event: Any) -> tuple[str, str]:
    shapes = [list(shape) for shape in event.input_shapes or () if shape]
    name = event.name.removeprefix("aten::")
    operation = " ".join([name, *map(str, shapes[:3])])
    around, parent = set(), event
    while parent is not None:
        around.add(parent.name.partition("#")[0])
        parent = parent.cpu_parent
    if around & {"Optimizer.step", "Optimizer.zero_grad"} or "linalg_vector_norm" in name or "_foreach" in name:
        return "optimiser", operation
    if name in _CONVOLUTIONS:
        weight = next(shape for shape in reversed(shapes[:3]) if len(shape) == 4) if shapes else [0, 0, 0, 0]
        if weight[2:] == [1, 1]:
            return "dense layers", operation
        return "depthwise convolutions" if weight[1] == 1 else "convolutions", operation
    if "norm" in name:
        return "norms", operation
    return _KINDS.get(name, "the rest"), operation
