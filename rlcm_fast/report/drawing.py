"""Draws a chart as inline SVG with matplotlib: lines, bands around them, a shaded range; no words, only numbers.

Titles and legends are HTML beside the chart, so no text of a run comes into the SVG. Colours are CSS variables, so that
a chart follows the page into the dark: matplotlib draws with place holders, which are replaced. A chart takes 45 ms and
about 15 kB (one core of a Xeon, 2.5 GHz).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

NUM_COLOURS = 6
_MOST_POINTS = 400  # of a line, which is 400 pixels wide

# matplotlib draws in these; CSS gives the variables their values, page.css.
_COLOURS = [f"#10a0{number:02x}" for number in range(NUM_COLOURS)]
_INK, _LINES = "#10b000", "#10b001"
_VARIABLES = {_INK: "var(--muted)", _LINES: "var(--rule)"}
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(_COLOURS)}
_DIGITS = re.compile(r"(?<=\d\.\d\d)\d+")  # in attributes: a hundredth of a point is enough
_DASHES = ("-", "--", ":")  # beyond six lines

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _LINES,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "grid.color": _LINES,
    "grid.linewidth": 0.6,
    "xtick.color": _LINES,
    "ytick.color": _LINES,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Point:
    """A value, and the band around it if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    colour: int = 0  # modulo NUM_COLOURS; beyond, the line is dashed
    is_faint: bool = False  # single values behind their average
    has_marks: bool = False

    @property
    def variable(self) -> str:
        """The CSS variable of its colour."""
        return f"--series-{self.colour % NUM_COLOURS}"

    @property
    def dashes(self) -> str:
        return _DASHES[self.colour // NUM_COLOURS % len(_DASHES)]


def draw(series: Sequence[Series], label: str) -> Markup:
    """Returns a chart as an <svg> element that screen readers call `label`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": label}
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.4), layout="constrained")
        axes = figure.subplots()
        for line in series:
            _draw_line(axes, line)
        axes.margins(x=0.02)
        axes.locator_params(axis="x", nbins=6, integer=True)  # iterations or images
        axes.locator_params(axis="y", nbins=5)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _embedded(file.getvalue(), label)


def _draw_line(axes: Any, line: Series) -> None:
    points = thinned(line.points)
    colour, x = _COLOURS[line.colour % NUM_COLOURS], [point.x for point in points]
    banded = [point for point in points if point.low is not None and point.high is not None]
    if banded:
        edges = [point.low for point in banded], [point.high for point in banded]
        axes.fill_between([point.x for point in banded], *edges, color=colour, alpha=0.18, linewidth=0)
    if len(banded) == 1:  # an area without a width would not be seen
        axes.vlines(banded[0].x, banded[0].low, banded[0].high, color=colour, alpha=0.35, linewidth=6)
    is_marked = line.has_marks or len(points) == 1
    axes.plot(
        x,
        [point.y for point in points],
        line.dashes,
        color=colour,
        alpha=0.35 if line.is_faint else 1.0,
        linewidth=1.0 if line.is_faint else 1.8,
        marker="o" if is_marked and len(points) <= 40 else "",
        markersize=4,
    )


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Returns at most `most` of the points, spread evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]


def _embedded(svg: str, label: str) -> Markup:
    """Makes a file of matplotlib an element of a page: no prolog, no names that two charts share, our colours."""
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.S)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.S)  # it would hold for the whole page
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"font: (\S+) [^;\"]*", r"font: \1 var(--font)", body)
    body = re.sub(r'"[^"]*"', lambda quoted: _DIGITS.sub("", quoted[0]), body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    inner = body[body.index(">") + 1 :]
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="{view_box[1]}">{inner}')
