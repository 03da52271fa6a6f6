"""The harness of the learning study: settings ("arms") x seeds as training runs, and their curves.

A run is `rlcm_fast/train.py` in a process of its own, through training_runs.train_all: what is finished is not
repeated, what was cut off goes on, other settings in the same folder are refused. So every figure's command can be
stopped and given again. Runs lie in RUNS/ARM/seed_N, those of a sweep in RUNS/sweep/ARM/lr_X.

A curve's rows are training_runs.curve's, with `forwards`, the rows that had passed through the network
(forwards.py), and `eval/total/mean`, the weighted sum of what is optimised, on held-out prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.learning.forwards import forwards_per_iteration
from benchmarks.shared.reporting import ROOT, print_summary, write_csv
from benchmarks.shared.training_runs import (
    Row,
    add_override_argument,
    add_seed_arguments,
    curve,
    train_all,
    train_arguments,
)

if TYPE_CHECKING:
    from rlcm_fast.config import Config, RewardConfig

TOTAL = "eval/total/mean"
TUNING_SEED = 0
TUNING_WINDOW = 5  # last iterations, whose mean reward chooses the learning rate
_QUIET = ("tracking.grid_every", "0", "tracking.tensorboard", "false", "tracking.task_gradients_every", "0")

Curves = Mapping[str, Sequence[Sequence[Row]]]  # arm -> seeds -> rows


@dataclass(frozen=True)
class Arm:
    """A setting: a file of configs/shapes/ and what it overrides, pairs of field and value."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()

    def but(self, *overrides: str) -> Arm:
        """The same arm with further overrides, which win."""
        return replace(self, overrides=(*self.overrides, *overrides))

    def arguments(self, seed: int, folder: Path) -> list[str]:
        """The arguments of train.py."""
        config = str(ROOT / "configs" / "shapes" / f"{self.config}.yaml")
        return train_arguments(config, [*_QUIET, *self.overrides], seed, folder)


