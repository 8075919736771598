"""``compile_model``: a model's training step compiled for a machine that need not be there, method by method."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lbpwht_jax.adaptation.presets import Train, default_train, parse_method
from lbpwht_jax.bench.program import DType, split_method
from lbpwht_jax.compile.fit import largest_batch
from lbpwht_jax.compile.request import Request, Row
from lbpwht_jax.compile.targets import parse_target
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import ResidualsName, named_residuals
from lbpwht_jax.train import Shard

_LAST_LINES = 5
_NOISE = re.compile(r"^\s*$|WARNING|^=== |^E0000|libtpu_init_utils|Failed to find host bounds|UserWarning")
# A compiler needs no devices, need not ask a cloud which it has, and may run beside others.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class CompilerError(RuntimeError):
    """A compiler refused a step or crashed; the text holds its last lines."""


def compile_request(request: Request) -> Row:
    """Compiles one step in a process of its own.

    Raises:
      CompilerError: if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-m", "lbpwht_jax.compile.child", json.dumps(dataclasses.asdict(request)), str(result)]
        done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True, errors="replace")
        if done.returncode == 0 and result.exists():
            return Row(**json.loads(result.read_text()))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not _NOISE.search(line)]
    ending = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    last = "\n".join(line[:400] for line in lines[-_LAST_LINES:])
    raise CompilerError(f"{request.method}: the compiler ended with {ending}; its last lines:\n{last}")


def compile_model(
    model: str,
    methods: Sequence[str] = ("full",),
    target: str = "cpu:1",
    batch_size: int = 64,
    dtype: DType = "float32",
    train: Train | None = "all",
    num_classes: int = 1000,
    when: Literal["always", "faster"] = "faster",
    shard: Shard = "data",
    *,
    fit: bool = False,
    kernels: bool = False,
    residuals: ResidualsName = "plain",
    failed: Callable[[str, CompilerError], None] | None = None,
) -> list[Row]:
    """Compiles the training step that ``lbpwht finetune`` runs and says what it takes of each chip. Nothing is run.

    Args:
      model: its name.
      methods: as for ``lbpwht finetune``; options at the end as for ``split_method``, such as
        ``"full+remat"`` or ``"lp_l1-4+lean"``.
      target: the machine, such as "h100", "v5e:2x2" or "cpu:1".
      batch_size: images of all chips.
      dtype: of the computation; parameters and the optimiser's state are float32.
      train: what is trained; ``None`` for each method's default, as ``lbpwht_jax.adaptation.default_train`` has it.
      num_classes: outputs of the head.
      when: whether layers that low rank would make slower stay exact, as in ``LowRankSpec``.
      shard: whether the chips share the batch alone, or parameters and optimiser state too.
      fit: also looks for the largest batch that fits a chip's memory.
      kernels: also names the ten kernels of a GPU that take the most.
      residuals: what is kept for the backward pass where a method does not say, as in ``create_model``.
      failed: called with a method that does not compile, which is then left out; by default the error is raised.

    Returns:
      A row for each method.

    Raises:
      ValueError: if a name is unknown, a number is out of range, or the chips cannot share the batch equally.
      ImportError: if the target's compiler is not installed.
      CompilerError: if a step does not compile.
    """
    requests = check(model, methods, target, batch_size, dtype, train, num_classes, when, shard, fit, kernels, residuals)
    rows = []
    for request in requests:
        try:
            row = compile_request(request)
            rows.append(_with_largest_batch(request, row) if fit else row)
        except CompilerError as error:
            if failed is None:
                raise
            failed(request.method, error)
    return rows


def check(
    model: str,
    methods: Sequence[str],
    target: str,
    batch_size: int,
    dtype: DType,
    train: Train | None,
    num_classes: int,
    when: Any,
    shard: Shard,
    fit: bool,
    kernels: bool,
    residuals: ResidualsName = "plain",
) -> list[Request]:
    """What ``compile_model`` is to compile, checked as it says."""
    machine = parse_target(target)
    if not methods:
        raise ValueError("no method was given; name at least one, such as full or lp_l1-4")
    for name, value in (("batch_size", batch_size), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name.replace('_', '-')} must be positive, got {value}")
    if batch_size % machine.devices:
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared equally by the {machine.devices} chips of {target}; make the "
            f"batch size a multiple of {machine.devices}"
        )
    if fit and machine.limits is None:
        raise ValueError(f"target {target!r} has no memory of a known size for a batch to fit; leave out --fit")
    info = model_info(model)
    names = [split_method(method)[0] for method in methods]
    trained: list[Train] = [train or default_train(name) for name in names]
    for name, part in zip(names, trained, strict=True):
        parse_method(name, when=when).rules(info, part)
    named_residuals(residuals, "compile")
    machine.check_installed()
    return [
        Request(model, method, target, batch_size, dtype, part, num_classes, when, shard, kernels, residuals)
        for method, part in zip(methods, trained, strict=True)
    ]


def _with_largest_batch(request: Request, row: Row) -> Row:
    machine = parse_target(request.target)
    memory = machine.limits.memory if machine.limits else 0
    batch = largest_batch(row, machine.devices, memory, lambda n: compile_request(dataclasses.replace(request, batch_size=n)))
    return dataclasses.replace(row, largest_batch=batch)
