"""What the updates on a rollout record, and the metrics that are made of it."""

# B samples of this process

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.kernels.functional import RatioStats


@dataclass(frozen=True)
class UpdateMetrics:
    """Statistics over all micro-batches of a round on this process; `metrics` reads its tensors in one transfer."""

    ratio_mean: Tensor
    ratio_max_deviation: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    loss: Tensor
    kl_to_start: Tensor  # 0 if update.kl_weight is 0
    skipped: float  # share of the chosen transitions without a signal, which the network did not run on
    real_image_loss: Tensor | None  # () weighted, mean over updates; None without real images
    real_images_skipped: int  # real images that could not be read, on this process
    grad_norm: float  # of the last update that was not skipped, before clipping, over all processes; NaN without one
    skipped_updates: int  # updates whose gradient was not finite, the same on every process
    seconds: float
    real_image_seconds: float  # the part of `seconds` spent on the extra loss

    def metrics(self, advantages: Tensor) -> dict[str, float]:
        """Returns means and the largest deviation over all processes; advantages (B,) belong to this process.

        A NaN among the advantages is an image without one, which does not count.
        """
        # Average what every process has; take the maximum of the deviation.
        has_one = (~advantages.isnan()).float().mean().to(self.loss.device)
        means = {
            "advantage/abs_mean": advantages.masked_fill(advantages.isnan(), 0.0).abs().mean().to(self.loss.device),
            "ratio/mean": self.ratio_mean,
            "clip_fraction": self.clip_fraction,
            "approx_kl": self.approx_kl,
            "loss": self.loss,
            "kl_to_start": self.kl_to_start,
            "skipped_transitions": self.loss.new_tensor(self.skipped),
        }
        if self.real_image_loss is not None:
            means["pretraining/loss"] = self.real_image_loss
            # The mean over processes of what makes their sum.
            on_all = float(self.real_images_skipped * parallel.world_size())
            means["pretraining/skipped"] = self.loss.new_tensor(on_all)
        gathered = parallel.all_gather(torch.stack([*means.values(), has_one, self.ratio_max_deviation])[None])
        *averaged, share, deviation = torch.cat([gathered[:, :-1].mean(dim=0), gathered[:, -1:].amax(dim=0)]).tolist()
        averaged[0] /= share or 1.0
        return {
            **dict(zip(means, averaged, strict=True)),
            "ratio/max_deviation": deviation,
            "grad_norm": self.grad_norm,
            "skipped_updates": self.skipped_updates,
        }

    def timings(self) -> dict[str, float]:
        seconds = {"seconds/update": self.seconds}
        if self.real_image_loss is not None:
            seconds["seconds/pretraining"] = self.real_image_seconds
        return seconds


@dataclass
class Record:
    """What the updates on a rollout have recorded so far; tensors stay on the device until `summary`."""

    stats: list[RatioStats] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    kls: list[Tensor] = field(default_factory=list)
    extra_losses: list[Tensor] = field(default_factory=list)
    extra_skipped: int = 0
    extra_seconds: float = 0.0
    grad_norm: float = math.nan
    num_skipped: int = 0
    num_updates: int = 0
    num_chosen: int = 0
    num_trained: int = 0

    def micro_batch(self, stats: RatioStats, loss: Tensor, kl: Tensor) -> None:
        """Notes a micro-batch's statistics, loss () and KL ()."""
        self.stats.append(stats)
        self.losses.append(loss)
        self.kls.append(kl)

    def forget_last(self, num_micro_batches: int) -> None:
        """Forgets the last micro-batches, whose gradients were dropped."""
        for noted in (self.stats, self.losses, self.kls):
            del noted[len(noted) - num_micro_batches :]

    def not_finite(self, num_micro_batches: int, num_extra: int) -> list[str]:
        """Names what was not finite in the last micro-batches of this process, by the key of its metric."""
        found = {
            "loss": self.losses[-num_micro_batches:],
            "kl_to_start": self.kls[-num_micro_batches:],
            "pretraining/loss": self.extra_losses[-num_extra:] if num_extra else [],
        }
        return [name for name, values in found.items() if values and not torch.stack(values).isfinite().all()]

    def update(self, num_chosen: int, num_trained: int) -> None:
        """Notes that an update has ended, of so many transitions."""
        self.num_updates += 1
        self.num_chosen += num_chosen
        self.num_trained += num_trained

    def mean_kl(self) -> Tensor:
        """Returns the mean divergence () of the micro-batches of this process."""
        return torch.stack(self.kls).mean()

    def summary(self, seconds: float) -> UpdateMetrics:
        extra = torch.stack(self.extra_losses).sum() / self.num_updates if self.extra_losses else None
        return UpdateMetrics(
            ratio_mean=torch.stack([s.ratio_mean for s in self.stats]).mean(),
            ratio_max_deviation=torch.stack([s.ratio_max_deviation for s in self.stats]).max(),
            clip_fraction=torch.stack([s.clip_fraction for s in self.stats]).mean(),
            approx_kl=torch.stack([s.approx_kl for s in self.stats]).mean(),
            loss=torch.stack(self.losses).mean(),
            kl_to_start=self.mean_kl(),
            skipped=1 - self.num_trained / self.num_chosen,
            real_image_loss=extra,
            real_images_skipped=self.extra_skipped,
            grad_norm=self.grad_norm,
            skipped_updates=self.num_skipped,
            seconds=seconds,
            real_image_seconds=self.extra_seconds,
        )
