"""Rows of compiled steps as JSON and as tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lbpwht_jax.compile.request import Row


def as_json(rows: Sequence[Row], fit: bool, kernels: bool) -> list[dict[str, Any]]:
    """Rows as JSON values; ``fits``, ``largest_batch`` and ``dearest`` where they were asked for."""
    left_out = (set() if fit else {"fits", "largest_batch"}) | (set() if kernels else {"dearest"})
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in left_out} for row in rows]


def table(rows: Sequence[Row], fit: bool) -> Table:
    """Rows as a table."""
    first = rows[0]
    title = f"{first.model} on {first.target}, {first.batch_size} images a step; numbers of one chip, as the compiler counts"
    made = Table(title=title, title_justify="left")
    made.add_column("method")
    headings = ["arguments", "outputs", "aliased", "temporaries", "fits", "GFLOP", "moved GB", "kernels", "collectives"]
    headings += ["compute ms", "memory ms", "links ms", "roofline ms", "attention"]
    for heading in headings + ["largest batch"] * fit:
        made.add_column(heading, justify="right")
    for row in rows:
        sizes = [_number(n, 2**20, " MiB", 0) for n in (row.argument_bytes, row.output_bytes, row.alias_bytes, row.temp_bytes)]
        counts = [_number(row.flops, 1e9, "", 0), _number(row.moved_bytes, 1e9, "", 1), _number(row.kernels, 1, "", 0)]
        collectives = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in (row.collective_bytes or {}).items())
        seconds = (row.compute_seconds, row.memory_seconds, row.link_seconds, row.roofline_seconds)
        cells = [row.method, *sizes, _yes(row.fits), *counts, collectives, *(_number(s, 1e-3, "", 2) for s in seconds)]
        cells += [row.attention or ""] + [_number(row.largest_batch, 1, "", 0)] * fit
        made.add_row(*cells)
    return made


def kernel_table(row: Row) -> Table:
    """The dearest kernels of a row."""
    made = Table(title=f"{row.method}: the kernels that take the most, each as fast as the chip allows", title_justify="left")
    made.add_column("kernel")
    for heading in ("runs", "MB", "GFLOP", "us"):
        made.add_column(heading, justify="right")
    made.add_column("from", overflow="fold")
    for kernel in row.dearest or []:
        numbers = (f"{kernel['bytes'] / 1e6:,.1f}", f"{kernel['flops'] / 1e9:,.1f}", f"{kernel['seconds'] * 1e6:,.1f}")
        made.add_row(kernel["name"], str(kernel["runs"]), *numbers, kernel["source"])
    return made


def _number(value: float | None, unit: float, name: str, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}{name}"


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]
