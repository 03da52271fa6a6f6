"""How much a measure has changed, and how sure that is: in standard errors of the change.

    held out    the same prompts and noise at both evaluations: if the scores of single images are there, the mean
                difference of pairs over its standard error; else both standard errors, std / sqrt(values - 1)
    training    other prompts every time: the mean of the first iterations and of the last ones, and their scatter
    win rate    of pairs of images that a person compared, against 0.5: sqrt(0.25 / pairs), or less with ties

Two standard errors is where this room says "rose" or "fell"; one in twenty unchanged measures does that, too. Where
there is no standard error, as for diversity or a set reward of one group, a tenth of the start value is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from rlcm_fast.report.measures import win_rates
from rlcm_fast.report.reading import EvaluatedImages, RunData
from rlcm_fast.report.rewards import standard_error

SURE = 2.0  # standard errors
_LARGE = 0.1  # of the start value
_ROUNDING = 1e-6  # of the difference: a standard error below this is rounding
_SPAN = 10  # iterations at each end, a third of the run at most


@dataclass(frozen=True)
class Change:
    """A measure at the start and now."""

    start: float
    end: float
    standard_error: float | None  # of the difference; None if it is not known

    @property
    def difference(self) -> float:
        return self.end - self.start

    @property
    def sigmas(self) -> float | None:
        """The difference in standard errors; None if that is not known or would be infinite."""
        if self.standard_error is None:
            return None
        if self.standard_error <= _ROUNDING * abs(self.difference):
            return 0.0 if self.difference == 0 else None
        return self.difference / self.standard_error

    @property
    def word(self) -> str:
        """rose, fell or stayed."""
        sigmas = self.sigmas
        if self.standard_error is None:
            is_sure = abs(self.difference) > _LARGE * abs(self.start)
        else:
            is_sure = sigmas is None or abs(sigmas) >= SURE
        if not is_sure:
            return "stayed"
        return "rose" if self.difference > 0 else "fell"


def of_held_out(run: RunData, key: str) -> Change | None:
    """Returns the change of KEY, as eval/NAME, between the first and the last evaluation; None with fewer than two."""
    points = run.column(f"{key}/mean")
    if len(points) < 2:
        return None
    (first, start), (last, end) = points[0], points[-1]
    error = _paired_error(run.evaluations, key, int(first), int(last))
    if error is None:
        at = {line["iteration"]: line for line in run.lines}
        error = _unpaired_error(run, key, at[first], at[last])
    return Change(start, end, error)


def of_metric(run: RunData, key: str) -> Change | None:
    """Returns the change of a metric without a deviation between its first line and its last; None with fewer."""
    values = [value for _, value in run.column(key)]
    return Change(values[0], values[-1], None) if len(values) > 1 else None


def of_training(run: RunData, key: str) -> Change | None:
    """Returns the change of KEY, as reward/NAME, over the run's iterations; None with fewer than two."""
    return of_values([value for _, value in run.column(f"{key}/mean")])


def of_win_rate(run: RunData) -> Change | None:
    """Returns the last win rate as a change from 0.5, that of the start model against itself; None without answers."""
    rates = win_rates(run)
    if not rates:
        return None
    return Change(0.5, rates[-1].rate, rates[-1].standard_error)


def of_values(values: Sequence[float]) -> Change | None:
    """Returns the change between the first values and the last ones; None with fewer than two values."""
    if len(values) < 2:
        return None
    span = max(1, min(_SPAN, len(values) // 3))
    first, last = values[:span], values[-span:]
    error = math.sqrt((variance(first) + variance(last)) / span) if span > 1 else None
    return Change(fmean(first), fmean(last), error)


def _unpaired_error(run: RunData, key: str, *lines: Mapping[str, float]) -> float | None:
    """Returns the error of the difference of two means; an end whose values are all the same adds nothing to it."""
    errors = [standard_error(run.config, line, key) for line in lines]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if known else None


def _paired_error(evaluations: Sequence[EvaluatedImages], key: str, first: int, last: int) -> float | None:
    by_iteration = {images.iteration: images for images in evaluations}
    if first not in by_iteration or last not in by_iteration:
        return None
    before = {image.number: image.scores[key] for image in by_iteration[first].images if key in image.scores}
    differences = [
        image.scores[key] - before[image.number]
        for image in by_iteration[last].images
        if key in image.scores and image.number in before
    ]
    return math.sqrt(variance(differences) / len(differences)) if len(differences) > 1 else None
