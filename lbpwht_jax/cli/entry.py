"""Where the command line starts: it finds the command that was asked for and loads no other.

Without the packages of the extra ``train`` the command line only says how to get them, so this module imports none of them.
"""

import contextlib
import difflib
import importlib.util
import sys
from collections.abc import Sequence

from lbpwht_jax import __version__
from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.early import stopping_at_once

NEEDED = (
    "PIL",
    "array_record",
    "filelock",
    "grain",
    "matplotlib",
    "orbax",
    "pydantic",
    "rich",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tyro",
)
"""The packages of the extra ``train``, by the names they are imported by."""


_HELP = f"""usage: lbpwht COMMAND ...

Fine-tune vision transformers by low-rank backpropagation (LBP-WHT).

commands:
{chr(10).join(f"  {name:<10}{command.text}" for name, command in COMMANDS.items())}

lbpwht COMMAND --help shows a command's flags; lbpwht --version the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: what follows ``lbpwht``; ``sys.argv[1:]`` by default.

    Returns:
      The exit code. 0: done. 1: what was asked for failed on the way. 2: the arguments are mistaken, or packages are missing.
      3: a signal stopped training, and its state was saved, or there was none yet. All but 0 come after a message on the
      standard error stream.

    Raises:
      SystemExit: with code 0 after ``COMMAND --help``; with code 2 if the command's arguments cannot be parsed.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    with stopping_at_once() if name == "finetune" else contextlib.nullcontext():
        return _run(name, rest)


def _run(name: str, rest: Sequence[str]) -> int:
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return _mistake(
            "the command line needs more packages: pip install 'lbpwht_jax[train]', or in a clone pip install -e '.[train]'; "
            f"missing: {', '.join(missing)}"
        )
    if name == "--version":
        print(f"lbpwht {__version__}")
    elif name in ("--help", "-h"):
        print(_HELP)
    elif name == "":
        print(_HELP, file=sys.stderr)
        return 2
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        return _mistake(f"there is no command {name!r}; {hint}")
    else:
        from lbpwht_jax.cli.execute import execute  # noqa: PLC0415 - its packages may be missing

        return execute(name, COMMANDS[name], rest)
    return 0


def _mistake(text: str) -> int:
    print(f"lbpwht: {text}", file=sys.stderr)
    return 2
