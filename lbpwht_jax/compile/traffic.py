"""Bytes that one instruction of a compiled program reads and writes in the chip's memory.

Each distinct operand is read once and each result written once. Who takes a slice of an operand reads the slice; who updates a
slice in place writes the slice; scratch memory of cuBLAS and cuDNN is left out. So is what a TPU keeps on the chip: a copy to
there reads, one from there writes.
"""

from collections.abc import Mapping

from lbpwht_jax.compile.hlo import Array, Instruction, Program

SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATE = "dynamic-update-slice"
_SAME = {"bitcast", "reshape", "copy", "convert"}  # between an update and a fusion's result


def moved_bytes(instruction: Instruction, known: Mapping[str, Instruction], program: Program) -> int:
    """Bytes read and written.

    Args:
      instruction: one that runs.
      known: the instructions beside it by name.
      program: whose computations a fusion calls.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in SLICES:
        return _read_slice(instruction, known) + _last_array(instruction).memory_bytes
    if kind == _UPDATE:
        return known[instruction.operands[1]].memory_bytes + _updated(instruction, known)
    if instruction.opcode == "copy-start":
        return sum(array.memory_bytes for array in instruction.results[:2])  # where to and where from
    if kind != instruction.opcode:  # the results name the operands too
        return 2 * sum(known[name].memory_bytes for name in instruction.operands if name in known)
    body = program.computations[instruction.called("calls") or ""] if kind == "fusion" else ()
    parameters = {int(i.inner): i for i in body if i.opcode == "parameter"}
    read: dict[tuple[str, int], int] = {}
    for n, name in enumerate(instruction.operands):
        size = known[name].memory_bytes if name in known else 0
        if n in parameters:
            size = _read(parameters[n], body, size)
        key = _buffer(name, known)
        read[key] = max(read.get(key, 0), size)
    return sum(read.values()) + _written(instruction, body)


def _last_array(instruction: Instruction) -> Array:
    """The slice among ``(operand, slice, flag)``, or the only result."""
    arrays = [array for array in instruction.results if array.shape]
    return arrays[-1] if arrays else instruction.results[0]


def _read_slice(instruction: Instruction, known: Mapping[str, Instruction]) -> int:
    """Bytes a slice reads: as many as it has, of an operand in memory."""
    whole = known[instruction.operands[0]].results[0] if instruction.operands[0] in known else None
    return 0 if whole is not None and whole.on_chip else _last_array(instruction).bytes


def _updated(instruction: Instruction, known: Mapping[str, Instruction]) -> int:
    """Bytes that an update in place writes: as many as the slice has, of an array in memory."""
    return 0 if instruction.results[0].on_chip else known[instruction.operands[1]].result_bytes


def _read(parameter: Instruction, body: tuple[Instruction, ...], size: int) -> int:
    """Bytes a fusion reads of an operand: its slices where it takes no more, nothing of what it updates in place."""
    total = 0
    for user in (i for i in body if parameter.name in i.operands):
        if user.opcode == "bitcast":
            total += _read(user, body, size)
        elif user.opcode in SLICES and user.operands[0] == parameter.name:
            total += user.result_bytes
        elif user.opcode != _UPDATE or user.operands[0] != parameter.name:
            return size
    return min(total, size)


def _written(instruction: Instruction, body: tuple[Instruction, ...]) -> int:
    inner = {i.name: i for i in body}
    root = next((i for i in body if i.root), None)
    arrays = [array for array in instruction.results if not _is_workspace(instruction, array)]
    if root is None or not any(i.opcode == _UPDATE for i in body):
        return sum(array.memory_bytes for array in arrays)
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    return sum(_written_by(name, inner, array) for name, array in zip(parts, arrays, strict=True))


def _written_by(name: str, inner: Mapping[str, Instruction], array: Array) -> int:
    """Bytes that a part of a fusion's result writes: those of the slice where it is an update in place."""
    while inner[name].opcode in _SAME:
        name = inner[name].operands[0]
    updates = inner[name].opcode == _UPDATE and not array.on_chip
    return inner[inner[name].operands[1]].result_bytes if updates else array.memory_bytes


def _is_workspace(instruction: Instruction, array: Array) -> bool:
    """Whether a result of a call of cuBLAS or cuDNN is scratch memory: bytes in a row."""
    return instruction.target.startswith("__cu") and array.dtype in ("s8", "u8") and len(array.shape) == 1


def _buffer(name: str, known: Mapping[str, Instruction]) -> tuple[str, int]:
    """What an operand is, whichever way it is looked at: an instruction's name, and which of its results."""
    while name in known and known[name].opcode == "bitcast":
        name = known[name].operands[0]
    if name in known and known[name].opcode == "get-tuple-element":
        return known[name].operands[0], int(known[name].attributes.partition("index=")[2].partition(",")[0])
    return name, -1
