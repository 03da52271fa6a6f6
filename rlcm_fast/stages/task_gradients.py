"""How tasks pull on the weights they share: the norm of each task's gradient, and the cosine between any two.

    g_task = d/dweights of the algorithm's loss on the task's chosen transitions, under the weights before the update

With task_schedule=by_task each task has an update of its own, so each gradient is under the weights that the tasks
before it in the iteration have left. A cosine below 0 says that what helps one task hurts the other. Measured now and
then in passes of its own, since an update has only their sum; averaged over processes. The KL term and the loss on real
images are left out.
"""

# N transitions of a task

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm
from rlcm_fast.config import UpdateConfig
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.stages.selection import Selection, step_weights
from rlcm_fast.trajectory import Trajectory

Gradient = list[Tensor]


def gradients_by_task(
    policy: GaussianPolicy,
    network: torch.nn.Module,
    algorithm: Algorithm,
    trajectory: Trajectory,
    weights: Tensor,
    tasks: Sequence[str],
    config: UpdateConfig,
    generator: torch.Generator,
) -> dict[str, Gradient]:
    """Each task's gradient, float32 on the CPU; weights (B,) and tasks (B) are those of the samples.

    policy: around `network` itself, not its engine, and with whole weights, so not under ZeRO-3.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    selection = Selection(trajectory.num_samples, trajectory.num_actions, config, algorithm.is_of_pairs, generator)
    rows = selection.rows
    sample, step = (part.to(weights.device) for part in (rows // trajectory.num_actions, rows % trajectory.num_actions))
    of_steps = step_weights(policy.schedule, config.step_weights).to(weights.device)
    signals = algorithm.signals(weights[sample], None, trajectory.num_actions) * of_steps[step]
    gradients = {}
    for task in dict.fromkeys(tasks):
        is_mine = torch.tensor([name == task for name in tasks])[rows // trajectory.num_actions]
        mine, own = rows[is_mine], signals[is_mine.to(signals.device)]
        total = [torch.zeros(parameter.shape) for parameter in trained]
        for places in torch.arange(len(mine)).split(config.micro_batch_size):
            loss = _loss(policy, algorithm, trajectory, mine[places], own[places.to(own.device)])
            for sum_, part in zip(total, torch.autograd.grad(loss * len(places) / len(mine), trained), strict=True):
                sum_ += part.float().cpu()
        gradients[task] = [parallel.mean(part) for part in total]
    return gradients


def gradient_metrics(gradients: dict[str, Gradient]) -> dict[str, float]:
    """`gradient/TASK/norm` of each and `gradient/TASK/OTHER/cosine` of any two."""
    norms = {task: math.sqrt(_dot(gradient, gradient)) for task, gradient in gradients.items()}
    metrics = {f"gradient/{task}/norm": norm for task, norm in norms.items()}
    for first, second in itertools.combinations(gradients, 2):
        product = norms[first] * norms[second]
        cosine = _dot(gradients[first], gradients[second]) / product if product > 0 else 0.0
        metrics[f"gradient/{first}/{second}/cosine"] = cosine
    return metrics


def _loss(policy: GaussianPolicy, algorithm: Algorithm, trajectory: Trajectory, rows: Tensor, signals: Tensor) -> Any:
    transitions = trajectory.transitions(rows)
    m = policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
    coef = policy.coefficients(transitions.step)
    return algorithm.loss_of_output(transitions.x_t, m, transitions.x_s, coef, None, signals)[0]


def _dot(first: Gradient, second: Gradient) -> float:
    return math.fsum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(first, second, strict=True))
