"""Compares a network that is compiled with the same network run eagerly, before anything is trained with it.

torch.compile has given wrong gradients beside right outputs (backbones/acceleration.py), which no metric would show. So
a run compares the output and the gradient of every trained weight on one micro-batch of an update's shape, which has to
be compiled anyway. If one differs by more than rounding, the run goes on with less and says so:

    engine.compile=whole    regional, which is not compared
    engine.compile=auto     regional, then off, each compared; also if the compiler raises an error or has no room. One
                            micro-batch of a rollout is compiled as well, which has a graph of its own

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
from torch._dynamo.exc import TorchDynamoException

from rlcm_fast import parallel
from rlcm_fast.backbones.acceleration import compile_unet, uncompiled
from rlcm_fast.faults import Fault, summary_of
from rlcm_fast.policies import DrawnNoise
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.trajectory import Conditioning

_OUTPUT = "its output"  # its name among the gradients
_LESS = {"whole": "regional", "regional": "off"}


class NotCompiled(Fault):
    """The compiler raised an error, and the config asks for what it was to compile."""


@dataclass
class CompileCheck:
    """Compares the passes of a network; the policy must be around the network itself, not around its engine."""

    policy: GaussianPolicy
    say: Callable[[str], None] = say  # prints a line on the main process
    mode: str = "whole"  # how the network is compiled
    is_auto: bool = False  # whether the config leaves that open
    backend: Any = "inductor"  # what compiles less, if need be
    limit: float = field(init=False)  # differences up to this are rounding

    def __post_init__(self) -> None:
        self.limit = 4 * math.sqrt(torch.finfo(self.policy.dtype).eps)

    def __call__(
        self, conditioning: Conditioning, seed: int, others: Sequence[Any] = (), sampled: Conditioning | None = None
    ) -> str:
        """Returns how the network is compiled from here on, and `others` with it: as before, or less.

        conditioning: of the N rows of a micro-batch. others: more networks that are compiled in the same way. sampled:
        conditioning of a rollout's micro-batch, if that is to be tried, too. All processes come to the same verdict,
        and every process must call this.

        Raises:
            NotCompiled: the compiler raised an error, and nothing is auto.
        """
        unet: Any = self.policy.unet
        with uncompiled(unet):
            eager = self._gradients(conditioning, seed)
        mode = self.mode
        while True:
            # Keep what is right on all processes.
            line, is_right = self._verdict(mode, eager, (conditioning, sampled), seed)
            if not parallel.any_rank(not is_right):
                self.say(line)
                return mode

            # Compile less; only auto looks whether that is right.
            less, what = _LESS[mode], "fails on another process" if is_right else line
            for network in (unet, *others):
                compile_unet(network, less, self.backend)
            self.say(f"engine.compile={mode} {what}: going on with engine.compile={less}")
            mode = less
            if mode == "off" or not self.is_auto:
                return mode

    def _verdict(
        self, mode: str, eager: dict[str, Tensor], shapes: tuple[Conditioning, Conditioning | None], seed: int
    ) -> tuple[str, bool]:
        """Compiles, and says what was found and whether that is right; this process's verdict alone."""
        # Compile for an update and for a rollout.
        (conditioning, sampled), start = shapes, time.perf_counter()
        try:
            differences = self._differences(conditioning, seed, eager)
            if sampled is not None:
                with torch.no_grad():
                    self._output(sampled, seed)
        except Exception as error:
            if self.is_auto:
                return f"does not work ({summary_of(error)})", False
            if isinstance(error, TorchDynamoException):
                raise NotCompiled(
                    f"engine.compile={mode} does not work ({summary_of(error)}); set engine.compile=auto, which goes "
                    "on without what does not work"
                ) from error
            raise

        # Compare.
        seconds = time.perf_counter() - start
        wrong = {name: value for name, value in differences.items() if not value <= self.limit}  # not: NaN
        if wrong:
            return _complaint(wrong, len(eager)), False
        return (
            f"compiled in {seconds:.0f} s: the gradients of all {len(eager) - 1} trained weights equal the "
            f"uncompiled network's within {max(differences.values()):.1e}"
        ), True

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
        m, noise = self._output(conditioning, seed)
        take(_OUTPUT, m.detach())
        network: Any = self.policy.unet
        with handing_over(network, take) as trained:
            torch.autograd.grad((m * noise.actions[0]).mean(), trained, allow_unused=True)

    def _output(self, conditioning: Conditioning, seed: int) -> tuple[Tensor, DrawnNoise]:
        """Runs the network on N rows forward; returns its output (N, C, H, W) and the noise."""
        policy, num_rows = self.policy, len(conditioning.index)
        shape = (num_rows, *policy.latent_shape)
        noise = DrawnNoise.draw(shape, 1, parallel.generator(seed), policy.device)
        x_t = noise.first_states(policy.schedule.start_scale, shape)
        step = torch.arange(num_rows, device=policy.device) % policy.num_steps
        return policy.network_output(x_t, step, conditioning), noise


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
    worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
    return (
        f"differs from the uncompiled network in {len(wrong)} of {num_compared} tensors (output and gradients), most "
        f"in {worst}, by {wrong[worst]:.1e} of it"
    )
