"""What one process of matrix.py does: it trains cells, each by the real trainer, and judges them.

A cell is two iterations of `rlcm_fast.trainer.Trainer` on a random pipeline of 30,000 weights: an update of two
micro-batches each (one in the backward pass), the KL term included, a checkpoint after each, and an export. Then

  - what is trained has moved and is finite, and with adapters nothing else has moved
  - all processes hold the same weights, bit for bit
  - a second run that resumes from the first checkpoint ends with the same weights, bit for bit
  - the weights are those of `replayed`: torch's own AdamW or Adam on the same rollouts, on one process, all transitions
    of a process in one batch, with float32 master weights. How far apart the two may be is `bound`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from rlcm_fast import parallel
from rlcm_fast.algorithms import PPO, Outputs
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config
from rlcm_fast.kernels import functional
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Trajectory

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Share:
    """What one process trained on in one iteration."""

    lr: float
    trajectory: Trajectory
    advantages: Tensor  # (B,)


@dataclass(frozen=True)
class Verdict:
    """How a cell went."""

    wrong: str  # empty where nothing is
    off_reference: float  # distance from the replay's weights, as a share of the way that those went


def serve(connection: Connection) -> int:
    """Trains each config that comes until None does; an error ends the process, and the log has it."""
    for config in iter(connection.recv, None):
        connection.send(train_cell(config))
    return 0


def bound(config: Config) -> float:
    """Largest `off_reference`: in float32 what the order of sums makes, else what 8-bit states or bfloat16 do.

    A backward pass in bfloat16 rounds differently with other micro-batches, and with ZeRO-3's hooks: the gradients of
    adapters at stages 2 and 3 are 0.4 % apart, and each 3.3 % from those of the same weights in float32.
    """
    is_exact = config.optimizer.name in ("adamw", "adam") and config.engine.dtype == "fp32"
    return 1e-4 if is_exact else 0.1


def train_cell(config: Config) -> Verdict:
    """Trains, replays (on one process) and resumes; every process of the run must call, and each judges."""
    # Train, then replay what was trained on and resume from the first checkpoint.
    trainer = Trainer(config)
    shares = _watch(trainer)
    start = trainer.engine.full_weights()
    trainer.run()
    weights = trainer.engine.full_weights()
    off = _off_reference(config, start, weights, shares) if parallel.is_main() else 0.0
    checkpoint = Path(config.run_dir) / "checkpoints" / "iteration_000001"
    resumed = Trainer(replace(config, resume=str(checkpoint)))
    resumed.run()

    # Judge the weights.
    trained = {name for name in start if config.lora.rank == 0 or ".lora_" in name}
    moved = {name for name in start if not torch.equal(weights[name], start[name])}
    faults = {
        "a weight is not finite": not all(weight.isfinite().all() for weight in weights.values()),
        "a trained weight did not move": not trained <= moved,
        "a frozen weight moved": not moved <= trained,
        "processes hold other weights": not _is_same_everywhere(weights),
        "a resumed run ends elsewhere": not _is_equal(weights, resumed.engine.full_weights()),
        f"{off:.1e} of the way off the reference": not off <= bound(config),
    }
    return Verdict("; ".join(text for text, is_so in faults.items() if is_so), off)


def _off_reference(config: Config, start: Weights, weights: Weights, shares: Sequence[Sequence[Share]]) -> float:
    reference = replayed(config, start, shares)
    return distance(reference, weights) / distance(reference, start)


def replayed(config: Config, start: Weights, shares: Sequence[Sequence[Share]]) -> Weights:
    """What torch alone makes of the same rollouts, by name and rounded to the trained dtype; `shares`: by iteration."""
    # The start weights twice: to train, and to keep for the KL term.
    dtype = torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16
    backbone = Backbone.load(config.model, torch.device("cpu"), dtype, kind="consistency")
    if config.lora.rank > 0:
        backbone.add_adapters(config.lora)
    network: nn.Module = backbone.unet
    network.load_state_dict(start)
    before = _policy(config, backbone, copy.deepcopy(network).requires_grad_(False))
    policy = _policy(config, backbone, network)

    # float32 masters, which torch's optimizer steps.
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    masters = [weight.detach().float().clone().requires_grad_() for weight in trained.values()]
    kind = Adam if config.optimizer.name == "adam" else AdamW
    settings: dict[str, Any] = {"eps": config.optimizer.eps, "weight_decay": config.optimizer.weight_decay}
    optimizer = kind(masters, **settings)

    # An update an iteration, on all transitions of a process at once.
    for of_iteration in shares:
        for share in of_iteration:
            (_loss(config, policy, before, share) / len(of_iteration)).backward()
        for master, weight in zip(masters, trained.values()):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, config.update.max_grad_norm)
        optimizer.param_groups[0]["lr"] = of_iteration[0].lr
        optimizer.step()
        for master, weight in zip(masters, trained.values()):
            weight.data.copy_(master)
    return {name: weight.detach().float() for name, weight in trained.items()}


def distance(first: Weights, second: Weights) -> float:
    """The Euclidean distance over all names of the first."""
    apart = [(weight - second[name]).flatten() for name, weight in first.items()]
    return torch.cat(apart).norm().item()


def _watch(trainer: Trainer) -> list[list[Share]]:
    """Fills up, an iteration each, with what all processes trained on."""
    shares: list[list[Share]] = []

    update = trainer.updater.update

    def watched(trajectory: Trajectory, weights: Tensor, *more: Any) -> Any:
        shares.append(parallel.all_gather_list([Share(trainer.engine.lr, trajectory, weights)]))
        return update(trajectory, weights, *more)

    trainer.updater.update = watched  # type: ignore[method-assign]
    return shares


def _policy(config: Config, backbone: Backbone, network: Any) -> GaussianPolicy:
    unet_config: Any = backbone.unet.config
    return build_policy(config.policy, Network(network, unet_config, backbone.dtype), backbone.scheduler_config)


def _loss(config: Config, policy: GaussianPolicy, before: GaussianPolicy, share: Share) -> Tensor:
    t = share.trajectory.transitions(torch.arange(share.trajectory.num_transitions))
    m, coef = policy.network_output(t.x_t, t.step, t.conditioning), policy.coefficients(t.step)
    algorithm = PPO(clip_range=config.update.clip_range, advantage_clip=config.update.advantage_clip)
    weights = algorithm.sample_weights(share.advantages)
    loss, _ = algorithm.loss_of_output(t, Outputs(m, coef), None, weights[t.sample])
    m_ref = before.network_output(t.x_t, t.step, t.conditioning)
    return loss + config.update.kl_weight * functional.gaussian_kl(m, m_ref, coef).mean()


def _is_same_everywhere(weights: Weights) -> bool:
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    copies = parallel.all_gather(flat).view(parallel.world_size(), -1)  # (processes, weights)
    return bool((copies == copies[0]).all())


def _is_equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
