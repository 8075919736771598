"""What one run of a compiled program does: kernels, the bytes each reads and writes, FLOPs, collectives.

A loop's body counts as often as it runs; of a conditional's branches the one that moves the most bytes counts.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lbpwht_jax.compile.hlo import Instruction, Program
from lbpwht_jax.compile.kernels import KernelFlops
from lbpwht_jax.compile.products import product_flops
from lbpwht_jax.compile.traffic import moved_bytes

_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "domain"}
_FREE_CALLS = {"ConcatBitcast", "AllocateBuffer", "Sharding"}  # of XLA's, which move nothing
_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
_COLLECTIVES |= {"collective-broadcast"}
_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
      name: the compiler's.
      source: where in the Python program it comes from.
      bytes: read and written, each time it runs.
      flops: of products, each time it runs.
      runs: how often it runs in a step.
      collectives: bytes of the whole arrays that it reduces, gathers or scatters with other chips, each time, by kind.
    """

    name: str
    source: str
    bytes: int
    flops: int
    runs: int
    collectives: Mapping[str, int]

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """What all its runs take at least."""
        return self.runs * max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does.

    Attributes:
      kernels: each once, in the order in which they run.
      loops_of_unknown_length: of which nobody says how often they run; their bodies count once.
    """

    kernels: tuple[Kernel, ...]
    loops_of_unknown_length: int

    @property
    def bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(kernel.bytes * kernel.runs for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(kernel.flops * kernel.runs for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Kernels that run, one in a loop as often as it does."""
        return sum(kernel.runs for kernel in self.kernels)

    @property
    def collectives(self) -> dict[str, int]:
        """Bytes of the whole arrays that chips reduce, gather or scatter together, by kind."""
        total: collections.Counter[str] = collections.Counter()
        for kernel in self.kernels:
            total.update({kind: size * kernel.runs for kind, size in kernel.collectives.items()})
        return dict(total)

    def link_bytes(self, chips: int) -> float:
        """Bytes that a chip of a ring of so many sends for the collectives.

        Each array but a chip's own share of it passes by every chip, in an all-reduce twice: to be summed and to be handed out.
        """
        share = (chips - 1) / chips
        return sum(size * share * (2 if kind == "all-reduce" else 1) for kind, size in self.collectives.items())


def count(program: Program, kernel_flops: KernelFlops | None = None) -> Counts:
    """Counts a program.

    Args:
      program: compiled.
      kernel_flops: FLOPs of the step's Pallas kernels.
    """
    walk = _Walk(program, kernel_flops or {})
    kernels = tuple(walk.computation(program.entry, 1))
    loops = (i for instructions in program.computations.values() for i in instructions if i.opcode == "while")
    return Counts(kernels, sum(program.trips(loop) is None for loop in loops))


class _Collective(NamedTuple):
    """One collective: its kind, what marks it where a compiler names it several times, bytes of its whole array."""

    kind: str
    chain: str
    bytes: int


class _Walk:
    def __init__(self, program: Program, kernel_flops: KernelFlops):
        self.program, self.kernel_flops = program, kernel_flops
        self.started: set[str] = set()

    def computation(self, name: str, runs: int) -> Iterator[Kernel]:
        """The kernels of a computation that runs so often."""
        for instruction in self.program.computations[name]:
            yield from self._kernels(instruction, name, runs)

    def _kernels(self, instruction: Instruction, where: str, runs: int) -> Iterator[Kernel]:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target in _FREE_CALLS:
            return
        if opcode == "while":
            trips = self.program.trips(instruction)
            for part in ("condition", "body"):
                yield from self.computation(instruction.called(part) or "", runs * (1 if trips is None else trips))
        elif opcode == "conditional":
            branches = [list(self.computation(name, runs)) for name in instruction.branches]
            yield from max(branches, key=lambda kernels: sum(k.bytes * k.runs for k in kernels), default=[])
        elif opcode in ("call", "async-start"):
            yield from self.computation(instruction.called("to_apply") or instruction.called("calls") or "", runs)
        else:
            moved = moved_bytes(instruction, self.program.instructions[where], self.program)
            flops, parts = self._inside(instruction, where)
            yield Kernel(instruction.name, instruction.source, moved, flops, runs, self._new(parts))

    def _new(self, parts: tuple[_Collective, ...]) -> dict[str, int]:
        """Bytes by kind of the collectives that start here; a TPU's kernels name one once more as it goes on beside them."""
        total: collections.Counter[str] = collections.Counter()
        for part in parts:
            if not part.chain or part.chain not in self.started:
                total[part.kind] += part.bytes
        self.started |= {part.chain for part in parts}
        return dict(total)

    def _inside(self, instruction: Instruction, where: str) -> tuple[int, tuple[_Collective, ...]]:
        """FLOPs and collectives of an instruction, those of a fusion's parts."""
        if instruction.opcode == "fusion":
            return self._fused(instruction.called("calls") or "")
        known = self.program.instructions[where]
        operands = [known[name].results for name in instruction.operands if name in known]
        kind = instruction.opcode.removesuffix("-start")
        chain = _CHAIN.search(instruction.attributes)
        found = _Collective(kind, chain[1] if chain else "", self._whole(instruction, operands))
        return product_flops(instruction, operands, self.kernel_flops), (found,) if kind in _COLLECTIVES else ()

    @functools.cache  # noqa: B019  lives as long as its program
    def _fused(self, name: str) -> tuple[int, tuple[_Collective, ...]]:
        parts = [self._inside(instruction, name) for instruction in self.program.computations[name]]
        return sum(flops for flops, _ in parts), tuple(found for _, collectives in parts for found in collectives)

    @staticmethod
    def _whole(instruction: Instruction, operands: list) -> int:
        """Bytes of the array a collective is about: the gathered one, the one to be scattered, reduced or exchanged."""
        taken = sum(array.bytes for leaves in operands for array in leaves)
        if instruction.opcode == "all-gather-start":
            return instruction.result_bytes - taken  # its results are the operands and the gathered arrays
        return instruction.result_bytes if instruction.opcode == "all-gather" else taken