def run_figure(
    name: str,
    text: str | None,
    draw: Callable[[argparse.Namespace], Mapping[str, Any]],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """The main of a figure: its options, `draw`, OUT.json with what that returns; the exit code."""
    # Read the options: the figure's own, and those of all figures.
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_study_arguments(parser, name)
    arguments = parser.parse_args()

    # Train and draw; what was done before is not repeated.
    try:
        summary = draw(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130

    # Write the summary.
    import torch  # noqa: F401  # so that the summary names its GPU

    print_summary(summary, arguments.out.with_suffix(".json"))
    return 0


def add_study_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """--seeds, --jobs, --runs, --out and --override."""
    add_seed_arguments(parser)
    add_override_argument(parser)
    parser.set_defaults(runs=Path("runs/learning") / name)
    out = Path("benchmarks/results/learning") / name
    parser.add_argument("--out", type=Path, default=out, help=f"without its ending (default {out})")


def train_arms(arms: Sequence[Arm], arguments: argparse.Namespace) -> dict[str, list[list[Row]]]:
    """The curves of all arms and seeds; arguments.override holds for every arm."""
    wanted = {}
    for seed in arguments.seeds:  # seed by seed: a study that is cut off has whole seeds
        for arm in arms:
            folder = run_folder(arguments.runs, arm, seed)
            wanted[folder] = arm.but(*arguments.override).arguments(seed, folder)
    train_all(wanted, arguments.jobs)
    curves: dict[str, list[list[Row]]] = {arm.name: [] for arm in arms}
    for arm in arms:
        for seed in arguments.seeds:
            curves[arm.name].append(study_curve(run_folder(arguments.runs, arm, seed), seed))
    return curves


def run_folder(runs: Path, arm: Arm, seed: int) -> Path:
    return runs / arm.name / f"seed_{seed}"


def study_curve(folder: Path, seed: int) -> list[Row]:
    """The rows of a run, with forwards and the held-out total."""
    from rlcm_fast.config import parse_config

    config = parse_config(["--config", str(folder / "config.yaml")])
    forwards = forwards_per_iteration(config)
    rows = curve(folder, seed)
    for row in rows:
        row["forwards"] = forwards * row["iteration"]
        if not config.tasks and f"eval/{config.rewards[0].name}/mean" in row:
            row[TOTAL] = weighted(row, config.rewards, "eval")
    return rows


def weighted(row: Row, rewards: Sequence[RewardConfig], prefix: str) -> float:
    """The weighted sum of the rewards' means; a set reward's mean is over its values, so credits do not matter."""
    return sum(reward.weight * row[f"{prefix}/{reward.name}/mean"] for reward in rewards)


def tuned(arms: Sequence[Arm], lrs: Sequence[str], share: float, arguments: argparse.Namespace) -> dict[str, Arm]:
    """Each arm at the learning rate whose short run ended with the highest rewards on training prompts.

    The same for every arm: a run of `share` of its iterations at each of `lrs`, seed 0. OUT_sweep.csv has them all.
    Arms with tasks are judged by the mean of what their tasks reached, each in standard deviations over the arm's runs.
    """
    # Train every arm at every rate.
    folders, wanted = {}, {}
    for arm in arms:
        for lr in lrs:
            folder = arguments.runs / "sweep" / arm.name / f"lr_{lr}"
            trial = _shortened(arm.but("optimizer.lr", lr), share, arguments)
            folders[arm.name, lr] = folder
            wanted[folder] = trial.arguments(TUNING_SEED, folder)
    train_all(wanted, arguments.jobs)

    # Choose each arm's rate by the end of its runs.
    rows: list[Row] = []
    for (name, lr), folder in folders.items():
        rows.append({"arm": name, "lr": lr, **_tuning_row(folder)})
    rows = with_rewards(rows)
    write_csv(arguments.out.with_name(f"{arguments.out.name}_sweep.csv"), rows)
    return {arm.name: arm.but("optimizer.lr", best_lr(rows, arm.name)) for arm in arms}


def chosen_lrs(chosen: Mapping[str, Arm]) -> dict[str, str]:
    """arm -> the learning rate that `tuned` gave it, its last override."""
    return {name: arm.overrides[-1] for name, arm in chosen.items()}


def _shortened(arm: Arm, share: float, arguments: argparse.Namespace) -> Arm:
    from rlcm_fast.config import parse_config

    whole = arm.but(*arguments.override)
    count = round(share * parse_config(whole.arguments(TUNING_SEED, arguments.runs)).num_iterations)
    unmeasured = ("evaluation.every", "0", "evaluation.rewards", "[]", "guard.action", "off", "checkpoint.best", "")
    return whole.but("num_iterations", str(max(1, count)), *unmeasured)


def with_rewards(rows: Sequence[Row]) -> list[Row]:
    """The sweep's rows with `reward`, what is compared; of those with tasks from their columns task/NAME."""
    result = []
    for row in rows:
        if "reward" not in row:
            same_arm = [other for other in rows if other["arm"] == row["arm"]]
            row = {**row, "reward": _mean_in_deviations(row, same_arm)}
        result.append(row)
    return result


def _mean_in_deviations(row: Row, same_arm: Sequence[Row]) -> float:
    """The mean of the row's tasks, each in standard deviations over the arm's runs."""
    scores = []
    for key in row:
        if key.startswith("task/"):
            scores.append(_in_deviations(row[key], [other[key] for other in same_arm]))
    return statistics.fmean(scores)


def _in_deviations(value: float, values: Sequence[float]) -> float:
    return (value - statistics.fmean(values)) / (statistics.pstdev(values) or 1.0)


def best_lr(rows: Sequence[Row], arm: str) -> str:
    """The learning rate at which the arm's reward is highest, among the sweep's rows."""
    runs = [row for row in rows if row["arm"] == arm]
    return max(runs, key=lambda row: row["reward"])["lr"]


def _tuning_row(folder: Path) -> Row:
    from rlcm_fast.config import parse_config

    config: Config = parse_config(["--config", str(folder / "config.yaml")])
    rows = [row for row in curve(folder, TUNING_SEED) if _has_rewards(row)]
    last = rows[-TUNING_WINDOW:]
    found: Row = {"iterations": len(rows)}
    if config.tasks:
        for task in config.tasks:
            totals = [weighted(row, task.rewards, f"reward/{task.name}") for row in last]
            found[f"task/{task.name}"] = statistics.fmean(totals)
        return found
    totals = [weighted(row, config.rewards, "reward") for row in last]
    found["reward"] = sum(totals) / len(last)
    for reward in config.rewards:
        key = f"reward/{reward.name}"
        found[key] = sum(row[f"{key}/mean"] for row in last) / len(last)
    return found


def _has_rewards(row: Row) -> bool:
    """Whether the iteration had a rollout: the line after the last iteration has only its evaluation."""
    return any(key.startswith("reward/") for key in row)
