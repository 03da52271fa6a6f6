"""Runs one resumable training run: modules, optimizer, cosine learning rate, EMA, progress bar, checkpoints.

A generator seeded by (seed, step) draws every batch, so a resumed run continues as an uninterrupted run would. Under
torchrun, each process computes its share of the batch on one core, and the processes average their gradients. The
networks are so small that one process with two threads kept only 1.1 of two cores busy.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

_SAVE_EVERY_SECONDS = 60


# (module, its EMA copy, indices of the batch, generator) -> loss
Loss = Callable[[nn.Module, nn.Module, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class StageConfig:
    """The settings of one run; batch_size is per step over all processes, lr is the peak of a cosine."""

    num_steps: int
    batch_size: int
    lr: float
    ema_decay: float = 0.995
    weight_decay: float = 0.01
    warmup_steps: int = 100


@dataclass(frozen=True)
class StageRun:
    """The name of one run, the folder of its state file and the seed of its batches."""

    name: str
    folder: Path
    seed: int

    @property
    def state_file(self) -> Path:
        """The file `folder/<name>.pt`, which keeps the state to resume from."""
        return self.folder / f"{self.name}.pt"


@dataclass(frozen=True)
class _TrainingState:
    """The objects whose state a resumed run needs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel

    def save(self, path: Path, step: int) -> None:
        """Save the state after `step` steps; a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> int:
        """Restore a saved state, if there is one; returns the number of steps done."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location=next(self.module.parameters()).device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])
        return state["step"]


def run_stage(module: nn.Module, loss: Loss, num_samples: int, config: StageConfig, run: StageRun) -> nn.Module:
    """Minimise `loss(module, ema_module, indices, generator)` and return the module with its EMA weights.

    `run.state_file` keeps the state; a second call with a finished state returns at once.
    """
    # Make the state, or load it.
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.num_steps)
    target = copy.deepcopy(module).eval().requires_grad_(False)
    ema = EMAModel(module.parameters(), decay=config.ema_decay, use_ema_warmup=False)
    state = _TrainingState(module, optimizer, schedule, ema)
    first = state.load(run.state_file)
    saved_at = time.monotonic()

    # Train from there.
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = range(first, config.num_steps)
    bar = tqdm(steps, initial=first, total=config.num_steps, desc=run.name, mininterval=2, disable=rank > 0)
    for step in bar:
        # Draw a batch and compute its loss.
        generator = torch.Generator().manual_seed((run.seed * 1_000_003 + step) * world_size + rank)
        indices = torch.randint(num_samples, (config.batch_size // world_size,), generator=generator)
        ema.copy_to(target.parameters())
        value = loss(module, target, indices, generator)

        # Update the weights and their average.
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        _average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(module.parameters())

        # Report and save.
        if step % 25 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        is_due = time.monotonic() - saved_at > _SAVE_EVERY_SECONDS or step + 1 == config.num_steps
        if is_due and rank == 0:
            state.save(run.state_file, step + 1)
            saved_at = time.monotonic()
    ema.copy_to(module.parameters())
    return module.to(device).eval().requires_grad_(False)


def run_cycles(
    module: nn.Module, losses: Sequence[Loss], num_samples: int, cycles: Sequence[StageConfig], run: StageRun
) -> nn.Module:
    """Call `run_stage` for each cycle and its loss, starting from the weights of the cycle before."""
    for number, (loss, config) in enumerate(zip(losses, cycles, strict=True)):
        module.train().requires_grad_(True)
        name = run.name if number == 0 else f"{run.name}_{number + 1}"
        module = run_stage(module, loss, num_samples, config, StageRun(name, run.folder, run.seed + number))
    return module


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
