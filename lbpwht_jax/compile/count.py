"""What one run of a compiled program does: kernels, the bytes each reads and writes, FLOPs, collectives.

A kernel reads each distinct operand once and writes each result once. A kernel that takes a slice of an operand reads the
slice; one that updates a slice in place writes the slice. A loop's body counts as often as it runs, of a conditional's
branches the dearest counts.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping

from lbpwht_jax.compile.hlo import Array, Instruction, Program
from lbpwht_jax.compile.products import is_workspace, product_flops

_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "bitcast-convert", "domain", "iota-done"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COLLECTIVES += ("collective-broadcast",)
_SLICES = {"slice", "dynamic-slice", "gather"}
_SAME = {"bitcast", "reshape", "copy", "convert", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
      name: of the compiler's.
      source: where in the Python program it comes from.
      bytes: read and written, each time it runs.
      flops: of products, each time it runs.
      runs: how often it runs in a step.
    """

    name: str
    source: str
    bytes: int
    flops: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does.

    Attributes:
      kernels: those of the program, those of a loop's body once with their runs.
      collectives: bytes of the whole arrays that are reduced, gathered or scattered, by kind.
      endless: loops of which nobody says how often they run; their bodies count once.
    """

    kernels: tuple[Kernel, ...]
    collectives: Mapping[str, int]
    endless: int

    @property
    def bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(kernel.bytes * kernel.runs for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(kernel.flops * kernel.runs for kernel in self.kernels)

    @property
    def repeated_bytes(self) -> int:
        """Those of loops' bodies beyond the first time they run."""
        return sum(kernel.bytes * (kernel.runs - 1) for kernel in self.kernels)

    def link_bytes(self, chips: int) -> float:
        """Bytes that a chip of a ring of so many sends for the collectives.

        Each array but a chip's own share of it passes by every chip, in an all-reduce twice: to be summed and to be handed out.
        """
        share = (chips - 1) / chips
        return sum(size * share * (2 if kind == "all-reduce" else 1) for kind, size in self.collectives.items())

    @property
    def launches(self) -> int:
        """Kernels that run, one in a loop as often as it does."""
        return sum(kernel.runs for kernel in self.kernels)

    def roofline(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that the kernels take one after the other, each as fast as its products or its bytes allow."""
        return sum(kernel_seconds(kernel, flops_per_second, bytes_per_second) for kernel in self.kernels)


def kernel_seconds(kernel: Kernel, flops_per_second: float, bytes_per_second: float) -> float:
    """Seconds that a kernel's runs take at least."""
    return kernel.runs * max(kernel.flops / flops_per_second, kernel.bytes / bytes_per_second)


def count(program: Program, kernel_flops: Mapping[str, int] | None = None) -> Counts:
    """Counts a program.

    Args:
      program: compiled.
      kernel_flops: FLOPs that Pallas's kernels say they cost, by name.
    """
    counter = _Counter(program, dict(kernel_flops or {}))
    kernels = tuple(counter.computation(program.entry, 1))
    return Counts(kernels, dict(counter.collectives), counter.endless)


class _Counter:
    """Walks through a program once."""

    def __init__(self, program: Program, kernel_flops: dict[str, int]):
        self.program, self.kernel_flops = program, kernel_flops
        self.collectives: collections.Counter[str] = collections.Counter()
        self.endless = 0

    def computation(self, name: str, runs: int) -> Iterator[Kernel]:
        for instruction in self.program.computations[name]:
            yield from self._instruction(instruction, name, runs)

    def _instruction(self, instruction: Instruction, where: str, runs: int) -> Iterator[Kernel]:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            trips = self.program.trips(instruction)
            self.endless += trips is None
            for part in ("condition", "body"):
                yield from self.computation(instruction.called(part) or "", runs * (1 if trips is None else trips))
        elif opcode == "conditional":
            branches = [list(self.computation(name, runs)) for name in instruction.branches]
            yield from max(branches, key=lambda kernels: sum(k.bytes * k.runs for k in kernels), default=[])
        elif opcode in ("call", "async-start"):
            yield from self.computation(instruction.called("to_apply") or instruction.called("calls") or "", runs)
        else:
            yield self._kernel(instruction, where, runs)

    def _kernel(self, instruction: Instruction, where: str, runs: int) -> Kernel:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            self.collectives[kind] += runs * self._whole(instruction, where)
        moved = self._bytes(instruction, where)
        return Kernel(instruction.name, instruction.source, moved, self._flops(instruction, where), runs)

    def _operands(self, instruction: Instruction, where: str) -> list[tuple[Array, ...]]:
        known = self.program.instructions[where]
        return [known[name].results for name in instruction.operands if name in known]

    def _whole(self, instruction: Instruction, where: str) -> int:
        """Bytes of the array a collective is about: what is gathered, scattered, reduced or exchanged, in whole."""
        taken = sum(a.bytes for leaves in self._operands(instruction, where) for a in leaves)
        if instruction.opcode == "all-gather-start":
            return instruction.result_bytes - taken  # its results are (operands, results)
        return instruction.result_bytes if instruction.opcode == "all-gather" else taken

    def _flops(self, instruction: Instruction, where: str) -> int:
        if instruction.opcode == "fusion":
            return self._inside(instruction.called("calls") or "")
        return product_flops(instruction, self._operands(instruction, where), self.kernel_flops)

    @functools.cache  # noqa: B019  a counter lives as long as its program
    def _inside(self, name: str) -> int:
        return sum(self._flops(instruction, name) for instruction in self.program.computations[name])

    def _bytes(self, instruction: Instruction, where: str) -> int:
        known = self.program.instructions[where]
        if instruction.opcode.endswith("-start"):
            return 2 * sum(array.bytes for leaves in self._operands(instruction, where) for array in leaves)
        if instruction.opcode in _SLICES:
            return 2 * instruction.result_bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * known[instruction.operands[1]].result_bytes
        body = self.program.computations.get(instruction.called("calls") or "", ()) if instruction.opcode == "fusion" else ()
        parameters = {int(i.inner): i for i in body if i.opcode == "parameter"}
        updates = {i.operands[0]: i for i in body if i.opcode == "dynamic-update-slice"}
        updated = {i.name: i for i in updates.values()}
        read: dict[tuple[str, int], int] = {}
        for n, operand in enumerate(instruction.operands):
            size = known[operand].result_bytes if operand in known else 0
            if n in parameters:
                size = self._read(parameters[n], body, size)
            key = _buffer(operand, known)
            read[key] = max(read.get(key, 0), size)
        return sum(read.values()) + self._written(instruction, body, updated)

    def _read(self, parameter: Instruction, body: tuple[Instruction, ...], size: int) -> int:
        """Bytes a fusion reads of an operand: its slices if it takes no more, nothing of one it updates in place."""
        users = [i for i in body if parameter.name in i.operands]
        total = 0
        for user in users:
            if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue
            if user.opcode == "bitcast":
                total += self._read(user, body, size)
            elif user.opcode in _SLICES and user.operands[0] == parameter.name:
                total += user.result_bytes
            else:
                return size
        return min(total, size)

    def _written(self, instruction: Instruction, body: tuple[Instruction, ...], updated: dict[str, Instruction]) -> int:
        if not updated:
            return sum(array.bytes for array in instruction.results if not is_workspace(instruction, array))
        inner = {i.name: i for i in body}
        root = next(i for i in body if i.root)
        total = 0
        for name in root.operands if root.opcode == "tuple" else (root.name,):
            while name not in updated and inner[name].opcode in _SAME:
                name = inner[name].operands[0]
            last = inner[name]
            total += inner[last.operands[1]].result_bytes if name in updated else last.result_bytes
        return total


def _buffer(name: str, known: Mapping[str, Instruction]) -> tuple[str, int]:
    """What an operand is, whichever way it is looked at: an instruction's name, and which of its results."""
    instruction = known.get(name)
    while instruction is not None and instruction.opcode == "bitcast":
        name = instruction.operands[0]
        instruction = known.get(name)
    if instruction is not None and instruction.opcode == "get-tuple-element":
        return instruction.operands[0], int(instruction.attributes.partition("index=")[2].partition(",")[0] or 0)
    return name, -1
