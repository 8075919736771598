"""The command ``lbpwht compile``."""

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated

import tyro

from lbpwht_jax.adaptation import LayerCounts, Train
from lbpwht_jax.bench.program import DType
from lbpwht_jax.cli.help import flag
from lbpwht_jax.compile.compiling import CompilerError, check, compile_model
from lbpwht_jax.compile.report import as_json, kernel_table, table
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.runs.config import When
from lbpwht_jax.screen import console, say, show
from lbpwht_jax.train import Shard


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compiles a model's training step for a machine that need not be there, and says what it takes of each chip.

    The step is the one that "lbpwht finetune" runs. Nothing runs: bytes, FLOPs and kernels are what the compiler plans, and
    times are the least that a chip's limits allow, no clock's. Needs the extra [compile], but for the target cpu.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Name of the model; "lbpwht models" lists them."""
    methods: tuple[str, ...] = ("full", "lp_l1-4")
    """Short names, as for "lbpwht finetune"; "+remat" at the end computes each block again in the backward pass, "+scan" runs
    equal blocks as a loop, and "+lean" or the like says what is kept for that method."""
    target: str = "cpu:1"
    """The machine: v5e:2x2, v6e:1x1, v5p:2x2x1, v4:2x2x1 (TPUs, on several hosts too, such as v5e:16x16), h100, h200, or cpu:1
    (this machine's compiler, so many devices)."""
    batch_size: int = 64
    """Images per step, over all chips."""
    dtype: DType = "float32"
    """Dtype of the computation; parameters and the optimiser's state are float32."""
    train: Annotated[Train | None, flag("{all,last_stage,head}", "head for lora-R and lora_all-R, else all")] = None
    """What is trained: all; last_stage, with the head; or head, with LoRA's branches."""
    num_classes: int = 1000
    """Outputs of the head."""
    when: When = "faster"
    """Which of a method's layers are low-rank: faster (those that it is predicted to speed up) or always (all of them)."""
    residuals: ResidualsName = "plain"
    """What is kept for the backward pass: plain (what JAX keeps of itself), exact (less, without rounding), lean (8 bits) or
    tiny (2 to 8 bits)."""
    shard: Shard = "data"
    """What the chips share: data (the batch; the state is on each) or params (parameters and optimiser state too)."""
    fit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also looks for the largest batch that fits a chip's memory, to within a 64th; compiles up to ten times."""
    kernels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also names the ten kernels of a GPU that take the most."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints a list of rows as JSON instead of a table."""

    def prepare(self) -> Callable[[], None]:
        """Checks the arguments; raises as ``compile_model`` does."""
        check(**self._arguments())
        return self._run

    def _arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "json"}

    def _run(self) -> None:
        failures: dict[str, CompilerError] = {}
        rows = compile_model(**self._arguments(), failed=failures.__setitem__)
        if self.json:
            print(json.dumps(as_json(rows, self.fit, self.kernels), indent=2))
        elif rows:
            shown = console()
            show(shown, table(rows, self.fit))
            trained = {request.method: request.train for request in check(**self._arguments())}
            say(shown, f"Trained, and layers that low rank can adapt (--when {self.when}):")
            for row in rows:
                counts = f"; {LayerCounts(**row.layers)}" if row.layers else ""
                say(shown, f"  {row.method}: {trained[row.method]}{counts}")
            for row in rows if self.kernels else ():
                show(shown, kernel_table(row))
        if failures:
            raise ValueError("\n".join(map(str, failures.values())))
