"""Tries the micro-batches that `auto` has become, and lowers those that are out of memory, before anything needs them.

    for sampling, decoding, update:    one micro-batch on the loaded network -> fits, or the next smaller one is tried

The engine does not exist yet. What it will hold (moments, gradients, master weights) and what else is planned for the
stage is taken up by one tensor that nobody reads. So a trial measures what a plan knows least: activations, workspaces
of libraries, fragments, and what other processes have of the GPU. Networks run without torch.compile, which needs less.

Nothing stays: no gradient is kept, the random numbers are the trial's own, and no process waits for another inside a
pass. All processes take the same sizes: what is out of memory on one of them is lowered on all.
"""

# B rows of a micro-batch

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config
from rlcm_fast.config.batches import Batches, batches_of, with_batches
from rlcm_fast.faults import Fault
from rlcm_fast.planner.estimate import GIB
from rlcm_fast.planner.memory import Memory
from rlcm_fast.policies import SeededNoise
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.chosen_batches import Choice, Plan
from rlcm_fast.stages.compile_check import handing_over
from rlcm_fast.trajectory import Conditioning, Prompt

_SIZE_OF = {"sampling": "rollout", "decoding": "decode", "update": "update"}
"""The size in `Batches` that a stage depends on; stages are tried in this order."""
_FIELDS = {
    "rollout": "rollout.micro_batch_size",
    "decode": "rollout.decode_batch_size",
    "update": "update.micro_batch_size",
}


class DoesNotFit(Fault):
    """The smallest micro-batch is out of memory."""


