"""Renders a report as one HTML file that loads nothing: styles, script, charts and images are inside.

Prompts, run names and settings are text that others wrote: Jinja escapes all of it, and the page's own policy allows
no script but ours, by its hash, no connection, and images only from the page itself.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlcm_fast.report.charts import Chart, Section, sections_of_groups, sections_of_run
from rlcm_fast.report.drawing import Point, draw, thinned
from rlcm_fast.report.groups import group, results
from rlcm_fast.report.pictures import alarms, disputes, extremes, frames, pairs
from rlcm_fast.report.reading import RunData
from rlcm_fast.report.settings import differing, environment, settings
from rlcm_fast.report.verdict import verdict

_TABLE_ROWS = 60


@dataclass(frozen=True)
class DrawnChart:
    """A chart and the numbers behind it."""

    chart: Chart
    svg: Markup
    table_columns: Sequence[str]
    table_rows: Sequence[tuple[float, Sequence[str]]]


def render(runs: Sequence[RunData]) -> str:
    """Returns the page of one run, or of several with a comparison before them."""
    css, script = _part("page.css"), _part("page.js")
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return (
        template.from_string(_part("page.html"))
        .render(
            title=title,
            policy=_policy(css, script),
            css=Markup(css),
            script=Markup(script),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            comparison=_comparison(runs) if len(runs) > 1 else None,
            runs=[_run(run, number) for number, run in enumerate(runs)],
            sources=", ".join(str(run.folder) for run in runs),
        )
        .lstrip()
    )


def _run(run: RunData, number: int) -> dict[str, Any]:
    last = run.evaluations[-1] if run.evaluations else None
    return {
        "number": number,
        "name": run.name,
        "verdict": verdict(run),
        "problems": run.problems,
        "sections": _drawn(sections_of_run(run)),
        "frames": frames(run),
        "alarms": alarms(run),
        "pairs": pairs(run),
        "first": run.evaluations[0].iteration if last else None,
        "last": last.iteration if last else None,
        "last_images": bool(last),
        "extremes": extremes(last) if last else [],
        "disputes": disputes(last) if last else [],
        "settings": settings(run),
        "environment": environment(run),
    }


def _comparison(runs: Sequence[RunData]) -> dict[str, Any]:
    groups = group(runs)
    curves = sections_of_groups([(of_group.label, of_group.runs) for of_group in groups])
    return {
        "groups": groups,
        "results": results(groups),
        "sections": _drawn(curves),
        "differing": differing(runs),
    }


def _drawn(sections: Sequence[Section]) -> list[tuple[str, list[DrawnChart], Sequence[str]]]:
    return [(section.title, [_drawn_chart(chart) for chart in section.charts], section.zeros) for section in sections]


def _drawn_chart(chart: Chart) -> DrawnChart:
    # Say what a reader who cannot see the chart needs: which lines, from where to where.
    ends = [f"{line.label} from {line.points[0].y:.4g} to {line.points[-1].y:.4g}" for line in chart.series]
    label = f"{chart.title} by {chart.x}: {'; '.join(ends)}"

    # Put the numbers of all lines into one table.
    columns = {line.label: {point.x: point for point in thinned(line.points, _TABLE_ROWS)} for line in chart.series}
    places = sorted({x for column in columns.values() for x in column})
    rows = [(x, [_cell(column.get(x)) for column in columns.values()]) for x in places]
    return DrawnChart(chart, draw(chart.series, label), list(columns), rows)


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    band = "" if point.low is None or point.high is None else f" ({point.low:.4g} to {point.high:.4g})"
    return f"{point.y:.5g}{band}"


def _policy(css: str, script: str) -> str:
    """Returns the page's Content-Security-Policy; the styles in attributes are the charts' own."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"script-src {_hash(script)}",
            f"style-src-elem {_hash(css)}",
            "style-src-attr 'unsafe-inline'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    return files("rlcm_fast.report").joinpath(name).read_text(encoding="utf-8")
