"""Where one of this library's training steps spends its time on a CPU; for step_profile.py."""

import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions

from lbpwht_jax.bench.model_steps import PreparedStep
from lbpwht_jax.compile.hlo import Instruction, Program, parse

Segment = tuple[float, float, str]

# The first that is found in an operation's place in the program is its kind; modules' names are those of the registry's models.
_KINDS = (
    (r"^(?!.*jvp\()", "optimiser"),
    (r"/(norm\d*|bn|downsample_0|stem_1)/", "norms"),
    (r"/(mid|stride_conv|v_local)/conv/|/q/local/|/conv_dw/", "depthwise convolutions"),
    (r"/patch_embed/proj/|/(downsample|stem)/(conv\d?/)+|/(downsample_1|stem_0)/", "convolutions"),
    (r"/(qkv|[qkv]|fc\d?|proj|reduction|talking_head\d|head|head_dist|conv)/.*dot_general", "dense layers"),
    (r"/(qkv|[qkv]|fc\d?|proj|reduction|talking_head\d|head|head_dist|conv)/", "activations, biases"),
    (r"AveragePool", "poolings"),
    (r"/(attn|token_mixer)/", "attention"),
)


def operations(step: PreparedStep, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each kind and operation with the shape of its result, in one step.

    Where several operations run at a time, each gets an equal share of it.
    """
    program = parse(step.text)
    kinds = {i.name: _kind(program, i) for computation in program.computations.values() for i in computation}
    samples: list[dict[tuple[str, str], float]] = []
    for _ in range(rounds):
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for name, seconds in _profiled(step).items():
            sums[kinds[name]] += seconds
        samples.append(sums)
    keys = {key for sums in samples for key in sums}
    return {key: statistics.median(sums.get(key, 0.0) for sums in samples) for key in keys}


def _profiled(step: PreparedStep) -> dict[str, float]:
    """Seconds of each instruction in one step."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(step.run())
        [trace] = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_serialized_xspace(trace.read_bytes())
    lines = [line for plane in data.planes if plane.name == "/host:CPU" for line in plane.lines]
    return shared(segment for line in lines for segment in innermost(_events(line)))


def _events(line: Any) -> list[Segment]:
    events = []
    for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name is not None:
            events.append((event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9, str(name)))
    return events


def innermost(events: Iterable[Segment]) -> Iterator[Segment]:
    """Of one thread's events, begin, end and name of what ran when, without the time of those within others."""
    open_events: list[Segment] = []
    at = 0.0
    for event in [*sorted(events, key=lambda event: (event[0], -event[1])), (float("inf"), float("inf"), "")]:
        while open_events and open_events[-1][1] <= event[0]:
            _, end, name = open_events.pop()
            if end > at:
                yield at, end, name
                at = end
        if open_events and event[0] > at:
            yield at, event[0], open_events[-1][2]
        at = event[0]
        open_events.append(event)


def shared(segments: Iterable[Segment]) -> dict[str, float]:
    """Seconds of each name; names that run at the same time share it."""
    changes = []
    for begin, end, name in segments:
        changes += [(begin, 1, name), (end, -1, name)]
    seconds: dict[str, float] = defaultdict(float)
    running: dict[str, int] = {}
    before = 0.0
    for at, change, name in sorted(changes):
        for other in running:
            seconds[other] += (at - before) / len(running)
        before = at
        running[name] = running.get(name, 0) + change
        if not running[name]:
            del running[name]
    return seconds


def _kind(program: Program, instruction: Instruction) -> tuple[str, str]:
    inside = program.computations.get(instruction.called("calls") or "", ())
    sources = [each.source for each in (instruction, *reversed(inside)) if each.source]
    source = sources[0] if sources else ""
    shape = "x".join(map(str, instruction.results[0].shape)) if instruction.results else ""
    direction = "backward" if "transpose(" in source else "forward"
    if source:
        kind = next((kind for pattern, kind in _KINDS if re.search(pattern, source)), "the rest")
    else:  # XLA forgets where the kernels' gradients come from
        kind = "convolutions" if "convolution" in {each.opcode for each in (instruction, *inside)} else "the rest"
    return kind, f"{source.rpartition('/')[2]} {shape} {direction}"
