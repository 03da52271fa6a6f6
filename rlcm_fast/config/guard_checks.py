"""Checks the guard, and the metric that checkpoint.best keeps a checkpoint by."""

from __future__ import annotations

from rlcm_fast.config import Config, GuardConfig
from rlcm_fast.config.guard import ALL, EXTRA, HELD_OUT, KL, OTHER_KEYS
from rlcm_fast.config.resolved import ResolvedRun, Task
from rlcm_fast.config.reward_checks import PERSON

DETECTOR = "shapes_alignment"  # every evaluation on prompts of ShapesWorld has it


def check_guard(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" if the guard, or the choice of the best checkpoint, cannot work.

    Names and widths are also checked with a guard that is off.
    """
    _check_best(run)
    _check_names(run)
    _check_floors(run.config.guard)
    if not run.config.guard.is_on:
        return
    config, guard, evaluation = run.config, run.config.guard, run.config.evaluation
    if guard.every == 0 and evaluation.every == 0:
        raise ValueError(
            f"guard.action={guard.action} never measures with guard.every=0 and evaluation.every=0; set guard.every=5"
        )
    _check_labels(run)
    _check_kl(config)
    _check_speaks(run)
    _check_widths_have_a_use(run)
    if guard.action == "stop" and not config.checkpoint.best:
        raise ValueError(
            "guard.action=stop ends at weights that are outside, and checkpoint.best is empty, so none better are "
            "kept; set checkpoint.best=eval/NAME/mean, of a held-out reward"
        )


def _check_names(run: ResolvedRun) -> None:
    """Refuses names of measures that nobody takes."""
    guard = run.config.guard
    known = [*EXTRA, *held_out_names(run)]
    for field, names in {"watch": guard.watch, "acts_on": guard.acts_on, "floors": list(guard.floors)}.items():
        for name in names:
            if name not in known:
                raise ValueError(
                    f"guard.{field}={name} is not measured; give one of {', '.join(known)}, or add it to "
                    "evaluation.rewards"
                )


def _check_floors(guard: GuardConfig) -> None:
    """Refuses widths that are no numbers, and those of names that stand for other fields or several measures."""
    others = {
        HELD_OUT: "is guard.floor, for all held-out rewards; set that, or name one reward",
        ALL: "names no measure; name one, as {saturation: 0.6}",
        KL: "has no half-width; set guard.max_kl, the upper end of its band",
    }
    for name, floor in guard.floors.items():
        if name in others:
            raise ValueError(f"guard.floors.{name}={floor} {others[name]}")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not floor >= 0:
            raise ValueError(f"guard.floors.{name}={floor} is no half-width; give a number of 0 or more, as 0.3")


def _check_labels(run: ResolvedRun) -> None:
    """Refuses held-out rewards that are called like another measure, whose band they would have."""
    for name in held_out_names(run):
        if name in EXTRA or name in OTHER_KEYS:
            raise ValueError(
                f"evaluation.rewards has a reward called {name}, which guard.action={run.config.guard.action} calls "
                f"something else; give it another label, as {name}_reward"
            )


def _check_kl(config: Config) -> None:
    """Refuses kl_to_start without a start model, and to act on it without a band."""
    guard = config.guard
    has_none = f"needs the start model, and guard.action={guard.action} with update.kl_weight=0 has none"
    way_out = "set guard.action=raise_kl or a kl_weight, or leave it out"
    for field, names in {"watch": guard.watch, "acts_on": guard.acts_on}.items():
        if KL in names and not config.has_start_model:
            raise ValueError(f"guard.{field} names {KL}, which {has_none}; {way_out}")
    if guard.max_kl > 0 and not config.has_start_model:
        raise ValueError(f"guard.max_kl={guard.max_kl:g} is the upper end of {KL}, which {has_none}; {way_out}")
    if KL in guard.acts_on and guard.max_kl == 0:
        raise ValueError(f"guard.acts_on names {KL}, which has no band with guard.max_kl=0; give guard.max_kl, as 0.1")


def _check_speaks(run: ResolvedRun) -> None:
    """Refuses a guard without a measure that has a band, or that it acts on."""
    guard = run.config.guard
    for field, names in {"watch": guard.watch, "acts_on": guard.acts_on}.items():
        if not names:
            raise ValueError(f"guard.{field}=[] leaves nothing; give [held_out], or set guard.action=off")
    silent = {KL} if guard.max_kl == 0 else set()
    silent |= set() if held_out_names(run) else {HELD_OUT}
    if guard.action in ("raise_kl", "stop") and silent.issuperset(guard.acts_on):
        raise ValueError(
            f"guard.action={guard.action} acts on held-out rewards, and the run evaluates only what it trains on; add "
            "another reward to evaluation.rewards, or say what it shall act on, as guard.acts_on=[diversity_across]"
        )
    if silent.issuperset([*guard.watch, *guard.acts_on]):
        raise ValueError(
            f"guard.watch=[{', '.join(guard.watch)}] has no band: the run evaluates only what it trains on; add "
            "another reward to evaluation.rewards, or set guard.watch=[all]"
        )


def _check_widths_have_a_use(run: ResolvedRun) -> None:
    """Refuses the widths of bands that nobody watches."""
    guard = run.config.guard
    named = {*guard.watch, *guard.acts_on}
    named |= set(held_out_names(run)) if HELD_OUT in named else set()
    widths = {f"guard.floors.{name}={floor}": name for name, floor in guard.floors.items()}
    widths |= {f"guard.max_kl={guard.max_kl:g}": KL} if guard.max_kl > 0 else {}
    for width, name in widths.items():
        if not named.intersection((ALL, name)):
            raise ValueError(f"{width} has no use, as guard.watch does not name {name}; add it there, or leave it out")


def evaluated_names(run: ResolvedRun) -> dict[str, set[str]]:
    """Returns the labels of the rewards that an evaluation scores, by the prefix of their metrics; not a person's."""
    watched = {reward.key for reward in run.config.evaluation.rewards}
    found = {}
    for task in run.tasks:
        detector = {DETECTOR} if task.evaluation.startswith("shapes:") else set()
        trained = {reward.key for reward in task.rewards if reward.name != PERSON}
        found[_prefix(run, task)] = trained | watched | detector
    return found


def held_out_names(run: ResolvedRun) -> list[str]:
    """Returns what the guard calls the rewards that a task evaluates and does not train on: NAME, or TASK/NAME."""
    found = []
    for task in run.tasks:
        prefix = _prefix(run, task)
        held_out = evaluated_names(run)[prefix] - {reward.key for reward in task.rewards}
        found += [f"{prefix}/{name}".removeprefix("eval/") for name in sorted(held_out)]
    return found


def _prefix(run: ResolvedRun, task: Task) -> str:
    return f"eval/{task.name}" if run.has_tasks else "eval"


def _check_best(run: ResolvedRun) -> None:
    """Refuses a metric that no evaluation has."""
    best, evaluation = run.config.checkpoint.best, run.config.evaluation
    if not best:
        if run.config.checkpoint.export == "best":
            raise ValueError(
                "checkpoint.export=best has no best checkpoint to export; set checkpoint.best=eval/NAME/mean"
            )
        return
    known = [f"{prefix}/{name}/mean" for prefix, names in evaluated_names(run).items() for name in sorted(names)]
    known += [f"{prefix}/diversity" for prefix in evaluated_names(run)]
    if best.removeprefix("min:") not in known:
        raise ValueError(
            f"checkpoint.best={best} is no metric of this run's evaluation; give one of {', '.join(known)} (the "
            "highest is kept), or min:KEY"
        )
    if evaluation.every == 0:
        raise ValueError(f"checkpoint.best={best} is never measured with evaluation.every=0; set evaluation.every=10")
