"""What a command's help shows: its docstrings, folded to the width of the terminal."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
from typing import Annotated, Any, get_args

import tyro


def flag(metavar: str, default: str) -> Any:
    """What the help says of a flag whose type and default are not what a user thinks in.

    Args:
      metavar: what stands for the value.
      default: what holds if the flag is not given.
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def description(command: type, margin: int = 1) -> str:
    """A command's docstring with lines that fit the terminal, less a margin; the space before each keeps tyro from joining
    them."""
    width = shutil.get_terminal_size().columns - margin
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    fold = textwrap.TextWrapper(width, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False).fill
    return "\n\n".join(fold(" ".join(text.split())) for text in paragraphs)


def explain(command: type) -> None:
    """Gives the docstrings of a dataclass's fields to tyro, each as one line, which it folds; in dataclasses within, too."""
    if "_explained" in vars(command):
        return
    for name, text in _docstrings(command).items():
        command.__annotations__[name] = Annotated[command.__annotations__[name], tyro.conf.arg(help=text)]
    command._explained = True  # pyright: ignore[reportAttributeAccessIssue] - a mark on the class, not a field
    for annotation in command.__annotations__.values():
        for inner in _dataclasses(annotation):
            explain(inner)


def _docstrings(command: type) -> dict[str, str]:
    """The string after each annotated name in the source of a class."""
    body = getattr(ast.parse(textwrap.dedent(inspect.getsource(command))).body[0], "body", [])
    found = {}
    for field, after in itertools.pairwise(body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _dataclasses(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _dataclasses(part)]
