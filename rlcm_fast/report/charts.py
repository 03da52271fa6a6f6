"""Which curves a report shows, for one run and for groups of runs that differ only in their seed.

    rewards      in training, and on held-out prompts with two standard errors around the mean
    win rate     of a person's comparisons, with two standard errors around 0.5, which is no difference
    held out     what nobody optimised, with two standard errors, and diversity
    guards       each measure with the band that the guard allows
    policy       KL, ratio, clip; what each reward or task adds to the advantages and the gradient
    speed, cost

One run has iterations below its curves; several have queries, because they may draw other numbers of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from rlcm_fast.report.changes import SURE
from rlcm_fast.report.drawing import Point, Series
from rlcm_fast.report.measures import (
    WIN_RATE,
    Measure,
    diversities,
    guards,
    measures,
    name_of_diversity,
    win_rates,
    without_idle_totals,
)
from rlcm_fast.report.reading import RunData
from rlcm_fast.report.rewards import rewards_of, standard_error

_SMOOTHED_FROM = 24  # points of a training curve
_POLICY = {
    "kl_to_start": "KL to the start model",
    "approx_kl": "KL to the rollout's policy",
    "ratio/max_deviation": "Largest abs(ratio - 1)",
    "clip_fraction": "Clipped share of transitions",
    "guard/kl_weight": "KL weight of the guard",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
}
_SHARES = {  # of advantage/NAME/KIND and gradient/NAME/KIND; without NAME, of all rewards
    "abs_mean": "Mean size of the advantages",
    "correlation": "Correlation with the advantages",
    "met": "Share of images that meet the threshold",
    "zero_variance_groups": "Share of groups without any difference",
    "norm": "Norm of the gradient of each part",
    "cosine": "Cosine of two gradients",
}
_OUTSIDE, _OUTSIDE_TITLE = "guard/outside", "Measures outside of their bands"
_WIN_RATE_TITLE = "Win rate against the start model"
_SPEED = {
    "images_per_second": "Images per second",
    "seconds/iteration": "Seconds per iteration",
    "memory/peak_gib": "Most GiB allocated",
    "hours": "Hours of all processes",
    "queries": "Queries: images scored in training",  # of several runs, queries are the axis
}


@dataclass(frozen=True)
class Chart:
    """A picture of one measure."""

    title: str
    series: Sequence[Series]
    note: str = ""
    x: str = "iteration"


@dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    title: str
    charts: Sequence[Chart]
    zeros: Sequence[str] = ()  # the titles of measures that are always 0, which need no chart


Group = Sequence[RunData]  # runs of the same config, with other seeds


def sections_of_run(run: RunData) -> list[Section]:
    """Returns the charts of one run; sections without numbers are left out."""
    found = measures(run)
    trained = [_reward_chart(run, measure) for measure in without_idle_totals(found) if measure.is_trained]
    guarded = [*(_guard_chart(run, name) for name in guards(run)), *_plain_charts(run, {_OUTSIDE: _OUTSIDE_TITLE})]
    watched = [_held_out_chart(run, measure) for measure in found if not measure.is_trained]
    sections = [
        Section("Rated by a person", [_win_rate_chart(run)]),
        Section("Trained rewards", trained),
        Section("Held out: what nobody optimised", [*watched, *_diversity_charts(run)]),
        Section("Guards", guarded),
        Section("Policy", [*_plain_charts(run, _POLICY), *_share_charts(run)]),
        Section("Speed and cost", _plain_charts(run, _speed_titles([run]))),
    ]
    return _with_numbers(sections)


def sections_of_groups(groups: Sequence[tuple[str, Group]]) -> list[Section]:
    """Returns charts with a line for each group: the mean over its seeds, with one standard error around it."""
    # Name the held-out curve of each reward, or its training curve if it is not evaluated.
    runs = [run for _, group in groups for run in group]
    found = dict.fromkeys(measure for run in runs for measure in measures(run))
    keys = {measure.key: measure for measure in found}
    rewards = {WIN_RATE: _WIN_RATE_TITLE}
    for measure in without_idle_totals(list(keys.values())):
        is_evaluated = any(m.is_evaluated for m in found if m.key == measure.key)
        prefix, where = (measure.held_out, "held-out") if is_evaluated else (measure.training, "training")
        rewards[f"{prefix}/mean"] = f"{measure.key}, {where} prompts"

    # Add what has a fixed title, as far as any run has it.
    rewards |= {key: name_of_diversity(key) for run in runs for key in diversities(run)}
    guarded = {f"guard/{name}": name for run in runs for name in guards(run)} | {_OUTSIDE: _OUTSIDE_TITLE}
    shares = {key: f"{_SHARES[kind]}: {part}" for run in runs for key, kind, part in _shares(run)}
    titles = {
        "Rewards and held-out measures": rewards,
        "Guards": guarded,
        "Policy": _POLICY | shares,
        "Speed and cost": _speed_titles(runs),
    }
    sections = []
    for section, of_section in titles.items():
        sections.append(Section(section, [_group_chart(groups, key, title) for key, title in of_section.items()]))
    return _with_numbers(sections)


def points_of(run: RunData, key: str) -> list[Point]:
    """Returns a metric against iterations; `hours` are those of all processes, evaluations left out.

    A win rate stands where its images were drawn, however late a person compared them.
    """
    if key == WIN_RATE:
        return [Point(found.iteration, found.rate) for found in win_rates(run)]
    if key != "hours":
        return [Point(x, y) for x, y in run.column(key)]
    total, points = 0.0, []
    for x, seconds in run.column("seconds/iteration"):
        total += seconds * run.num_processes / 3600
        points.append(Point(x, total))
    return points


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Returns the mean of each point and its neighbours, a twentieth of the curve on either side."""
    reach = max(1, len(points) // 20)
    values = [point.y for point in points]
    return [
        Point(point.x, fmean(values[max(0, index - reach) : index + reach + 1])) for index, point in enumerate(points)
    ]


def _speed_titles(runs: Sequence[RunData]) -> dict[str, str]:
    is_gpu = any("memory/peak_gib" in run.keys for run in runs)
    titles = {**_SPEED, "hours": "GPU-hours, evaluations left out"} if is_gpu else _SPEED
    return {key: title for key, title in titles.items() if len(runs) == 1 or key != "queries"}


def _reward_chart(run: RunData, measure: Measure) -> Chart:
    points = points_of(run, f"{measure.training}/mean")
    lines = [Series("training prompts", points, 0)]
    if len(points) >= _SMOOTHED_FROM:
        lines = [
            Series("training prompts, each iteration", points, 0, is_faint=True),
            Series("training prompts, averaged", smoothed(points), 0),
        ]
    if measure.is_evaluated:
        lines.append(_evaluated(run, measure.held_out, 1))
    return Chart(measure.key, lines, _weight_note(run, measure))


def _win_rate_chart(run: RunData) -> Chart:
    """Draws the win rate over the band that comparing the start model with itself would stay in."""
    points = []
    for found in win_rates(run):
        reach = SURE * found.standard_error
        points.append(Point(found.iteration, found.rate, max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)))
    note = "shaded: two standard errors around 0.5, which is no difference"
    return Chart(_WIN_RATE_TITLE, [Series("this run", points, 1, has_marks=True)], note)


