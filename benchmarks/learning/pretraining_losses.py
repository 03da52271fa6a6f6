"""Which loss on real images keeps a consistency model's few-step samples: candidates for L_pre, each trained alone.

Each trains `shapes/lcm` on ShapesWorld's renders by that loss and nothing else (AdamW, 64 pairs an update) and is
measured on the same training captions and noise before, halfway and after: the detector's score of 4-step samples
at guidance 4, and their diversity. What L_pre does to the samples when no reward opposes it is damage, or none.

    denoising     min(SNR, 5) |f(x_t) - x_0|^2, the diffusion loss in x_0 with min-SNR weights (arXiv 2303.09556)
    low_noise     the same at timesteps below half of T only, where details and not layouts are decided
    flat          |f(x_t) - x_0|^2, the same at all timesteps without weights
    consistency   huber(f(x_t), f(x_s)) with the same x_0 and noise (arXiv 2303.01469, 2310.14189)
    distillation  huber(f(x_t), f(x_s)), x_s a DDIM step from x_t with the frozen start model's f as its x_0

guidance is what the network is told in the loss: 1, the data's own distribution, or 4, that of the samples.
low_noise at guidance 1 is `rlcm_fast.policies.real_image_loss`. loss_mean is over the updates since the line before;
the seconds in the CSV are of a machine that other work shared. The last line on stdout has the rows as JSON.

    OMP_NUM_THREADS=1 python benchmarks/learning/pretraining_losses.py --out benchmarks/results/learning
"""

# N pairs, C H W latent, O origin timesteps

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.reporting import print_summary
from rlcm_fast import parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import EvaluationConfig, ModelConfig, PolicyConfig
from rlcm_fast.pairs import PairStream
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.policies.consistency import guidance_embedding
from rlcm_fast.stages.evaluation_build import build_evaluator
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Conditioning, Prompt

GUIDANCE = 4.0
BATCH_SIZE = 64
HUBER_C = 0.00054
SNR_CAP = 5.0

Function = Callable[[Tensor, Tensor], Tensor]  # f of x_t (N, C, H, W) and t (N,)


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    loss: str
    guidance: float
    seed: int
    updates: int
    detector_one: float
    diversity_one: float
    detector_two: float
    diversity_two: float
    loss_mean: float  # over the updates since the line before
    seconds: float  # of training until here


def function_of(policy: GaussianPolicy, network: Any, conditioning: Conditioning, guidance: float) -> Function:
    """f of `network` under this text, told this guidance."""
    levels = policy.schedule.levels
    told = guidance_embedding(guidance, network.config.time_cond_proj_dim)

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        rows = told.expand(len(t), -1)
        m = network(x_t, t, encoder_hidden_states=conditioning.embeds, timestep_cond=rows, return_dict=False)[0]
        a, b = levels.consistency[t, :, None, None, None].unbind(dim=1)
        return a * x_t + b * m

    return f


def denoising(policy: GaussianPolicy, f: Function, start: Function, x_0: Tensor, generator: torch.Generator) -> Tensor:
    return snr_weighted(policy, f, x_0, any_timesteps(policy, len(x_0), generator), generator)


