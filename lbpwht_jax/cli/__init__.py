"""The command line, ``lbpwht``."""

import logging
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from lbpwht_jax.cli.bench import Bench
from lbpwht_jax.cli.compile import Compile
from lbpwht_jax.cli.cost import Cost
from lbpwht_jax.cli.finetune import Finetune
from lbpwht_jax.cli.prepare import Prepare
from lbpwht_jax.cli.run import Evaluate, Predict
from lbpwht_jax.cli.weights import Convert, Export, Models
from lbpwht_jax.runs.training import Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: those of the command line, ``sys.argv[1:]`` by default.

    Returns:
      0; 1 after reporting that what was asked for failed on the way; 2 after reporting a mistake in the arguments; 3 after a
      signal stopped training and its state was saved.
    """
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "finetune": Finetune,
            "evaluate": Evaluate,
            "predict": Predict,
            "export": Export,
            "prepare": Prepare,
            "models": Models,
            "convert": Convert,
            "cost": Cost,
            "compile": Compile,
            "bench": Bench,
        },
        prog="lbpwht",
        description="Fine-tune vision transformers with low-rank backpropagation through the Walsh-Hadamard transform.",
        args=arguments,
    )
    # where a checkpoint cannot be read or written, the error is reported once; the other files' errors are not worth a trace
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        run = command.prepare()
    except (TypeError, ValueError, FileNotFoundError, ImportError) as error:
        _report(error)
        return 2
    try:
        if run is not None:
            run()
    except Stopped as error:
        _report(error)
        return 3
    except (FloatingPointError, OSError, ValueError) as error:
        _report(error)
        return 1
    return 0


def _report(error: Exception) -> None:
    Console(stderr=True).print(f"lbpwht: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
