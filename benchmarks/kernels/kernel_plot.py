"""The picture of bench_kernels.py, drawn from its rows or its CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PROVIDERS = ("torch", "compile", "triton")


def copy_share(row: Row) -> float:
    """A copy's time over the operation's: of the graph times where they were measured."""
    return row.get("graph_copy_share") or row["copy_share"]


def read_rows(path: Path) -> list[Row]:
    """A CSV of this script; empty numbers are None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_typed(line) for line in csv.DictReader(file)]


def _typed(line: dict[str, str]) -> Row:
    row: Row = dict(line)
    for key, text in line.items():
        if key not in ("device", "operation", "provider", "size", "dtype"):
            row[key] = float(text) if text else None
    return row


def draw(rows: Sequence[Row], path: Path) -> None:
    """Share of a copy's bandwidth against N: a row of axes an operation, a column a size and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.shared.figures import save_figure

    # A grid of axes: an operation a row, a size and dtype a column.
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    kinds = sorted({(row["size"], row["dtype"]) for row in rows if row["size"]}) or [("", "")]
    size = (3.4 * len(kinds), 2.2 * len(operations) + 0.4)
    figure, axes = pyplot.subplots(len(operations), len(kinds), figsize=size, squeeze=False, sharex=True, sharey="row")
    for line, operation in zip(axes, operations, strict=True):
        of_line = [row for row in rows if row["operation"] == operation]
        has_latents = bool(of_line[0]["size"])
        for axis, kind in zip(line, kinds, strict=True):
            shown = [row for row in of_line if not has_latents or (row["size"], row["dtype"]) == kind]
            _draw_axis(axis, shown)
            axis.set_title(f"{operation}\n{' '.join(kind) if has_latents else 'N numbers'}", fontsize=8)
        line[0].set_ylim(bottom=0)
        line[0].set_ylabel("bandwidth / that of a\ncopy of as many bytes", fontsize=8)

    # The legend, and names of the axes on the margins only.
    for axis in axes[-1]:
        axis.set_xlabel("N")
    axes[0][0].legend(fontsize=7, title=rows[0]["device"], title_fontsize=7)
    save_figure(figure, path)


def _draw_axis(axis: Any, rows: Sequence[Row]) -> None:
    for provider in PROVIDERS:
        points = sorted((row["rows"], copy_share(row)) for row in rows if row["provider"] == provider)
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=provider)
    axis.axhline(0.85, color="grey", linestyle="--", linewidth=0.8, label="target")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
