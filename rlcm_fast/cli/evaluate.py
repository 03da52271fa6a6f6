"""Score a model by rewards, at one or several numbers of steps, as JSON.

The order of prompts depends on the seed only, so models are compared on the same prompts and noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import add_sampling_arguments, check_texts, whole
from rlcm_fast.cli.output import check_device, check_out, write
from rlcm_fast.config import bounds
from rlcm_fast.finite_json import finite_json

if TYPE_CHECKING:
    from torch import Tensor

    from rlcm_fast.backbones.texts import TextEncoder
    from rlcm_fast.config import RewardConfig
    from rlcm_fast.rewards import Reward
    from rlcm_fast.trajectory import Prompt

REWARDS_HELP = (
    "one or more of jpeg_compressibility, shapes_alignment, ... (a wrong name lists all), package.module:Class, or "
    "as in a config: '{name: distribution_parity, arguments: {classifier: shapes_colour}, group_size: 16}'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser, several_steps=True)
    parser.add_argument("--rewards", nargs="+", required=True, metavar="NAME", help=REWARDS_HELP)
    source = "prompt source, like prompts.source in a config: shapes:one, ..., a .txt or .jsonl file, hf:DATASET"
    parser.add_argument("--prompts", default="shapes:one:held_out", metavar="SOURCE", help=source)
    parser.add_argument(
        "--num-images", type=whole(1, bounds.IMAGES), default=64, help="images for each number of steps"
    )
    parser.add_argument("--out", help="JSON file to write; default: stdout")


def run(arguments: argparse.Namespace) -> None:
    # Check the arguments before anything is drawn.
    out = None if arguments.out is None else check_out(arguments.out)
    check_device(arguments.device)
    check_texts(arguments)
    from rlcm_fast.cli.pipelines import encoder_of, load_pipeline, set_size, text_settings
    from rlcm_fast.cli.sampling import Sampling
    from rlcm_fast.prompts import load_prompts, prompts_for_images
    from rlcm_fast.rewards import build_rewards, check_groups, check_reward

    configs = reward_configs(arguments.rewards)
    for index, config in enumerate(configs):
        check_reward(config, f"rewards[{index}]", must_run=True)
    prompts = prompts_for_images(load_prompts(arguments.prompts, "prompts"), arguments.num_images, arguments.seed)
    rewards = {name: reward for name, (reward, _) in build_rewards(configs).items()}
    check_groups(rewards, arguments.num_images)
    _try(rewards, prompts, arguments)

    # Draw and score at each number of steps, and write the report.
    reading = text_settings(arguments)
    pipeline = load_pipeline(arguments.model, arguments.revision, arguments.device, arguments.lora)
    set_size(pipeline, arguments.size)
    sampling = Sampling.settle(pipeline, arguments)
    arguments.guidance_scale = sampling.guidance_scale
    encoder = encoder_of(pipeline, reading, [prompt.text for prompt in prompts])
    drawing = ("model", "lora", "prompts", "num_images", "guidance_scale", "seed", "size")
    settings = (*drawing, "negative", "clip_skip", "long")
    report = {name: getattr(arguments, name) for name in settings} | {
        "results": [measure(pipeline, prompts, rewards, steps, arguments, encoder) for steps in sampling.num_steps]
    }
    text = finite_json(report, indent=2)
    if out is None:
        print(text)
    else:
        write(out, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def _try(rewards: Mapping[str, Reward], prompts: Sequence[Prompt], arguments: argparse.Namespace) -> None:
    """Calls the rewards that need no models on two random images, before the model loads; raises ValueError."""
    from rlcm_fast.cli.scoring import device_of
    from rlcm_fast.rewards import Trial

    for index, (name, reward) in enumerate(rewards.items()):
        trial = Trial(f"rewards[{index}].name", name, reward, prompts[:2])
        if not trial.is_on_models:
            trial.run(arguments.size or (512, 512), device_of(arguments.device), timeout=0)


def reward_configs(entries: Sequence[str]) -> list[RewardConfig]:
    """Parses rewards, each a name or a mapping as in a config; refuses what this command would ignore."""
    from rlcm_fast.config import parse_config

    items = [entry if entry.startswith("{") else json.dumps({"name": entry}) for entry in entries]
    configs = parse_config(["--rewards", f"[{', '.join(items)}]"]).rewards
    for config in configs:
        if config.on_failure != "stop":
            raise ValueError(
                f"rewards: name={config.name} on_failure={config.on_failure} works in a run only, because this command "
                "scores all images at once; leave it out"
            )
    return configs


def reward_config(name: str, arguments: str | None) -> RewardConfig:
    """Parses the reward; raises ValueError for arguments that are no mapping."""
    if arguments is None:
        return reward_configs([name])[0]
    if name.startswith("{"):
        raise ValueError(f"arguments={arguments} beside the mapping {name}; write them into it")
    if not arguments.strip().startswith("{"):
        raise ValueError(f"arguments={arguments} is no mapping; write '{{key: value}}'")
    return reward_configs([f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'])[0]


def measure(
    pipeline: Any,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    num_steps: int,
    arguments: argparse.Namespace,
    encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """Draws images at one number of steps and scores them by every reward; set rewards score groups.

    encoder: what reads the prompts; None: the pipeline. The time includes the drawing only. A reward that fails does so
    on the first image, before the others are drawn.
    """
    from rlcm_fast.cli.pipelines import draw
    from rlcm_fast.cli.sampling import sampler_of
    from rlcm_fast.cli.scoring import raw_scores
    from rlcm_fast.rewards import evaluate

    # Draw one image, which sets up the pipeline and is not timed, and try the rewards on it.
    texts = [prompt.text for prompt in prompts]
    settings = (num_steps, arguments.guidance_scale, arguments.seed, arguments.batch_size)
    first, _ = draw(pipeline, texts[:1], *settings, encoder)
    for name, reward in rewards.items():
        raw_scores(name, reward, first, prompts[:1])

    # Draw all images.
    images, seconds = draw(pipeline, texts, *settings, encoder)

    # Score them.
    scores = {}
    for name, reward in rewards.items():
        scores[name] = evaluate(name, reward, raw_scores(name, reward, images, prompts), prompts, iteration=0)
    return {
        "num_steps": num_steps,
        "sampler": sampler_of(pipeline),
        "seconds_per_image": seconds / len(images),
        "rewards": {name: statistics(values) for name, values in scores.items()},
    }


def statistics(values: Tensor) -> dict[str, float]:
    """Mean, sample standard deviation, and standard error of the mean; the last two are 0 for a single value."""
    mean = values.double().mean().item()
    std = values.double().std().item() if len(values) > 1 else 0.0
    return {"mean": mean, "std": std, "standard_error": std / len(values) ** 0.5}
