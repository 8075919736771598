"""What chips can do at most, as their makers say."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's limits.

    Attributes:
      flops: bfloat16 FLOP/s of dense products.
      memory: bytes.
      bandwidth: bytes/s of that memory.
      links: bytes/s that the chip sends to other chips, over all links.
      sources: where the numbers stand.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float
    sources: tuple[str, ...]


_GB, _GIB = 10**9, 2**30

CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9, ("https://cloud.google.com/tpu/docs/v4",)),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, ("https://cloud.google.com/tpu/docs/v5e",)),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, ("https://cloud.google.com/tpu/docs/v5p",)),
    "v6e": Chip(918e12, 32 * _GIB, 1640e9, 448e9, ("https://cloud.google.com/tpu/docs/v6e",)),
    "a100": Chip(312e12, 80 * _GB, 2039e9, 300e9, ("https://www.nvidia.com/en-us/data-center/a100/",)),
    "h100": Chip(989e12, 80 * _GB, 3350e9, 450e9, ("https://www.nvidia.com/en-us/data-center/h100/",)),
    "h200": Chip(989e12, 141 * _GB, 4800e9, 450e9, ("https://www.nvidia.com/en-us/data-center/h200/",)),
    "b200": Chip(2250e12, 180 * _GB, 8000e9, 900e9, ("https://www.nvidia.com/en-us/data-center/dgx-b200/",)),
}
