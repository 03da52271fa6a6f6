"""How many images it takes to see which way a reward points: signal and noise of its policy gradient at the start.

    python benchmarks/learning/gradient_signal.py --config configs/shapes/alignment.yaml --batches 4 \\
        --override prompts.num_prompts 64 --out benchmarks/results/gradient_signal/alignment

Each of --batches rollouts of the start model, with the config's prompts, rewards and advantages, gives one gradient g_i
of the same expectation. A product of two of them has the signal's power as its mean, one with itself the noise's too:

    signal = mean over i < j of <g_i, g_j>        noise = mean over i of <g_i, g_i> - signal

Both are taken plain and as Adam sees a gradient, each weight's divided by the root of its mean square over the batches;
for each action alone and for all together. `signal_share` = signal / (signal + noise) at the size of one rollout, and
`images_needed` the size at which it would be one half; empty where the signal is below twice its standard error.
A KL term is left out. Writes OUT.csv and OUT.json, whose content is also the last line on stdout.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import policy_of
from benchmarks.shared.reporting import print_summary, write_csv
from benchmarks.shared.training_runs import add_config_arguments, read_config, temporary_trainer

if TYPE_CHECKING:
    from torch import Tensor

    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer


def main() -> int:
    arguments = _parser().parse_args()
    from rlcm_fast.train import set_process_environment

    set_process_environment()
    try:
        config = _config(arguments)
        batches = measure(config, arguments.batches)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images = config.prompts.num_prompts * config.prompts.images_per_prompt
    rows = signal_rows(batches, images)
    write_csv(arguments.out.with_suffix(".csv"), rows)
    together = {row["metric"]: row for row in rows if row["action"] == "all"}
    summary = {"config": arguments.config, "batches": arguments.batches, "images": images, **together}
    print_summary(summary, arguments.out.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/shapes/alignment.yaml")
    parser.add_argument("--batches", type=int, default=4, help="independent rollouts, 3 or more (default 4)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gradient_signal/alignment"))
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.batches < 3:
        raise ValueError(f"batches={arguments.batches} leaves no spread to judge by; give 3 or more")
    config = read_config(arguments)
    if config.engine.zero_stage == 3:
        raise ValueError("engine.zero_stage=3 shares out the weights; this benchmark wants them whole: use 0")
    return config


def measure(config: Config, num_batches: int) -> list[list[Tensor]]:
    """The gradients of each rollout, action by action."""
    with temporary_trainer(config, num_batches) as trainer, closing(trainer.tracker), closing(trainer.parts):
        return [gradients(trainer, batch) for batch in range(num_batches)]


def gradients(trainer: Trainer, batch: int) -> list[Tensor]:
    """The gradient (number of weights,) of -mean(advantage * w_k log_prob_k) over one rollout, for each action k.

    w_k: update.step_weights.
    """
    import torch

    from rlcm_fast.parallel import Turn
    from rlcm_fast.stages.selection import step_weights

    # A rollout, and what its images are worth.
    policy = policy_of(trainer, trainer.images.backbone.unet)  # the engine takes no gradients but its own
    done = trainer.collector.rollout(trainer.tasks.next_batch(["default"]), Turn(batch, seed=trainer.config.seed))
    advantages = trainer.tasks.advantages(*done.gathered())  # (B,)
    weights = [p for p in trainer.images.backbone.unet.parameters() if p.requires_grad]
    of_steps = step_weights(policy.schedule, trainer.config.update.step_weights)  # (K,)

    # Action by action, in micro-batches of samples.
    num_samples, num_actions = done.trajectory.num_samples, done.trajectory.num_actions
    result = []
    for action in range(num_actions):
        total = [torch.zeros_like(weight) for weight in weights]
        for samples in torch.arange(num_samples).split(trainer.config.update.micro_batch_size):
            transitions = done.trajectory.transitions(samples * num_actions + action)
            log_prob = policy.log_prob(transitions)  # (N,)
            loss = -of_steps[action] * (advantages[transitions.sample] * log_prob).sum() / num_samples
            for part, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                part += gradient
        result.append(torch.cat([part.flatten() for part in total]).cpu())
    return result


def signal_rows(batches: Sequence[Sequence[Tensor]], images: int) -> list[dict[str, Any]]:
    """A row for each metric and action of batches[i][k], gradients of rollouts of `images` images."""
    import torch

    whole = [torch.stack(list(batch)).sum(dim=0) for batch in batches]
    rms = torch.stack(whole).square().mean(dim=0).sqrt()
    scales = {"plain": torch.ones_like(rms), "adam": torch.where(rms > 0, 1 / rms, 0)}
    vectors_of = {str(k): list(of_action) for k, of_action in enumerate(zip(*batches, strict=True))}
    vectors_of["all"] = whole
    rows = []
    for metric, scale in scales.items():
        for name, vectors in vectors_of.items():
            scaled = [vector * scale for vector in vectors]
            rows.append({"metric": metric, "action": name, **signal(scaled, images)})
    return rows


def signal(vectors: Sequence[Tensor], images: int) -> dict[str, float | None]:
    """Share of the signal in gradients that are independent draws of one expectation, and the images for one half."""
    products = [(a.double() @ b.double()).item() for a, b in itertools.combinations(vectors, 2)]
    power = statistics.fmean((v.double() @ v.double()).item() for v in vectors)
    found, error = statistics.fmean(products), statistics.stdev(products) / len(products) ** 0.5
    needed = images * (power - found) / found if found > 2 * error else None
    return {"signal_share": found / power, "standard_error": error / power, "images_needed": needed}


if __name__ == "__main__":
    sys.exit(main())
