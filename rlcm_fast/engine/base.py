"""An engine owns the trained weights, their gradients and the optimizer, behind a few verbs.

    begin_update(n) -> n times: engine(x, ...) -> loss -> backward(loss) -> step()      [full_weights, save, load]

Everything else (VAE, text encoder, rewards, the frozen reference) is plain torch and never partitioned. zero.py is
DeepSpeed, which shares out and keeps float32 master weights; direct.py needs neither, for bfloat16 weights without a
master and for an optimizer that steps within the backward pass. Which one a config asks for: rlcm_fast/build.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UpdatePlan:
    """The updates that an engine is built for."""

    num_micro_batches: int  # of one update on each process, at most
    num_updates: int  # of the run, for the learning rate
    max_grad_norm: float  # 0 is off
    micro_batch_size: int = 1  # transitions; only DeepSpeed asks for it, nothing depends on it


class Engine(ABC):
    """The trained network; call it like the network."""

    zero_stage: int

    @abstractmethod
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The network's output."""

    @abstractmethod
    def begin_update(self, num_micro_batches: int) -> None:
        """This update and those after it are of so many backward passes on each process, at most as built for."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (), which is what a micro-batch contributes to the loss of the update."""

    @abstractmethod
    def step(self) -> float | None:
        """Ends a micro-batch; an update's last one takes the optimizer step and returns the norm before clipping."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """Of the next update."""

    def metrics(self) -> dict[str, float]:
        """What the engine itself measured since it was last asked."""
        return {}

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU in float32, gathered under ZeRO-3; every rank must call, the result is the same."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the trained weights and optimizer state, nothing of what is frozen; every rank must call."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, with the same settings on any number of processes.

        Raises:
            ValueError: nothing of the kind is there, it is of other weights, or its states cannot be shared out among
                other processes.
        """


def copied_to_cpu(network: nn.Module) -> dict[str, Tensor]:
    """Its weights by name, float32 and contiguous, as files hold them."""
    contiguous = torch.contiguous_format
    weights = network.state_dict().items()
    return {name: weight.detach().float().cpu().clone(memory_format=contiguous) for name, weight in weights}


def frozen_names(network: nn.Module) -> set[str]:
    """Of the weights that no update changes: those of the start model, under adapters."""
    return {name for name, weight in network.named_parameters() if not weight.requires_grad}


def load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Loads a state_dict that may be without frozen weights, which then stay as they are.

    DeepSpeed names the arguments.
    """
    own, frozen = dst.state_dict(), frozen_names(dst)
    odd = (own.keys() - frozen - src.keys()) | (src.keys() - own.keys())
    odd |= {name for name in src.keys() & own.keys() if src[name].shape != own[name].shape}
    if odd:
        raise ValueError(
            f"resume: the checkpoint and this run do not train the same weights ({min(odd)} for one); keep the model "
            "and the settings of lora that it was saved with"
        )
    dst.load_state_dict({name: own[name] for name in frozen} | dict(src))
