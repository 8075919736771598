"""A compiled program's text (XLA's HLO, as ``compiled.as_text()`` gives it) as instructions that can be counted."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)\}")
_IN_MEMORY = {"0", "5"}  # spaces: the chip's memory and the host's; a TPU's others are on the chip
_NAME = re.compile(r"%([\w.$-]+)")
_HEAD = re.compile(r"\s+(?:ROOT )?%?([\w.$-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array's dtype, as XLA spells it (``bf16``), shape, and layout, such as ``{1,0:T(8,128)S(1)}``."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without what a layout pads it to; narrow integers are packed."""
        return -(-self.size * _bits(self.dtype) // 8)

    @property
    def on_chip(self) -> bool:
        """Whether it lives in a TPU's memory on the chip."""
        space = _SPACE.search(self.layout)
        return space is not None and space[1] not in _IN_MEMORY

    @property
    def memory_bytes(self) -> int:
        """Bytes that it takes of the chip's main memory, with what a TPU's tiles pad it to; 0 of an array on the chip."""
        if self.on_chip:
            return 0
        tile = _TILE.search(self.layout)
        if tile is None or not self.size:
            return self.bytes
        order = _shape(self.layout[: tile.start()])  # the axis whose elements are neighbours comes first
        sizes = [self.shape[axis] for axis in order]
        for n, multiple in enumerate(reversed(_shape(tile[1]))):
            if n < len(sizes):
                sizes[n] = -(-sizes[n] // multiple) * multiple
        return -(-math.prod(sizes) * _bits(self.dtype) // 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its program.
      opcode: such as ``"fusion"``.
      results: its arrays; those of a tuple in turn, nested ones flattened.
      operands: names of the instructions it takes.
      attributes: what stands behind the operands, as text.
      inner: what stands between the operands' parentheses, as text.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    inner: str
    root: bool

    @property
    def result_bytes(self) -> int:
        """Bytes of all results."""
        return sum(array.bytes for array in self.results)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all results in the chip's main memory."""
        return sum(array.memory_bytes for array in self.results)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as ``calls`` names."""
        found = re.search(rf"\b{attribute}=%?([\w.$-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a ``conditional``."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return tuple(_NAME.findall(found[1]))
        return tuple(name for kind in ("true", "false") if (name := self.called(f"{kind}_computation")))

    @property
    def target(self) -> str:
        """What a ``custom-call`` calls; empty for others."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def source(self) -> str:
        """Where in the Python program it comes from, such as ``"blocks_0/attn/qkv/dot_general"``; empty where unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def dimensions(self, attribute: str) -> tuple[int, ...]:
        """An attribute's numbers, written ``name={1,2}`` or ``"name":["1","2"]``; none where it is missing."""
        found = re.search(rf'\b{attribute}"?[=:]\s*[{{[]([\d,", ]*)[}}\]]', self.attributes)
        return tuple(int(n) for n in re.findall(r"\d+", found[1])) if found else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program.

    Attributes:
      computations: the instructions of each by its name, in the order in which they run.
      entry: name of the one that is the program.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def instructions(self) -> dict[str, dict[str, Instruction]]:
        """Each computation's instructions by their names."""
        return {name: {i.name: i for i in instructions} for name, instructions in self.computations.items()}

    def trips(self, loop: Instruction) -> int | None:
        """How often a ``while`` runs: as the compiler knows it, or as a counter's bound says; ``None`` if neither does."""
        known = re.search(r'known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        bounds = [int(i.inner) for i in condition if i.opcode == "constant" and re.fullmatch(r"\d+", i.inner)]
        return bounds[0] if len(bounds) == 1 and any("direction=LT" in i.attributes for i in condition) else None


def parse(text: str) -> Program:
    """Reads a program.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        opening = _COMPUTATION.match(line)
        if opening:
            name, lines = opening[2], []
            entry = name if opening[1] else entry
        elif line.startswith("}") and name is not None:
            computations[name] = tuple(lines)
            name = None
        elif name is not None:
            lines += _instruction(line)
    if entry is None:
        raise ValueError("the compiler's text has no entry computation, so that nothing can be counted")
    return Program(computations, entry)


def _instruction(line: str) -> Iterator[Instruction]:
    head = _HEAD.match(line)
    if head is None:
        return
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    results = tuple(Array(dtype, _shape(shape), layout) for dtype, shape, layout in _LEAF.findall(rest[:end]))
    yield Instruction(
        head[1], opcode, results, tuple(_NAME.findall(inner)), rest[closing + 1 :], inner, line.lstrip().startswith("ROOT")
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at ``opening`` is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return opening + match.start()
    raise ValueError(f"unbalanced parentheses in the compiler's text: {text[:100]}")
