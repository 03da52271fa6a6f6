"""Says in a sentence or two what a run has come to; every word is computed from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlcm_fast.report.changes import Change, of_held_out, of_metric, of_training, of_win_rate
from rlcm_fast.report.measures import Measure, constants, diversities, guards, guards_outside, measures
from rlcm_fast.report.reading import RunData
from rlcm_fast.report.rewards import of_person

Kind = Literal["good", "mixed", "bad", "unknown"]
LABELS: dict[Kind, str] = {
    "good": "Looks good",
    "mixed": "Look closer",
    "bad": "Something is wrong",
    "unknown": "Not enough to tell",
}


@dataclass(frozen=True)
class Verdict:
    """What a run has come to."""

    kind: Kind
    sentences: Sequence[str]

    @property
    def label(self) -> str:
        return LABELS[self.kind]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def verdict(run: RunData) -> Verdict:
    """Judges a run: did the reward rise, did what was not trained on stay, is a reward constant, did the run end?"""
    # Compare the start with now: what is optimised, then what nobody optimised.
    goals = _known({f"the {_name(measure)}": _trained_change(run, measure) for measure in _goals(run)})
    goals = _known({"the win rate against the start model": of_win_rate(run)}) | goals
    parts = _known({f"its part {m.key}": _trained_change(run, m) for m in _parts(run)})
    watched = _known({f"held-out {m.key}": of_held_out(run, m.held_out) for m in measures(run) if not m.is_trained})
    watched |= _known({f"held-out {name}": of_metric(run, key) for key, name in diversities(run).items()})
    lost = [name for name, change in watched.items() if change.word == "fell"]
    rose = [name for name, change in goals.items() if change.word == "rose"]
    fell = [name for name, change in {**goals, **parts}.items() if change.word == "fell"]
    stuck, outside = constants(run), guards_outside(run)
    held_out = {measure.key for measure in measures(run) if not measure.is_trained}
    can_tell = held_out.intersection(guards(run)) or set(outside)  # statistics change with any reward

    # Put it into sentences.
    sentences = [_state(run)]
    if of_person(run.config) and of_win_rate(run) is None:
        sentences.append("Nobody has compared its images with the start model's, so there is no win rate.")
    sentences += [_sentence(name, change) for name, change in {**goals, **parts, **watched}.items()]
    for name, value in stuck.items():
        sentences.append(f"The reward {name} is {value:.4g} for every image, so it teaches nothing.")
    if outside:
        sentences.append(f"Outside the band of the start model: {', '.join(outside)}.")
    if rose and (lost or outside):
        sentences.append("The reward may have been bought with the pictures: look at them below.")

    # Judge.
    if stuck:
        return Verdict("bad", sentences)
    if not goals or (not run.has_export and run.num_iterations < 3):
        return Verdict("unknown", sentences)
    if rose and not (lost or outside or fell):
        return Verdict("good", sentences)
    return Verdict("bad" if can_tell.intersection(outside) or (fell and not rose) else "mixed", sentences)


def _known(changes: dict[str, Change | None]) -> dict[str, Change]:
    return {name: change for name, change in changes.items() if change}


def _goals(run: RunData) -> list[Measure]:
    """Returns the totals, which is what is optimised; a single reward is its own total."""
    trained = [measure for measure in measures(run) if measure.is_trained]
    totals = [measure for measure in trained if measure.key.rpartition("/")[2] == "total"]
    parts = [measure for measure in trained if measure not in totals]
    return parts if len(parts) == 1 else totals or parts


def _parts(run: RunData) -> list[Measure]:
    """Returns the rewards that a total adds up, if there are several."""
    goals = _goals(run)
    is_whole = all(measure.key.rpartition("/")[2] != "total" for measure in goals)
    return [] if is_whole else [measure for measure in measures(run) if measure.is_trained and measure not in goals]


def _trained_change(run: RunData, measure: Measure) -> Change | None:
    """Returns the change on held-out prompts, which are the same every time; on training prompts if there is none."""
    return (of_held_out(run, measure.held_out) if measure.is_evaluated else None) or of_training(run, measure.training)


def _name(measure: Measure) -> str:
    task, _, name = measure.key.rpartition("/")
    of_task = f" of {task}" if task else ""
    return f"total reward{of_task}" if name == "total" else f"reward {name}{of_task}"


def _state(run: RunData) -> str:
    done, planned = run.num_iterations, run.num_planned
    if done == 0:
        return "The run is at its first iteration." if run.is_alive else "The run ended before its first iteration."
    if run.lines and run.lines[-1].get("guard/stopped"):  # a run that goes on drops that line
        return f"A guard stopped the run after {done} of {planned or '?'} iterations."
    if run.is_alive and done < (planned or done + 1):
        return f"The run is going on: {done} of {planned or '?'} iterations."
    if run.has_export or (planned and done >= planned):
        return f"The run has ended after {done} iterations."
    return f"The run stopped early, after {done} of {planned or '?'} iterations."


def _sentence(name: str, change: Change) -> str:
    """Returns as: The total reward rose from -1.43 to -0.68 (12.1 standard errors)."""
    name = name[0].upper() + name[1:]
    sigmas = change.sigmas
    sure = "" if sigmas is None else f" ({abs(sigmas):.1f} standard errors)"
    if change.start == change.end:
        return f"{name} stayed at {change.end:.4g}."
    if change.word == "stayed":
        return f"{name} stayed near {change.start:.4g}; it is {change.end:.4g}{sure}."
    return f"{name} {change.word} from {change.start:.4g} to {change.end:.4g}{sure}."
