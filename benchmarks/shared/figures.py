"""What the pictures of several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.training_runs import Row, mean_and_spread


def save_figure(figure: Any, path: Path) -> None:
    """Writes a picture of pyplot and lets go of it."""
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curve(axis: Any, curves: Sequence[Sequence[Row]], metric: str, x: str, label: str | None = None) -> None:
    """Draws the mean over seeds as a line, and one standard deviation to either side as a band."""
    xs, means, spreads = mean_and_spread(curves, metric, x)
    lower = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    upper = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    (line,) = axis.plot(xs, means, marker=".", label=label)
    axis.fill_between(xs, lower, upper, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.grid(alpha=0.3)