def _held_out_chart(run: RunData, measure: Measure) -> Chart:
    return Chart(measure.key, [_evaluated(run, measure.held_out, 1)])


def _diversity_charts(run: RunData) -> list[Chart]:
    charts = []
    for key, name in diversities(run).items():
        line = Series("held-out prompts", points_of(run, key), 1, has_marks=True)
        charts.append(Chart(name, [line], "distance between two images; 0 if all are the same"))
    return charts


def _guard_chart(run: RunData, name: str) -> Chart:
    """Draws a measure and its band; a band with one end is shaded to the edge of the chart."""
    key = f"guard/{name}"
    low, high = dict(run.column(f"{key}/low")), dict(run.column(f"{key}/high"))
    points = points_of(run, key)
    values = [*(point.y for point in points), *low.values(), *high.values()]
    lowest, highest = min(values), max(values)
    banded = [replace(p, low=low.get(p.x, lowest), high=high.get(p.x, highest)) for p in points]
    return Chart(name, [Series("this run", banded, 2, has_marks=True)], "shaded: the band that the guard allows")


def _evaluated(run: RunData, key: str, colour: int) -> Series:
    at = {line["iteration"]: line for line in run.lines}
    points = []
    for point in points_of(run, f"{key}/mean"):
        error = standard_error(run.config, at[point.x], key)
        reach = None if error is None else SURE * error
        points.append(point if reach is None else replace(point, low=point.y - reach, high=point.y + reach))
    return Series("held-out prompts", points, colour, has_marks=True)


