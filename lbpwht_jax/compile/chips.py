"""What chips can do at most, as their makers say: FLOP/s without sparsity; links one way, half of what "bidirectional" says."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's limits.

    Attributes:
      flops: FLOP/s of dense bfloat16 products.
      memory: bytes.
      bandwidth: bytes/s of that memory, reads and writes together.
      links: bytes/s that it can send to other chips, over all its links at once.
      source: where all four stand.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float
    source: str


_GB, _GIB = 10**9, 2**30

CHIPS = {
    # 6 links of 50 GB/s each way: Jouppi et al., arXiv 2304.01433, table 4
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9, "https://docs.cloud.google.com/tpu/docs/v4, arXiv 2304.01433"),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, "https://docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, "https://docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 400e9, "https://docs.cloud.google.com/tpu/docs/v6e"),
    "a100": Chip(
        312e12, 80 * _GB, 2039e9, 300e9, "NVIDIA A100 80GB datasheet, SXM: https://www.nvidia.com/en-us/data-center/a100"
    ),
    "h100": Chip(989e12, 80 * _GB, 3350e9, 450e9, "NVIDIA H100 datasheet, SXM: https://www.nvidia.com/en-us/data-center/h100"),
    "h200": Chip(989e12, 141 * _GB, 4800e9, 450e9, "NVIDIA H200 datasheet, SXM: https://www.nvidia.com/en-us/data-center/h200"),
    # an eighth of the system's 36 PFLOP/s (72 with sparsity), 1,440 GB, 64 TB/s and 14.4 TB/s
    "b200": Chip(2250e12, 180 * _GB, 8000e9, 900e9, "NVIDIA DGX B200: https://www.nvidia.com/en-us/data-center/dgx-b200"),
}
