"""How much of a GPU the weights of rewards take, known before they load.

The networks of the same model, dtype and device count once, as they load once (towers.py). Sizes are those of the
default models. Activations are left out: a tower runs on `batch_size` images at once, without gradients, while no
update runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlcm_fast.rewards.models import DTYPES, files_of, with_defaults


@dataclass(frozen=True)
class Held:
    """A network on a GPU."""

    num_bytes: int
    gflops: float  # of a pass on one image or prompt
    dtype: str  # fp32, bf16 or fp16
    is_offloaded: bool = False  # it is on the GPU in rollouts and evaluations only


@dataclass(frozen=True)
class RewardLoad:
    """What the built-in rewards take of one GPU."""

    always: int = 0  # bytes of weights that stay
    offloaded: int = 0  # bytes of weights that are there in rollouts and evaluations only
    fp32_gflops: float = 0.0  # of an image of the rollout, with its prompt
    half_gflops: float = 0.0  # the same, in bf16 or fp16

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.always + self.offloaded

    @staticmethod
    def of(networks: Iterable[Held], trained: Iterable[Held]) -> RewardLoad:
        """Sums up networks; `trained` are those that score the images of a rollout."""
        held, passes = list(networks), list(trained)
        return RewardLoad(
            always=sum(network.num_bytes for network in held if not network.is_offloaded),
            offloaded=sum(network.num_bytes for network in held if network.is_offloaded),
            fp32_gflops=sum(network.gflops for network in passes if network.dtype == "fp32"),
            half_gflops=sum(network.gflops for network in passes if network.dtype != "fp32"),
        )


def gpu_networks(factory: Any, arguments: Mapping[str, Any], num_processes: int = 1) -> dict[tuple[str, ...], Held]:
    """Each network that `factory`, a reward's class, holds with `arguments` on a GPU of one of `num_processes`.

    The key is the same for networks that are shared. Empty for a reward on the CPU, on a GPU that trains nothing, or on
    no models. A network on cuda:N is there once for each process.
    """
    given = with_defaults(factory, arguments)
    if given is None:
        return {}
    of_part_on_models = given.get("embedding_arguments") or given.get("classifier_arguments") or {}
    placed = given if "device" in given else of_part_on_models
    dtype, device = placed.get("dtype", "fp32"), placed.get("device", "same")
    number = int(device.removeprefix("cuda:")) if re.fullmatch(r"cuda:\d+", str(device)) else None
    if device == "cpu" or dtype not in DTYPES or (number is not None and number >= num_processes):
        return {}
    copies = 1 if number is None else num_processes
    where = "same" if num_processes == 1 else device
    held = {}
    for files in files_of(factory, arguments):
        for part in files.weights.parts:
            of_part = part.dtype or dtype
            num_bytes = round(part.million_parameters * 1e6) * DTYPES[of_part].itemsize
            network = Held(copies * num_bytes, copies * part.gflops, of_part)
            held[(files.source, part.name, of_part, where)] = network
    return held
