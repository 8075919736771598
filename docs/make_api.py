"""Writes docs/api.md from the docstrings: the public names, then the modules behind the command line.

    python docs/make_api.py

The page is committed, so that it reads on any site that shows Markdown; a test makes sure that it is what the docstrings say.
Nothing is imported: griffe reads the source.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "lbpwht_jax"
MODULES = (
    "adaptation.linen",
    "adaptation.rules",
    "adaptation.presets",
    "models.info",
    "weights.pretrained",
    "weights.files",
    "weights.peft",
    "data",
    "train",
    "runs.config",
    "ops.projection",
    "cost.backward",
    "cost.report",
    "cost.paper",
    "compile",
)
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


def _own(item: griffe.Object) -> list[tuple[str, griffe.Object]]:
    """Members by name, but for imported ones; those a module exports, if it says which."""
    if item.exports:
        return [(str(name), _resolve(item[str(name)])) for name in item.exports]
    return [(name, member) for name, member in item.members.items() if not isinstance(member, griffe.Alias)]


def _resolve(item: griffe.Object | griffe.Alias) -> griffe.Object:
    return item.final_target if isinstance(item, griffe.Alias) else item


def render() -> str:
    """The page."""
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    package = _resolve(griffe.load(PACKAGE, search_paths=[ROOT], resolve_aliases=True))
    exported = [str(name) for name in package.exports or ()]
    parts = [HEAD.strip(), f"## `{PACKAGE}`", *_sections(package)]
    shown = set()
    for name in exported:
        item = _resolve(package[name])
        if isinstance(item, griffe.Module):  # ``adapt`` is also the name of the function's module
            item = _resolve(item[name])
        shown.add(item.path)
        parts += _entry(item, 3)
    for path in MODULES:
        module = _resolve(package[path])
        parts += [f"## `{module.path}`", *_sections(module)]
        for name, member in _own(module):
            public = not name.startswith("_") and isinstance(member, griffe.Class | griffe.Function)
            if public and member.path not in shown:
                parts += _entry(member, 3)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
