"""Puts runs together that differ only in their seed, and names what makes the groups differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rlcm_fast.report.measures import WIN_RATE, diversities, measures, without_idle_totals
from rlcm_fast.report.reading import RunData
from rlcm_fast.report.settings import differing, text_of

# What a run is, and how it is looked at, rather than how it trains.
_ASIDE = ("seed", "run_dir", "resume", "dry_run", "profile", "debug", "trust_old_checkpoint")
_MOST_NAMED = 2


@dataclass(frozen=True)
class RunGroup:
    """Runs of one config, with several seeds."""

    label: str
    runs: Sequence[RunData]

    @property
    def size(self) -> str:
        """How many seeds it has, and how many runs if that is another number."""
        num_seeds = len({run.config.get("seed") for run in self.runs})
        seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
        return seeds if num_seeds == len(self.runs) else f"{len(self.runs)} runs of {seeds}"


@dataclass(frozen=True)
class Result:
    """A measure of a group where its runs were last measured."""

    mean: float
    standard_error: float | None  # over seeds


def group(runs: Sequence[RunData]) -> list[RunGroup]:
    """Groups runs by their config without the seed; a run without a config is a group of its own."""
    by_config: dict[str, list[RunData]] = {}
    for number, run in enumerate(runs):
        kept = {name: value for name, value in run.config.items() if not _is_aside(name)}
        by_config.setdefault(text_of(kept) if kept else f"run {number}", []).append(run)
    labels = _labels([group[0] for group in by_config.values()])
    return [RunGroup(label, group) for label, group in zip(labels, by_config.values(), strict=True)]


def results(groups: Sequence[RunGroup]) -> list[tuple[str, list[Result | None]]]:
    """Returns a row for each measure: its last value in each group."""
    keys: dict[str, None] = {}
    for run in (run for of_group in groups for run in of_group.runs):
        for measure in without_idle_totals(measures(run)):
            keys[f"{measure.held_out if measure.is_evaluated else measure.training}/mean"] = None
        keys |= dict.fromkeys([*diversities(run), *(key for key in (WIN_RATE,) if key in run.keys)])
    return [(key, [_result(of_group, key) for of_group in groups]) for key in [*keys, "images_per_second"]]


def _result(of_group: RunGroup, key: str) -> Result | None:
    columns = [column for run in of_group.runs if (column := run.column(key))]
    if not columns:
        return None
    last = [column[-1][1] for column in columns]
    return Result(fmean(last), stdev(last) / math.sqrt(len(last)) if len(last) > 1 else None)


def _is_aside(name: str) -> bool:
    return name in _ASIDE or name.startswith("tracking.")


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Names each group by its runs' name, without the seed at its end, and by the fields that set it apart."""
    changed = [(name, values) for name, values in differing(runs) if not _is_aside(name)]
    labels = []
    for index, run in enumerate(runs):
        words = [f"{name}={values[index]}" for name, values in changed if len(values[index]) <= 24]
        more = f" ({', '.join(words)})" if 0 < len(words) <= _MOST_NAMED else ""
        labels.append(f"{_without_seed(run)}{more}")
    return labels


def _without_seed(run: RunData) -> str:
    """Drops _seed3 or _3 from a name if 3 is the run's seed."""
    seed = run.config.get("seed")
    for end in (f"seed{seed}", f"s{seed}", f"{seed}"):
        shorter = run.name.removesuffix(end)
        if shorter != run.name and shorter.rstrip("_-./"):
            return shorter.rstrip("_-./") if shorter[-1] in "_-./" else run.name
    return run.name
