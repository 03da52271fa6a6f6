"""The engine without DeepSpeed: bfloat16 weights without a master copy, or an optimizer within the backward pass.

                                     bytes per weight: weight, gradient, states
    pure_bf16                        2 + 2 + 2
    pure_bf16, in the backward pass  2 + 0 + 2      a gradient lives until its weight has stepped

bfloat16 weights learn because of stochastic rounding (kernels/adamw.py): a change far below a weight's last digit is
made with a probability in proportion to its size. Every process holds all weights; gradients are averaged over them.

Micro-batches add up in bfloat16. Up to 64 of them are rounded to nearest: equal gradients, the hardest case, are 3.2 %
off in each element and 0.3 % along the sum. 224 would be 9.4 % off, and 1,024 would lose 68 %, because a sum of 256 no
longer changes by 1. So more than 64 are rounded stochastically, which needs no memory: 1,024 equal ones are 4.4 % off
in each element, at random, and 0.04 % along the sum (20,000 numbers, seed 0; docs/memory.md). Which it is, and which
random numbers an addition has, the kernel reads on the device: a CUDA graph replays additions as they are launched.

Within the backward pass the first weight steps before the norm over all gradients exists, so each tensor is clipped
alone: its gradient's norm is brought to at most max_grad_norm. A tensor's norm never exceeds the global norm, so
gradients that global clipping leaves unchanged stay unchanged here, too. An update must be one backward pass, because
weights move during it.

For the same reason such an update cannot be skipped whole. A tensor whose gradient is not finite does not step, which
the device decides, and the norm of the update tells at its end that there was one: the run goes back to its last
checkpoint, because the other tensors have moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlcm_fast import parallel
from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.engine.base import Engine, UpdatePlan, are_finite, copied_to_cpu, gradient_fails_with
from rlcm_fast.engine.old_checkpoints import read_engine
from rlcm_fast.engine.optimizers import build_optimizer, lr_factor
from rlcm_fast.engine.replicas import load_replica, save_replica
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.adamw import AdamW8bit

MOST_TO_NEAREST = 64  # micro-batches whose sum is rounded to nearest


class DirectEngine(Engine):
    """Trains a network with AdamW8bit and nothing else."""

    zero_stage = 0

    def __init__(
        self,
        network: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        plan: UpdatePlan,
        seed: int,
    ) -> None:
        """Takes `network` over; `seed` is the seed of the optimizer's stochastic rounding."""
        # Build the optimizer and its learning rate's schedule.
        built = build_optimizer(network, optimizer, engine, seed)
        assert isinstance(built, AdamW8bit)
        self._network, self._optimizer = network, built
        self._max_grad_norm = plan.max_grad_norm or float("inf")
        self._num_micro_batches, self._num_backwards, self._num_updates = plan.num_micro_batches, 0, 0
        self._base_lr, self._factor = optimizer.lr, lr_factor(optimizer, plan.num_updates)
        self._set_lr()
        self._steps_in_backward = engine.optimizer_in_backward
        self.skips_whole_updates = not engine.optimizer_in_backward
        self._square_norm = torch.zeros((), device=self._parameters()[0].device)

        # Start all processes from the same weights.
        if parallel.world_size() > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, 0)

        # Step each weight as soon as the backward pass has its gradient.
        if self._steps_in_backward:
            for parameter in self._parameters():
                parameter.register_post_accumulate_grad_hook(self._step_parameter)

        # Or add up the gradients of many micro-batches here, not by autograd.
        self._seed = seed
        self._sums: dict[Tensor, Tensor] = {}  # of the present update
        self._held: dict[Tensor, Tensor] = {}  # gradients that stay in one place, zero between updates
        self._addition = torch.zeros(2, dtype=torch.int64, device=self._square_norm.device)  # update, number
        self._indices: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self._parameters())}
        has_many = plan.num_micro_batches > MOST_TO_NEAREST
        self._summed = {p for p in self._parameters() if has_many and p.dtype == torch.bfloat16}
        for parameter in self._summed:
            parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def begin_update(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._note_addition()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._network(*arguments, **keywords)

    def backward(self, loss: Tensor) -> None:
        self.differentiate(loss)
        self.note_backward()

    def differentiate(self, loss: Tensor) -> None:
        gradient_fails_with(loss).backward()

    def note_backward(self) -> None:
        self._num_backwards += 1
        self._note_addition()

    def _note_addition(self) -> None:
        """Tells the device which addition comes next; filling waits for nothing and copies nothing."""
        if self._summed:
            is_random = self._num_micro_batches > MOST_TO_NEAREST
            self._addition[0].fill_(self._num_updates)
            self._addition[1].fill_(self._num_backwards if is_random else 0)

    @property
    def graph_problem(self) -> str:
        if self._steps_in_backward:
            return "engine.optimizer_in_backward=true steps weights in the backward pass, with numbers of the host"
        return ""

    def hold_gradients(self) -> Mapping[Tensor, Tensor]:
        # In the weights' memory formats, as autograd would make them.
        self._held = {parameter: torch.zeros_like(parameter) for parameter in self._parameters()}
        self._clear()
        return self._held

    def may_begin_again(self, num_micro_batches: int) -> bool:
        is_rounded_well = bool(self._summed) or num_micro_batches <= MOST_TO_NEAREST
        return not self._steps_in_backward and is_rounded_well

    def drop_gradients(self) -> None:
        self._num_backwards = 0
        self._clear()

    def _clear(self) -> None:
        """Drops all gradients; those that stay in one place become zero there."""
        self._sums = {}
        self._optimizer.zero_grad()
        if self._held:
            torch._foreach_zero_(list(self._held.values()))
        for parameter, gradient in self._held.items():
            if parameter in self._summed:
                self._sums[parameter] = gradient
            else:
                parameter.grad = gradient

    def step(self) -> float | None:
        if self._num_backwards < self._num_micro_batches:
            return None
        norm = self._end_backward() if self._steps_in_backward else self._step_all()
        self._num_backwards, self._num_updates = 0, self._num_updates + 1
        self._set_lr()
        return norm

    def _step_all(self) -> float:
        """Steps all weights if the norm over all gradients is finite, and returns it."""
        for parameter, total in self._sums.items():
            parameter.grad = total
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        _average(gradients)
        total = torch.nn.utils.get_total_norm(gradients).float()
        norm = total.item()
        if math.isfinite(norm):
            self._optimizer.step(grad_scale=self._scale(total))
        self._clear()
        return norm

    def _end_backward(self) -> float:
        """Returns the norm over all gradients of the backward pass that has ended."""
        norm = self._square_norm.sqrt()
        self._square_norm = torch.zeros_like(norm)
        return norm.item()

    def _add_gradient(self, parameter: Tensor) -> None:
        """Takes the gradient of a micro-batch away from autograd and adds it to the sum."""
        gradient = parameter.grad
        assert gradient is not None
        if parameter in self._sums:
            place = {"addition": self._addition, "index": self._indices[parameter]}
            functional.add_rounded_(self._sums[parameter], gradient, seed=self._seed, **place)
        else:
            self._sums[parameter] = gradient
        parameter.grad = None

    def _step_parameter(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        _average([parameter.grad])
        norm = parameter.grad.float().norm()
        self._square_norm += norm.square()
        self._optimizer.step_parameter(parameter, self._scale(norm))

    def _scale(self, norm: Tensor) -> Tensor:
        """Returns the factor that clips a gradient of this norm; NaN, which means no step, if that is not finite."""
        scale = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return torch.where(norm.isfinite(), scale, torch.nan)

    def _set_lr(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._base_lr * self._factor(self._num_updates)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._network.parameters() if p.requires_grad]

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def metrics(self) -> dict[str, float]:
        """Returns lost_updates: the share of weights that should have changed and did not.

        With stochastic rounding, chance decides which ones.
        """
        if self._optimizer.counts is None:
            return {}
        wanted, lost = self._optimizer.counts.tolist()
        self._optimizer.counts.zero_()
        return {"lost_updates": lost / max(1, wanted)}

    def weights_are_finite(self) -> bool:
        return are_finite(self._parameters())

    def full_weights(self) -> dict[str, Tensor]:
        return copied_to_cpu(self._network)

    def save(self, folder: Path) -> None:
        save_replica(folder, self._network, self._optimizer, {"schedule": self._num_updates})

    def load(self, folder: Path, trusts_old: bool = False) -> None:
        saved = read_engine(folder, self._network, trusts_old)
        load_replica(self._network, self._optimizer, saved)
        self._num_updates = saved.counters["schedule"]
        self._set_lr()


def _average(gradients: list[Tensor]) -> None:
    """Averages gradients in place over all processes, once per update.

    DistributedDataParallel would do it too, but its buckets are a second set of gradients, as large as the weights.
    """
    if parallel.world_size() == 1:
        return
    for gradient in gradients:
        gradient /= parallel.world_size()
    for sent in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        assert sent is not None
        sent.wait()