def _weight_note(run: RunData, measure: Measure) -> str:
    reward = rewards_of(run.config).get(measure.key)
    if reward is not None:
        return f"weight {reward.get('weight', 1.0)}"
    return "the weighted sum, which is optimised" if measure.key.rpartition("/")[2] == "total" else ""


def _plain_charts(run: RunData, titles: dict[str, str]) -> list[Chart]:
    return [Chart(title, [Series("this run", points_of(run, key), 0)]) for key, title in titles.items()]


def _share_charts(run: RunData) -> list[Chart]:
    """Draws what the rewards or tasks add, those of one kind in one chart."""
    lines: dict[str, list[Series]] = {}
    for key, kind, part in _shares(run):
        of_kind = lines.setdefault(kind, [])
        of_kind.append(Series(part, points_of(run, key), len(of_kind)))
    return [Chart(_SHARES[kind], of_kind) for kind, of_kind in lines.items()]


def _shares(run: RunData) -> list[tuple[str, str, str]]:
    """Returns (key, kind, whose) of the metrics about parts of the advantages or of the gradient."""
    found = []
    for key in run.keys:
        room, *part = key.split("/")
        kind = part.pop() if part else ""
        if room in ("advantage", "gradient") and kind in _SHARES:
            found.append((key, kind, (" and " if kind == "cosine" else "/").join(part) or "all"))
    return found


def _group_chart(groups: Sequence[tuple[str, Group]], key: str, title: str) -> Chart:
    lines = []
    for number, (label, group) in enumerate(groups):
        points = averaged([_against_queries(run, key) for run in group])
        if points:
            lines.append(Series(label, points, number, has_marks=key.startswith(("eval/", "guard/", "rating/"))))
    return Chart(title, lines, x="queries")


def _against_queries(run: RunData, key: str) -> list[Point]:
    """Returns a metric against the images scored before its iteration, which its evaluation had learned from."""
    before, number = {}, 0.0
    for line in run.lines:
        before[line["iteration"]] = number
        number = line.get("queries", number)
    return [replace(point, x=before[point.x]) for point in points_of(run, key) if point.x in before]


def averaged(seeds: Iterable[Sequence[Point]]) -> list[Point]:
    """Returns the mean over seeds where all have a value, and one standard error around it if there are several."""
    columns = [{point.x: point.y for point in points} for points in seeds if points]
    if not columns:
        return []
    found = []
    for x in sorted(set.intersection(*(set(column) for column in columns))):
        values = [column[x] for column in columns]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        mean = fmean(values)
        found.append(Point(x, mean) if error is None else Point(x, mean, mean - error, mean + error))
    return found


def _with_numbers(sections: Sequence[Section]) -> list[Section]:
    """Drops lines without points, charts without lines and sections without charts; names charts of zeros alone."""
    found = []
    for section in sections:
        charts = [replace(chart, series=[line for line in chart.series if line.points]) for chart in section.charts]
        charts = [chart for chart in charts if chart.series]
        shown = [chart for chart in charts if not _is_zero(chart)]
        if charts:
            found.append(Section(section.title, shown, [chart.title for chart in charts if _is_zero(chart)]))
    return found


def _is_zero(chart: Chart) -> bool:
    points = [point for line in chart.series for point in line.points]
    return all(point.y == 0 and not point.low and not point.high for point in points)
