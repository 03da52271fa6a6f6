"""Compares a network that is compiled whole with the same network run eagerly, before anything is trained with it.

torch.compile has given wrong gradients beside right outputs (backbones/acceleration.py), which no metric would show. So
a run compares the output and the gradient of every trained weight on one micro-batch of an update's shape, which has to
be compiled anyway. If one differs by more than rounding, the run goes on with engine.compile=regional and says so.

    difference of a tensor = |compiled - eager| / (|eager| + 1e-3 sqrt(n) r)

where n is its number of elements and r the root mean square of all gradients: one that is tiny beside all others is
made of rounding. Rounding moves the difference by up to ROUNDING; a gradient that is zero or has another sign, 1 or 2.
"""

# N rows of a micro-batch

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast import parallel
from rlcm_fast.backbones.acceleration import compile_blocks, uncompiled
from rlcm_fast.policies import DrawnNoise
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.trajectory import Conditioning

_OUTPUT = "its output"  # its name among the gradients


@dataclass
class CompileCheck:
    """Compares the passes of a network; the policy must be around the network itself, not around its engine."""

    policy: GaussianPolicy
    say: Callable[[str], None] = say  # prints a line on the main process
    limit: float = field(init=False)  # differences up to this are rounding

    def __post_init__(self) -> None:
        self.limit = 4 * math.sqrt(torch.finfo(self.policy.dtype).eps)

    def __call__(self, conditioning: Conditioning, seed: int, others: Sequence[Any] = ()) -> bool:
        """Tells whether the network may stay compiled whole; if not, its blocks are compiled instead, and of `others`.

        conditioning: of the N rows of a micro-batch. others: more networks that are compiled in the same way. All
        processes come to the same verdict, and every process must call this.
        """
        unet: Any = self.policy.unet
        with uncompiled(unet):
            eager = self._gradients(conditioning, seed)
        start = time.perf_counter()
        differences = self._differences(conditioning, seed, eager)
        seconds = time.perf_counter() - start
        wrong = {name: value for name, value in differences.items() if not value <= self.limit}  # not: NaN
        if not parallel.any_rank(bool(wrong)):
            self.say(
                f"compiled in {seconds:.0f} s: the gradients of all {len(eager) - 1} trained weights equal the "
                f"uncompiled network's within {max(differences.values()):.1e}"
            )
            return True
        for network in (unet, *others):
            compile_blocks(network)
        self.say(f"engine.compile=whole {_complaint(wrong, len(eager))}: going on with engine.compile=regional")
        return False

    def _gradients(self, conditioning: Conditioning, seed: int) -> dict[str, Tensor]:
        """Returns the output and the gradient of each trained weight, by name, on the CPU in their own dtypes."""
        found: dict[str, Tensor] = {}
        self._run(conditioning, seed, lambda name, value: found.__setitem__(name, value.cpu()))
        return found

    def _differences(self, conditioning: Conditioning, seed: int, eager: dict[str, Tensor]) -> dict[str, float]:
        """Returns the difference of the output and of each gradient from `eager`, by name."""
        # Measure what a usual gradient is.
        squares = [value.float().square().sum() for name, value in eager.items() if name != _OUTPUT]
        num_elements = sum(value.numel() for name, value in eager.items() if name != _OUTPUT)
        rms = math.sqrt(sum(square.item() for square in squares) / num_elements)

        # Compare each with its like as soon as the backward pass has it.
        found = dict.fromkeys(eager, torch.tensor(math.inf))

        def compare(name: str, value: Tensor) -> None:
            if name not in eager:  # the loss does not depend on this weight, and the compiled pass returns zeros
                return
            like = eager[name].to(value.device).float()
            scale = like.norm() + (0.0 if name == _OUTPUT else 1e-3 * math.sqrt(like.numel()) * rms)
            found[name] = (value.float() - like).norm() / scale

        self._run(conditioning, seed, compare)
        return {name: value.item() for name, value in found.items()}

    def _run(self, conditioning: Conditioning, seed: int, take: Callable[[str, Tensor], None]) -> None:
        """Runs the network on N rows forward and backward; hands over the output and each weight's gradient."""
        policy, num_rows = self.policy, len(conditioning.index)
        shape = (num_rows, *policy.latent_shape)
        noise = DrawnNoise.draw(shape, 1, parallel.generator(seed), policy.device)
        x_t = noise.first_states(policy.schedule.start_scale, shape)
        step = torch.arange(num_rows, device=policy.device) % policy.num_steps
        m = policy.network_output(x_t, step, conditioning)
        take(_OUTPUT, m.detach())
        network: Any = policy.unet
        with handing_over(network, take) as trained:
            torch.autograd.grad((m * noise.actions[0]).mean(), trained, allow_unused=True)


@contextmanager
def handing_over(network: nn.Module, take: Callable[[str, Tensor], None]) -> Iterator[list[nn.Parameter]]:
    """Hands each trained weight's gradient to `take` inside the block, and keeps none: there may be no room for all."""

    def hook(name: str, gradient: Tensor) -> Tensor:
        take(name, gradient.detach())
        return gradient.new_zeros(()).expand_as(gradient)  # which needs no memory

    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    handles = [weight.register_hook(partial(hook, name)) for name, weight in trained.items()]
    try:
        yield list(trained.values())
    finally:
        for handle in handles:
            handle.remove()


def _complaint(wrong: dict[str, float], num_compared: int) -> str:
    if not wrong:
        return "gives wrong gradients on another process"
    worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
    return (
        f"differs from the uncompiled network in {len(wrong)} of {num_compared} tensors (output and gradients), most "
        f"in {worst}, by {wrong[worst]:.1e} of it"
    )
