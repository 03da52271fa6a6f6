"""Which metrics of a run mean what: trained rewards, held-out measures, guards, a person's comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlcm_fast.report.reading import RunData
from rlcm_fast.report.rewards import is_size, of_person

WIN_RATE = "rating/win_rate"


@dataclass(frozen=True)
class Measure:
    """A reward as it is named in the metrics: `reward/KEY/mean` in training, `eval/KEY/mean` held out."""

    key: str  # NAME, or TASK/NAME
    is_trained: bool
    is_evaluated: bool

    @property
    def training(self) -> str:
        return f"reward/{self.key}"

    @property
    def held_out(self) -> str:
        return f"eval/{self.key}"


@dataclass(frozen=True)
class WinRate:
    """How often a person preferred the tuned model's image to the start model's."""

    iteration: float  # of the evaluation whose images were compared
    rate: float  # in [0, 1]; a tie is half a win
    standard_error: float


def win_rates(run: RunData) -> list[WinRate]:
    """Returns the win rate of each evaluation with answers, by iteration; an evaluation's last line has all of them."""
    found = {}
    for line in run.lines:
        num_pairs = line.get("rating/compared", 0.0)
        if WIN_RATE in line and num_pairs > 0:
            at = line.get("rating/of_iteration", line["iteration"])
            found[at] = WinRate(at, line[WIN_RATE], error_of_win_rate(num_pairs))
    return [found[at] for at in sorted(found)]


def error_of_win_rate(num_pairs: float) -> float:
    """Returns the standard error of the win rate of a model that is no better than the start; with ties it is less."""
    return 0.5 / math.sqrt(num_pairs)


def measures(run: RunData) -> list[Measure]:
    """Returns the rewards that the metrics name: trained ones first, totals before their parts; none of a person."""
    of_persons = of_person(run.config)
    trained = [key for key in _means(run, "reward/") if key not in of_persons]
    evaluated = [key for key in _means(run, "eval/") if not is_size(key)]
    trained.sort(key=lambda key: key.rpartition("/")[2] != "total")
    names = [*trained, *(key for key in evaluated if key not in trained)]
    return [Measure(name, name in trained, name in evaluated) for name in names]


def without_idle_totals(found: Sequence[Measure]) -> list[Measure]:
    """Leaves out a total that adds up one reward alone, whose curve it would repeat."""
    num_parts = Counter(measure.key.rpartition("/")[0] for measure in found if measure.is_trained)
    return [m for m in found if m.key.rpartition("/")[2] != "total" or num_parts[m.key.rpartition("/")[0]] != 2]


def diversities(run: RunData) -> dict[str, str]:
    """Returns eval/diversity, or eval/TASK/diversity of several tasks, and what to call it beside rewards."""
    keys = [key for key in run.keys if key.startswith("eval/") and key.endswith("/diversity")]
    return {key: name_of_diversity(key) for key in keys}


def name_of_diversity(key: str) -> str:
    """Returns another name than that of the reward `diversity`: eval/TASK/diversity is TASK/diversity of all images."""
    return f"{key.removeprefix('eval/')} of all images"


def guards(run: RunData) -> list[str]:
    """Returns the names of the guards that have a band in the metrics, which may have one end."""
    names = dict.fromkeys(key.removeprefix("guard/").rpartition("/")[0] for key in run.keys if _is_end(key))
    return [name for name in names if f"guard/{name}" in run.keys]


def guards_outside(run: RunData) -> list[str]:
    """Returns the guards that are outside their band where they were last measured."""
    found = []
    for name in guards(run):
        key = f"guard/{name}"
        last = next(line for line in reversed(run.lines) if key in line)
        if not last.get(f"{key}/low", -math.inf) <= last[key] <= last.get(f"{key}/high", math.inf):
            found.append(name)
    return found


def constants(run: RunData) -> dict[str, float]:
    """Returns the trained rewards that are the same for all images of the last iterations, and their value."""
    found = {}
    for measure in measures(run):
        key = measure.training
        last = [line for line in run.lines if f"{key}/mean" in line][-2:]
        if not measure.is_trained or len(last) < 2 or any(line.get(f"{key}/std") != 0.0 for line in last):
            continue
        before, value = (line[f"{key}/mean"] for line in last)
        if before == value:
            found[measure.key] = value
    return found


def _means(run: RunData, prefix: str) -> Sequence[str]:
    keys = [key for key in run.keys if key.startswith(prefix) and key.endswith("/mean")]
    return [key.removeprefix(prefix).removesuffix("/mean") for key in keys]


def _is_end(key: str) -> bool:
    return key.startswith("guard/") and key.endswith(("/low", "/high"))
