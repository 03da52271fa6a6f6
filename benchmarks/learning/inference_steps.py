"""Tuned models against the base model at 1, 2, 4 and 8 sampling steps, on the same prompts and noise.

    python benchmarks/learning/inference_steps.py --tuned runs/compressibility/seed_*/export \\
        --rewards jpeg_compressibility shapes_alignment --out benchmarks/results/inference_steps

One or several tuned folders (one a seed). The first reward is the tuned one: the summary says whether two tuned steps
beat four steps of the base model on it. Writes OUT.csv and OUT.json; the last line on stdout is the summary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import mean_and_error, print_summary, write_csv

_TUNED_STEPS, _BASE_STEPS = 2, 4


def main() -> int:
    arguments = _parser().parse_args()
    rows = []
    try:
        for name, model in _models(arguments):
            rows += measure_model(name, model, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_csv(arguments.out.with_suffix(".csv"), rows)
    print_summary(summarise(rows, arguments.rewards), arguments.out.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", nargs="+", required=True, metavar="DIR", help="export/ folders of runs")
    parser.add_argument("--base", default="shapes/lcm", metavar="DIR", help="the model they started from")
    parser.add_argument("--rewards", nargs="+", default=["jpeg_compressibility", "shapes_alignment"], metavar="NAME")
    parser.add_argument(
        "--prompts", default="shapes:one:held_out", metavar="SOURCE", help="as prompts.source in a config"
    )
    parser.add_argument("--num-steps", nargs="+", type=int, default=[1, 2, 4, 8], help="with 2 and 4 among them")
    parser.add_argument("--num-images", type=int, default=500, help="for each model and number of steps (default 500)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="default 4")
    parser.add_argument("--seed", type=int, default=0, help="of noise and prompt order (default 0)")
    parser.add_argument("--batch-size", type=int, default=50, help="images drawn at once (default 50)")
    parser.add_argument("--device", help="cpu, cuda, ...; left out: cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inference_steps"))
    return parser


def _models(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    missing = {_TUNED_STEPS, _BASE_STEPS} - set(arguments.num_steps)
    if missing:
        raise ValueError(
            f"num_steps={arguments.num_steps} lacks {sorted(missing)}, which the comparison needs; add them"
        )
    return [("base", arguments.base), *(("tuned", folder) for folder in arguments.tuned)]


def measure_model(name: str, model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of steps and reward, measured as `rlcm-fast evaluate` does."""
    from rlcm_fast.cli.evaluate import measure
    from rlcm_fast.cli.pipelines import load_pipeline
    from rlcm_fast.prompts import load_prompts, prompts_for_images
    from rlcm_fast.rewards import build_reward

    rewards = {reward: build_reward(reward, {}) for reward in arguments.rewards}
    prompts = prompts_for_images(load_prompts(arguments.prompts, "prompts"), arguments.num_images, arguments.seed)
    pipeline = load_pipeline(model, None, arguments.device)
    rows = []
    for num_steps in arguments.num_steps:
        result = measure(pipeline, prompts, rewards, num_steps, arguments)
        for reward, numbers in result["rewards"].items():
            head = {"kind": name, "model": model, "num_steps": num_steps, "reward": reward}
            rows.append({**head, **numbers, "seconds_per_image": result["seconds_per_image"]})
    return rows


def summarise(rows: Sequence[dict[str, Any]], rewards: Sequence[str]) -> dict[str, Any]:
    """Every model and step count, and two tuned steps against four base steps, reward by reward.

    The difference of a tuned model has the standard error of its two means taken as independent (prompts and noise are
    shared, so this errs on the safe side); over several tuned models, that of the models' spread.
    """
    tuned_models = list(dict.fromkeys(row["model"] for row in rows if row["kind"] == "tuned"))
    compared = {reward: _compare(rows, tuned_models, reward) for reward in rewards}
    return {
        "table": {reward: _table(rows, reward) for reward in rewards},
        "two_step_tuned_minus_four_step_base": compared,
        "two_step_tuned_beats_four_step_base": (compared[rewards[0]]["mean"] or 0) > 0,
        "num_tuned_models": len(tuned_models),
    }


def _table(rows: Sequence[dict[str, Any]], reward: str) -> dict[str, dict[str, float]]:
    """kind -> steps -> mean over its models."""
    means: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["reward"] == reward:
            means.setdefault((row["kind"], row["num_steps"]), []).append(row["mean"])
    table: dict[str, dict[str, float]] = {}
    for (kind, steps), of_models in means.items():
        table.setdefault(kind, {})[str(steps)] = sum(of_models) / len(of_models)
    return table


def _compare(rows: Sequence[dict[str, Any]], tuned_models: Sequence[str], reward: str) -> dict[str, float | None]:
    """Two tuned steps minus four base steps: mean and standard error."""
    base = _rows_of(rows, "base", _BASE_STEPS, reward)[0]
    tuned = _rows_of(rows, "tuned", _TUNED_STEPS, reward)
    assert len(tuned) == len(tuned_models)
    difference = mean_and_error([row["mean"] - base["mean"] for row in tuned])
    if len(tuned) == 1:
        difference["standard_error"] = (tuned[0]["standard_error"] ** 2 + base["standard_error"] ** 2) ** 0.5
    return difference


def _rows_of(rows: Sequence[dict[str, Any]], kind: str, num_steps: int, reward: str) -> list[dict[str, Any]]:
    wanted = (kind, num_steps, reward)
    return [row for row in rows if (row["kind"], row["num_steps"], row["reward"]) == wanted]


if __name__ == "__main__":
    sys.exit(main())
