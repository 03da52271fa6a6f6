"""RLCM against DDPO on one reward: how much sooner the few-step model passes the diffusion model's final reward.

    python benchmarks/learning/rlcm_against_ddpo.py compressibility --jobs 2

and the same with incompressibility and alignment. Arms: RLCM on shapes/lcm with 4 steps, DDPO on shapes/teacher, from
which that was distilled and whose UNet has the same size, with 50 and with 10 DDIM steps and guidance; the same
rewards, no KL term, and 64 images an iteration; alignment, which moves little in so few, has 96. All actions are
trained on, but of ddpo_50's 49 each image has 10, drawn anew for every rollout (arXiv 2401.12244 has 5 of 50): all of
them would take 2.5 times as long. DDPO's losses are weighted by step, as else it hardly moves in so few queries:
ddpo_10_equal, without the weights, was tried first, on compressibility, and is in that sweep only. Learning rates by a
sweep of runs half as long (on alignment two fifths), the same rates for each arm. The factors are of seconds, queries
and forwards: to pass DDPO's final reward (summaries.pass_factor), and, as the start models differ, to gain as much as
DDPO does.

On a GPU there may be more images and larger micro-batches, here 256 of each:

    python benchmarks/learning/rlcm_against_ddpo.py alignment --jobs 9 \
        --override prompts.num_prompts 64 rollout.micro_batch_size 256 update.micro_batch_size 256 tracking.plan false
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import TOTAL, Arm, Curves, chosen_lrs, run_figure, train_arms, tuned
from benchmarks.learning.summaries import (
    AXES,
    gains,
    markdown,
    named,
    pass_factor,
    shared_metrics,
    summarise,
    table,
    write_curves,
)

REWARDS = ("compressibility", "incompressibility", "alignment")
NAME = "rlcm_against_ddpo"
_ITERATIONS = {"rlcm": 45, "ddpo_50": 15, "ddpo_10": 30, "ddpo_10_equal": 30}
_IN_SWEEP_ONLY = "ddpo_10_equal"
_EVALUATIONS = 5  # beside the first


@dataclass(frozen=True)
class Scale:
    """How large a reward's runs are."""

    num_prompts: str  # an iteration, with 4 images each
    micro_batch_size: str  # transitions of RLCM's; DDPO's configs have 32
    num_images: str  # of an evaluation
    lrs: tuple[str, ...]  # of the sweep
    evaluations_of_50_steps: int = _EVALUATIONS
    tuning_share: float = 1 / 2  # of the iterations, in the sweep


_USUAL = Scale("16", "64", "64", ("2e-5", "5e-5", "1e-4"))
SCALE = dict.fromkeys(REWARDS, _USUAL) | {
    # within an hour: an evaluation of 50 steps takes 66 s, their sweep a quarter of an hour of one core
    "alignment": Scale("24", "48", "256", ("2.5e-5", "5e-5", "1e-4"), evaluations_of_50_steps=2, tuning_share=2 / 5)
}


def arms(reward: str) -> list[Arm]:
    scale = SCALE[reward]
    batch = ("prompts.num_prompts", scale.num_prompts, "prompts.images_per_prompt", "4")
    own = ("update.micro_batch_size", scale.micro_batch_size, "update.kl_weight", "0")
    rlcm = Arm("rlcm", reward, (*batch, *own, "optimizer.final_lr_fraction", "1"))
    steps_50 = (*batch, "policy.num_steps", "50", "update.num_timesteps", "10")
    steps_10 = (*batch, "policy.num_steps", "10")
    trying = [rlcm, Arm("ddpo_50", f"ddpo_{reward}", steps_50), Arm("ddpo_10", f"ddpo_{reward}", steps_10)]
    if reward == "compressibility":
        trying.append(Arm(_IN_SWEEP_ONLY, f"ddpo_{reward}", (*steps_10, "update.step_weights", "equal")))
    return [_timed(arm, scale) for arm in trying]


def _timed(arm: Arm, scale: Scale) -> Arm:
    """The arm with its iterations, and what goes by their number: warm-up, evaluations, checkpoints."""
    count = _ITERATIONS[arm.name]
    evaluations = scale.evaluations_of_50_steps if arm.name == "ddpo_50" else _EVALUATIONS
    every = str(math.ceil(count / evaluations))
    training = ("num_iterations", str(count), "optimizer.warmup_updates", str(round(count / 12)))
    evaluation = ("evaluation.every", every, "evaluation.num_images", scale.num_images, "checkpoint.every", every)
    return arm.but(*training, *evaluation)


def _with_rates(trying: list[Arm], arguments: argparse.Namespace) -> dict[str, Arm]:
    """The arms by name, at the rates of the sweep, without the arm that is in the sweep only."""
    scale = SCALE[arguments.reward]
    chosen = tuned(trying, scale.lrs, scale.tuning_share, arguments)
    chosen.pop(_IN_SWEEP_ONLY, None)
    return chosen


def add_reward(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", choices=REWARDS)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward(parser)
    text = "arms to leave out; half of the time is ddpo_50's"
    parser.add_argument("--without", nargs="+", default=[], choices=["ddpo_50", "ddpo_10"], help=text)


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.runs /= arguments.reward
    arguments.out = Path(f"{arguments.out}_{arguments.reward}")

    # Train the arms, each at its best rate.
    trying = [arm for arm in arms(arguments.reward) if arm.name not in arguments.without]
    chosen = _with_rates(trying, arguments)
    curves = train_arms(list(chosen.values()), arguments)
    write_curves(curves, arguments.out, f"RLCM and DDPO, {arguments.reward}")

    # Print their numbers, what is optimised first, and the factors between RLCM and DDPO.
    others = [metric for metric in shared_metrics(curves) if metric != TOTAL]
    print(table(curves, [TOTAL, *others]))
    relative = {name: gains(seeds, TOTAL) for name, seeds in curves.items()}
    passes, gains_as_much = _factors(curves), _factors(relative)
    _print_factors("RLCM passes the end of", passes, arguments)
    _print_factors("RLCM gains as much as", gains_as_much, arguments)
    factors = {"factor_to_pass": passes, "factor_to_gain_as_much": gains_as_much}
    return {"reward": arguments.reward, "lr": chosen_lrs(chosen), "arms": summarise(curves), **factors}


def _factors(curves: Curves) -> dict[str, dict[str, Any]]:
    """arm of DDPO -> axis -> how many times less of it RLCM took."""
    factors = {}
    for name, seeds in curves.items():
        if name != "rlcm":
            factors[name] = {x: pass_factor(curves["rlcm"], seeds, TOTAL, x) for x in AXES}
    return factors


def _print_factors(head: str, factors: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    lines = []
    for name, found in factors.items():
        seeds = f"{found['queries']['seeds_that_pass']} of {len(arguments.seeds)}"
        lines.append([*named(name, found, digits=1), seeds])
    print("\n" + markdown([head, *AXES, "in seeds"], lines))


def trained_arms(
    reward: str, arguments: argparse.Namespace, names: Sequence[str]
) -> tuple[dict[str, Arm], argparse.Namespace]:
    """Some arms of this figure for another one: trained where they have not been, and where their runs lie."""
    own = argparse.Namespace(**{**vars(arguments), "reward": reward})
    own.runs = arguments.runs.parent / NAME / reward
    own.out = own.runs / NAME  # of a sweep that may have fewer arms than this figure's
    chosen = _with_rates([arm for arm in arms(reward) if arm.name in names], own)
    train_arms(list(chosen.values()), own)
    return chosen, own


if __name__ == "__main__":
    sys.exit(run_figure(NAME, __doc__, draw, _add_arguments))
