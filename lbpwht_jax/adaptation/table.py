"""Tables as plain text and as HTML."""

import html
from collections.abc import Mapping, Sequence


def text_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> str:
    """A table that is as wide as its longest cells; it is also valid Markdown.

    Args:
      columns: the titles, each with how its cells are aligned: ``"<"`` left or ``">"`` right.
      rows: one cell per column.
      total: the last row, below a line.

    Returns:
      The lines, joined by newlines.
    """
    titles = list(columns)
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, total, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, columns.values(), widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = line(["-" * width for width in widths])
    return "\n".join([line(titles), rule, *map(line, rows), rule, line(total)])


def html_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> str:
    """The same table as HTML; the arguments are those of ``text_table``."""
    sides = ["right" if side == ">" else "left" for side in columns.values()]

    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    head, foot = line(list(columns), "th"), line(total, "th")
    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
