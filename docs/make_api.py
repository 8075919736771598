"""Writes docs/api.md from the docstrings: the public names, room by room.

    python docs/make_api.py          writes the page
    python docs/make_api.py --check  fails if the page is not what the docstrings say

A room is a folder of the package; its public names are those that its ``__init__`` exports. The page is committed so that it
reads on any site that shows Markdown. Nothing is imported: griffe reads the source.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "lbpwht_jax"
ROOMS = ("ops", "layers", "models", "adaptation", "weights", "cost", "data", "train", "runs", "compile", "plan")
HEAD = """# API reference

Generated from the docstrings by `python docs/make_api.py`. Shapes are in square brackets; names in them are sizes.
"""


def _text(value: str) -> str:
    """reStructuredText's double backquotes as Markdown's single ones."""
    return value.replace("``", "`").strip()


def _items(title: str, items: Sequence[tuple[str, str]]) -> str:
    lines = [f"- `{name}`: {_indented(description)}" for name, description in items]
    return f"*{title}*\n\n" + "\n".join(lines)


def _indented(text: str) -> str:
    return _text(text).replace("\n", "\n  ")


def _sections(item: griffe.Object) -> list[str]:
    """The parts of a docstring as Markdown."""
    if item.docstring is None:
        return []
    options = {"returns_named_value": False, "returns_multiple_items": False, "warnings": False}
    parts = []
    for section in item.docstring.parse("google", **options):
        value = section.value
        match section.kind.value:
            case "text":
                parts.append(_text(value))
            case "parameters" | "attributes":
                parts.append(_items(section.kind.value.capitalize(), [(entry.name, entry.description) for entry in value]))
            case "raises":
                parts.append(_items("Raises", [(str(entry.annotation).strip("()"), entry.description) for entry in value]))
            case "returns" | "yields":
                text = " ".join(_text(entry.description) for entry in value)
                parts.append(f"*{section.kind.value.capitalize()}*\n\n{text}")
            case kind:
                raise ValueError(f"{item.path}: a docstring section of a kind that the page does not know: {kind}")
    return parts


def _signature(function: griffe.Function, name: str) -> str:
    parameters, starred = [], False
    for parameter in function.parameters:
        if parameter.name == "self":
            continue
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not starred:
            parameters.append("*")
        starred = starred or kind in (griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_positional)
        stars = "*" * (kind is griffe.ParameterKind.var_positional) + "**" * (kind is griffe.ParameterKind.var_keyword)
        default = "" if parameter.default is None or stars else f"={parameter.default}"
        parameters.append(f"{stars}{parameter.name}{default}")
    return f"{name}({', '.join(parameters)})"


def _entry(item: griffe.Object, depth: int) -> list[str]:
    """An item with its public methods."""
    heading = f"{'#' * depth} `{item.name}`"
    if isinstance(item, griffe.Function):
        return [heading, f"```python\n{_signature(item, item.name)}\n```", *_sections(item)]
    if isinstance(item, griffe.Attribute):
        return [heading, f"```python\n{item.name} = {item.value}\n```", *_sections(item)]
    parts = [heading, *_sections(item)]
    if isinstance(item, griffe.Class):
        if isinstance(init := item.members.get("__init__"), griffe.Function):
            parts.insert(1, f"```python\n{_signature(init, item.name)}\n```")
        for name, member in _own(item):
            if (name.startswith("_") and name != "__call__") or not member.docstring:
                continue
            if isinstance(member, griffe.Function):
                parts += [f"**`{item.name}.{_signature(member, name)}`**", *_sections(member)]
            elif isinstance(member, griffe.Attribute) and "property" in member.labels:
                parts += [f"**`{item.name}.{name}`**", *_sections(member)]
    return parts


def _own(item: griffe.Class) -> list[tuple[str, griffe.Object]]:
    """The members that the class defines itself."""
    return [(name, member) for name, member in item.members.items() if not isinstance(member, griffe.Alias)]


def _resolve(item: griffe.Object | griffe.Alias) -> griffe.Object:
    return item.final_target if isinstance(item, griffe.Alias) else item


def _exports(module: griffe.Object) -> list[str]:
    return [str(name) for name in module.exports or ()]


def render() -> str:
    """The page."""
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    package = _resolve(griffe.load(PACKAGE, search_paths=[ROOT], resolve_aliases=True))
    rooms = [_resolve(package[name]) for name in ROOMS if name in package.members]
    names = ", ".join(f"`{name}`" for name in _exports(package))
    parts = [
        HEAD.strip(),
        f"## `{PACKAGE}`",
        *_sections(package),
        f"It exports {names}. The rooms below describe them.",
    ]
    shown: set[str] = set()
    for room in rooms:
        members = {name: _resolve(room[name]) for name in _exports(room)}
        new = {name: member for name, member in members.items() if member.path not in shown}
        if new:
            parts += [f"## `{room.path}`", *_sections(room)]
        for member in new.values():
            parts += _entry(member, 3)
        shown.update(member.path for member in new.values())
    missing = [
        name for name in _exports(package) if name != "__version__" and not any(name in _exports(room) for room in rooms)
    ]
    if missing:
        raise ValueError(f"{PACKAGE} exports names that no room exports: {', '.join(missing)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if render() != PAGE.read_text():
            sys.exit("docs/api.md is not what the docstrings say; run: python docs/make_api.py")
    else:
        PAGE.write_text(render())
