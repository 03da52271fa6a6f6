"""Checks the guard, and the metric that checkpoint.best keeps a checkpoint by."""

from __future__ import annotations

from rlcm_fast.config.guard import EXTRA, HELD_OUT, KL
from rlcm_fast.config.resolved import ResolvedRun, Task

DETECTOR = "shapes_alignment"  # every evaluation on prompts of ShapesWorld has it


def check_guard(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" if the guard, or the choice of the best checkpoint, cannot work."""
    _check_best(run)
    config, guard, evaluation = run.config, run.config.guard, run.config.evaluation
    if not guard.is_on:
        return
    if guard.every == 0 and evaluation.every == 0:
        raise ValueError(
            f"guard.action={guard.action} never measures with guard.every=0 and evaluation.every=0; set guard.every=5"
        )
    _check_names(run)
    for field, names in {"watch": guard.watch, "acts_on": guard.acts_on}.items():
        if not names:
            raise ValueError(f"guard.{field}=[] leaves nothing; give [held_out], or set guard.action=off")
        if KL in names and not config.has_start_model:
            raise ValueError(
                f"guard.{field} names {KL}, which needs the start model, and guard.action={guard.action} with "
                "update.kl_weight=0 has none; set guard.action=raise_kl or a kl_weight, or leave it out"
            )
    if KL in guard.acts_on and guard.max_kl == 0:
        raise ValueError(f"guard.acts_on names {KL}, which has no band with guard.max_kl=0; give guard.max_kl, as 0.1")
    for name, floor in guard.floors.items():
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not floor >= 0:
            raise ValueError(f"guard.floors.{name}={floor} is no half-width; give a number of 0 or more, as 0.3")
    if guard.action == "stop" and not config.checkpoint.best:
        raise ValueError(
            "guard.action=stop ends at weights that are outside, and checkpoint.best is empty, so none better are "
            "kept; set checkpoint.best=eval/NAME/mean, of a held-out reward"
        )


def _check_names(run: ResolvedRun) -> None:
    """Refuses names of measures that nobody takes."""
    guard = run.config.guard
    held_out = held_out_names(run)
    known = [*EXTRA, *held_out]
    for field, names in {"watch": guard.watch, "acts_on": guard.acts_on, "floors": list(guard.floors)}.items():
        for name in names:
            if name not in known:
                raise ValueError(
                    f"guard.{field}={name} is not measured; give one of {', '.join(known)}, or add it to "
                    "evaluation.rewards"
                )
    if guard.action in ("raise_kl", "stop") and guard.acts_on == [HELD_OUT] and not held_out:
        raise ValueError(
            f"guard.action={guard.action} acts on held-out rewards, and the run evaluates only what it trains on; add "
            "another reward to evaluation.rewards, or say what it shall act on, as guard.acts_on=[diversity_across]"
        )


def evaluated_names(run: ResolvedRun) -> dict[str, set[str]]:
    """Returns the labels of the rewards that an evaluation scores, by the prefix of their metrics."""
    watched = {reward.key for reward in run.config.evaluation.rewards}
    found = {}
    for task in run.tasks:
        detector = {DETECTOR} if task.evaluation.startswith("shapes:") else set()
        found[_prefix(run, task)] = {reward.key for reward in task.rewards} | watched | detector
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
