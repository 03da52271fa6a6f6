"""What follows from the rows of bench_kernels.py: shares of a copy's bandwidth, and the numbers of the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.kernels.kernel_plot import Row, copy_share

_TARGET_ROWS, _TARGET_SIZE = 64, "4x128x128"  # where bandwidth is promised: from so many rows, of that size


def shares(row: Row, peak_gb_per_second: float) -> Row:
    """Columns that follow from the measured ones."""
    graph_ms = row.get("graph_ms_50")
    ms = graph_ms or row["ms_50"]
    return {
        "copy_share": row["copy_ms"] / row["ms_50"],
        "graph_copy_share": row["copy_graph_ms"] / graph_ms if graph_ms else None,
        "peak_share": row["bytes"] / 1e6 / ms / peak_gb_per_second,
    }


def summarise(rows: Sequence[Row]) -> Row:
    """The numbers that the targets are about; None where a row for it was not measured."""
    # Take ours row by row: against torch.compile, and where a target is set for it.
    compiled = {name_of(row): row for row in rows if row["provider"] == "compile"}
    ratios, launched_ratios, copy_shares, peak_shares = {}, {}, {}, {}  # by the name of the case
    slower, launches = [], []
    for row in rows:
        if row["provider"] != "triton":
            continue
        name = name_of(row)
        if name in compiled:
            other = compiled[name]
            ratios[name] = _ms(row) / _ms(other)
            launched_ratios[name] = row["ms_50"] / other["ms_50"]
            if _ms(row, 20) > _ms(other, 80):
                slower.append(name)
        if row["rows"] >= _TARGET_ROWS and row["size"] == _TARGET_SIZE:
            copy_shares[name] = copy_share(row)
            peak_shares[name] = row["peak_share"]
        if row["operation"] == "policy_loss forward+backward" and row.get("launches"):
            launches.append(row["launches"])

    # Name the worst of them.
    return {
        "measured": len(rows),
        "worst_ratio_to_compile": _extreme(max, ratios),
        "worst_launched_ratio_to_compile": _extreme(max, launched_ratios),
        "slower_than_compile": slower,
        "lowest_copy_share": _extreme(min, copy_shares),
        "lowest_peak_share": _extreme(min, peak_shares),
        "policy_loss_launches": max(launches, default=None),
    }


def _ms(row: Row, quantile: int = 50) -> float:
    return row.get(f"graph_ms_{quantile}") or row[f"ms_{quantile}"]


def name_of(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("operation", "rows", "size", "dtype") if row[key] != "")


def _extreme(choose: Any, values: dict[str, float]) -> Row | None:
    """The largest or smallest value (`choose` is max or min) and its case; None where there are none."""
    if not values:
        return None
    name = choose(values, key=lambda name: values[name])
    return {"value": values[name], "case": name}