class DeviceMemory:
    """The memory of a device, as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """Returns the bytes of all tensors."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self, run: Callable[[], None], taken: int) -> int:
        """Runs beside `taken` bytes that are held, and returns the most bytes of tensors meanwhile."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        held = torch.empty(taken, dtype=torch.uint8, device=self._device)
        run()
        del held
        return torch.cuda.max_memory_allocated(self._device)

    def clear(self) -> None:
        """Gives back what torch keeps for later."""
        torch.cuda.empty_cache()


def settle_sizes(
    choice: Choice, policy: GaussianPolicy, backbone: Backbone, tell: Callable[[str], None] = say
) -> Config:
    """Returns the config with the sizes that a trial leaves, and gives the pipeline its own; every rank must call.

    policy: around the network itself, before an engine takes it. Sizes that were not chosen just now are not tried, nor
    are those under ZeRO 3, where a network is whole only until then.
    """
    if choice.plan is None or choice.config.engine.zero_stage == 3:
        return choice.config
    trial = SizeTrial(choice.config, choice.plan, policy, backbone, DeviceMemory(policy.device), tell)
    config = with_batches(choice.config, trial())
    backbone.set_decode_batch_size(config.rollout.decode_batch_size)
    return config


@dataclass
class SizeTrial:
    """Tries sizes on one device."""

    config: Config
    plan: Plan
    policy: GaussianPolicy
    backbone: Backbone
    memory: DeviceMemory
    say: Callable[[str], None] = say

    def __call__(self) -> Batches:
        """Returns the largest sizes, none above those of the config, that are not out of memory on any process.

        Raises:
            DoesNotFit: on all processes together, if the smallest size of a stage is out of memory.
        """
        conditioning = self._conditioning()
        sizes, peaks = batches_of(self.config), []
        for stage, name in _SIZE_OF.items():
            while True:
                planned = self.plan.memory(sizes)
                peak = self._peak(stage, sizes, planned, conditioning)
                if not parallel.any_rank(peak is None):
                    break
                sizes = self._lowered(sizes, stage, name)
            peaks.append((stage, max(parallel.all_gather_list([peak or 0])), planned.stages[stage] - planned.overhead))
        found = ", ".join(f"{stage} {peak / GIB:.1f} ({plan / GIB:.1f})" for stage, peak, plan in peaks)
        self.say(f"auto: tried {sizes}; GiB of tensors at the peak, and planned: {found}")
        return sizes

    def _lowered(self, sizes: Batches, stage: str, name: str) -> Batches:
        """Returns the sizes with the next smaller one of a stage, and says so."""
        # A number that the user gave is its only candidate.
        present = getattr(sizes, name)
        smaller = next((size for size in getattr(self.plan.candidates, name) if size < present), None)
        if smaller is None:
            raise DoesNotFit(
                f"out of memory in a trial of the {stage} with {_FIELDS[name]}={present}, and there is nothing smaller "
                "to take; rlcm-fast plan says what fits"
            ).of_all()
        self.say(f"auto: {_FIELDS[name]}={present} is out of memory in a trial of the {stage}; trying {smaller}")
        return replace(sizes, **{name: smaller})

    def _peak(self, stage: str, sizes: Batches, planned: Memory, conditioning: Conditioning) -> int | None:
        """Runs one micro-batch of a stage; returns the most bytes of tensors, None if that is more than there is."""
        own = {"sampling": planned.sampling, "decoding": planned.decoding, "update": planned.activations}[stage]
        most = self.config.engine.memory_gib * GIB or float("inf")
        peak = None
        with nullcontext() if stage == "update" else self.backbone.decoding():
            later = planned.stages[stage] - planned.overhead - own - self.memory.allocated()  # not there yet
            try:
                with torch.compiler.set_stance("force_eager"):
                    peak = self.memory.peak(lambda: self._run(stage, sizes, conditioning), max(0, later))
            except torch.OutOfMemoryError:
                pass  # its traceback, which holds the tensors of the pass, is gone after this line
            self.memory.clear()
        return peak if peak is not None and peak + planned.overhead <= most else None

    def _run(self, stage: str, sizes: Batches, conditioning: Conditioning) -> None:
        """Runs one micro-batch of a stage."""
        policy = self.policy
        if stage == "update":
            self._differentiate(conditioning, sizes.update)
            return
        noise = SeededNoise.draw(sizes.rollout, policy.num_actions, self._generator(), policy.device)
        if stage == "sampling":
            policy.sample(_repeated(conditioning, sizes.rollout), noise)
            return
        num_decoded = min(sizes.decode or sizes.rollout, sizes.rollout)
        shape = (num_decoded, *policy.latent_shape_of(conditioning))
        self.backbone.rehearse_decoding(noise.take(slice(num_decoded)).first_states(1.0, shape))

    def _differentiate(self, conditioning: Conditioning, num_rows: int) -> None:
        """Runs the network on rows of an update forward and backward."""
        policy = self.policy
        shape = (num_rows, *policy.latent_shape_of(conditioning))
        noise = SeededNoise.draw(num_rows, policy.num_actions, self._generator(), policy.device)
        x_t = noise.first_states(policy.schedule.start_scale, shape)
        step = torch.arange(num_rows, device=policy.device) % max(1, policy.num_actions)
        network: Any = policy.unet
        with handing_over(network, lambda name, gradient: None) as trained:
            m = policy.network_output(x_t, step, _repeated(conditioning, num_rows))
            torch.autograd.grad((m * x_t).mean(), trained, allow_unused=True)

    def _conditioning(self) -> Conditioning:
        """Returns the conditioning (1 row) of an empty prompt, for the largest images of the run."""
        found = self.backbone.encode([Prompt("")], with_negative=self.policy.needs_negative, remember=False)
        sizes = self.config.model.sizes
        return found if not sizes else self.backbone.sized(found, max(sizes, key=lambda size: size[0] * size[1]))

    def _generator(self) -> torch.Generator:
        return parallel.generator(self.config.seed)


def _repeated(conditioning: Conditioning, num_rows: int) -> Conditioning:
    index = conditioning.index
    return conditioning.take(torch.zeros(num_rows, dtype=torch.int64, device=index.device))
