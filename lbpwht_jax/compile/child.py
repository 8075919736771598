"""One step compiled: the process that a crash of a compiler may take. ``python -m lbpwht_jax.compile.child REQUEST RESULT``."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from lbpwht_jax.adaptation import layer_counts
from lbpwht_jax.bench.program import measured_model, step_program
from lbpwht_jax.compile.chips import Chip
from lbpwht_jax.compile.count import Counts
from lbpwht_jax.compile.hlo import Program
from lbpwht_jax.compile.lowered import compile_traced
from lbpwht_jax.compile.request import Request, Row
from lbpwht_jax.compile.targets import Target, parse_target
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.heuristic import choosing_for
from lbpwht_jax.train import Placement, bytes_on_a_device

_DEAREST = 10
_KERNEL = re.compile(r"attention[^/]*/pallas_call")
_FULL = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory")


def compile_request(request: Request) -> Row:
    """Compiles a step and counts what it takes; ``fits`` alone is told of a step that is too large for the compiler.

    Raises:
      ValueError: if the request is wrong, or the compiler knows no such machine.
      jax.errors.JaxRuntimeError: if it does not compile.
    """
    target = parse_target(request.target)
    placement = Placement(request.shard, target.open())
    with choosing_for(target.platform):
        fields = request.train, request.num_classes, request.dtype, request.when, request.residuals
        model = measured_model(request.model, request.method, *fields)
        program = step_program(request.model, model, request.batch_size, request.num_classes, placement)
        arguments = program.abstract_state(), program.abstract_batch()
        with target.described():
            traced = program.step.trace(*arguments)
    layers = layer_counts(model_info(request.model), model)._asdict()
    row = Row(request.model, request.method, request.target, request.batch_size, layers=layers)
    try:
        compiled, compiled_program, counts = compile_traced(traced, target)
    except jax.errors.JaxRuntimeError as error:
        if not _FULL.search(str(error)):
            raise
        return dataclasses.replace(row, argument_bytes=bytes_on_a_device(arguments), fits=False)
    row = dataclasses.replace(_measured(row, compiled.memory_analysis(), target), attention=_attention(compiled_program))
    return _counted(row, counts, target, request.kernels)


def _measured(row: Row, memory: Any, target: Target) -> Row:
    row = dataclasses.replace(
        row,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )
    return row if target.limits is None else dataclasses.replace(row, fits=row.total_bytes <= target.limits.memory)


def _counted(row: Row, counts: Counts, target: Target, kernels: bool) -> Row:
    limits = target.limits
    gpu = target.platform == "cuda"
    row = dataclasses.replace(
        row,
        moved_bytes=counts.bytes,
        flops=counts.flops,
        kernels=counts.launches if gpu else None,
        collective_bytes=dict(counts.collectives),
    )
    if limits is None:
        return row
    return dataclasses.replace(
        row,
        compute_seconds=counts.flops / limits.flops,
        memory_seconds=counts.bytes / limits.bandwidth,
        link_seconds=counts.link_bytes(target.devices) / limits.links,
        roofline_seconds=_roofline(counts, limits) if gpu else None,
        dearest=_dearest(counts, limits.flops, limits.bandwidth) if gpu and kernels else None,
    )


def _roofline(counts: Counts, limits: Chip) -> float:
    """Seconds that the kernels take one after the other, each as fast as its products or its bytes allow."""
    return sum(kernel.seconds(limits.flops, limits.bandwidth) for kernel in counts.kernels)


def _dearest(counts: Counts, flops: float, bandwidth: float) -> list[dict[str, Any]]:
    kernels = sorted(counts.kernels, key=lambda kernel: -kernel.seconds(flops, bandwidth))[:_DEAREST]
    return [{**dataclasses.asdict(kernel), "seconds": kernel.seconds(flops, bandwidth)} for kernel in kernels]


def _attention(program: Program) -> str:
    """The form of the attention in a compiled program."""
    calls = [i for instructions in program.computations.values() for i in instructions if i.opcode == "custom-call"]
    if any("fmha" in call.target for call in calls):
        return "cudnn"
    return "kernel" if any(_KERNEL.search(call.source) for call in calls) else "plain"


def main(request: str, result: str) -> int:
    """Compiles the request, JSON, and writes the row, JSON, into a file; returns the exit code."""
    asked = Request(**json.loads(request))
    target = parse_target(asked.target)
    jax.config.update("jax_platforms", "cpu")
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.devices)
    try:
        row = compile_request(asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    Path(result).write_text(json.dumps(dataclasses.asdict(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