def low_noise(policy: GaussianPolicy, f: Function, start: Function, x_0: Tensor, generator: torch.Generator) -> Tensor:
    return snr_weighted(policy, f, x_0, any_timesteps(policy, len(x_0), generator) // 2, generator)


def snr_weighted(policy: GaussianPolicy, f: Function, x_0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    x_t, _ = noised(policy, x_0, t, generator)
    snr = (policy.schedule.levels.signal[t] / policy.schedule.levels.noise[t]).square()
    return snr.clamp(max=SNR_CAP) * (f(x_t, t) - x_0).square().mean(dim=(1, 2, 3))


def flat(policy: GaussianPolicy, f: Function, start: Function, x_0: Tensor, generator: torch.Generator) -> Tensor:
    t = any_timesteps(policy, len(x_0), generator)
    x_t, _ = noised(policy, x_0, t, generator)
    return (f(x_t, t) - x_0).square().mean(dim=(1, 2, 3))


def consistency(
    policy: GaussianPolicy, f: Function, start: Function, x_0: Tensor, generator: torch.Generator
) -> Tensor:
    t, s = neighbours(policy, len(x_0), generator)
    x_t, noise = noised(policy, x_0, t, generator)
    with torch.no_grad():
        goal = f(mixed(policy, x_0, noise, s), s)
    return huber(f(x_t, t) - goal)


def distillation(
    policy: GaussianPolicy, f: Function, start: Function, x_0: Tensor, generator: torch.Generator
) -> Tensor:
    t, s = neighbours(policy, len(x_0), generator)
    x_t, _ = noised(policy, x_0, t, generator)
    levels = policy.schedule.levels
    with torch.no_grad():
        x_0_start = start(x_t, t)
        eps = (x_t - _column(levels.signal[t]) * x_0_start) / _column(levels.noise[t])
        goal = f(mixed(policy, x_0_start, eps, s), s)
    return huber(f(x_t, t) - goal)


LOSSES = {
    "denoising": denoising,
    "low_noise": low_noise,
    "flat": flat,
    "consistency": consistency,
    "distillation": distillation,
}


def any_timesteps(policy: GaussianPolicy, count: int, generator: torch.Generator) -> Tensor:
    """(N,) training timesteps, uniform."""
    return torch.randint(len(policy.schedule.levels.signal), (count,), generator=generator)


def neighbours(policy: GaussianPolicy, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N,) timesteps t of the model's distillation, and the next lower of each, 0 below the lowest."""
    grid = torch.nn.functional.pad(policy.schedule.levels.origin_timesteps, (1, 0))  # (O + 1,)
    row = torch.randint(1, len(grid), (count,), generator=generator)
    return grid[row], grid[row - 1]


def noised(policy: GaussianPolicy, x_0: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t and its noise."""
    noise = torch.randn(x_0.shape, generator=generator)
    return mixed(policy, x_0, noise, t), noise


def mixed(policy: GaussianPolicy, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return _column(policy.schedule.levels.signal[t]) * x_0 + _column(policy.schedule.levels.noise[t]) * noise


def huber(error: Tensor) -> Tensor:
    """Pseudo-Huber of the root mean square: 2310.14189's, over sqrt(C H W)."""
    return (error.square().mean(dim=(1, 2, 3)) + HUBER_C**2).sqrt() - HUBER_C


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class Trial:
    """One loss at one guidance and one seed."""

    def __init__(self, arguments: argparse.Namespace, loss: str, guidance: float, seed: int) -> None:
        self.name, self.guidance, self.seed, self.arguments = loss, guidance, seed, arguments
        cpu = torch.device("cpu")
        self.backbone = Backbone.load(ModelConfig(), cpu, torch.float32, kind="consistency")
        unet, config = self.backbone.unet, PolicyConfig(guidance_scale=GUIDANCE)
        self.policy = build_policy(config, Network(unet, unet.config), self.backbone.scheduler_config)
        self.start = self.backbone.frozen_start()
        self.pairs = PairStream("shapes:all", 64, BATCH_SIZE, seed)

    def run(self) -> list[Row]:
        """Measured before the first update, halfway and at the end."""
        optimizer = torch.optim.AdamW(self.backbone.unet.parameters(), lr=self.arguments.lr, weight_decay=0.0)
        rows, losses, seconds = [self._row(0, [], 0.0)], [], 0.0
        for update in range(self.arguments.updates):
            began = time.perf_counter()
            losses.append(self._update(optimizer, update))
            seconds += time.perf_counter() - began
            if update + 1 in (self.arguments.updates // 2, self.arguments.updates):
                rows.append(self._row(update + 1, losses, seconds))
                print(rows[-1], flush=True)
                losses = []
        return rows

    def _update(self, optimizer: torch.optim.Optimizer, update: int) -> float:
        images, texts = self.pairs.next_batch()
        x_0 = self.backbone.encode_images(images)
        conditioning = self.backbone.encode([Prompt(text) for text in texts], with_negative=False)
        f = function_of(self.policy, self.backbone.unet, conditioning, self.guidance)
        start = function_of(self.policy, self.start, conditioning, self.guidance)
        generator = parallel.generator(self.seed, 4, update)
        loss = LOSSES[self.name](self.policy, f, start, x_0, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.backbone.unet.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def _row(self, updates: int, losses: list[float], seconds: float) -> Row:
        scores: dict[str, float] = {}
        for source in ("one", "two"):
            config = EvaluationConfig(num_images=self.arguments.num_images, prompts=f"shapes:{source}")
            metrics = build_evaluator(config, {"eval": {}})(TextToImage(self.policy, self.backbone), updates)
            scores[f"detector_{source}"] = round(metrics["eval/shapes_alignment/mean"], 4)
            scores[f"diversity_{source}"] = round(metrics["eval/diversity"], 4)
        mean = round(sum(losses) / len(losses), 5) if losses else float("nan")
        return Row(self.name, self.guidance, self.seed, updates, loss_mean=mean, seconds=round(seconds, 1), **scores)

    def _encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self.backbone.encode(prompts, with_negative=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, GUIDANCE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="folder of pretraining_losses.csv")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for seed in arguments.seeds:
        for loss in arguments.losses:
            for guidance in arguments.guidance:
                rows += Trial(arguments, loss, guidance, seed).run()
                _write(arguments.out / "pretraining_losses.csv", rows)
    print_summary({"rows": [asdict(row) for row in rows]}, arguments.out / "pretraining_losses.json")


def _write(file: Path, rows: list[Row]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
