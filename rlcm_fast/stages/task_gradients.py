"""Measures how tasks pull on the weights they share: the norm of each task's gradient and the cosine of any two.

    g_task = d/dweights of the algorithm's loss on the task's chosen transitions, under the weights before the update

With task_schedule=by_task each task has a separate update, so its gradient is taken under the weights that the earlier
tasks of the iteration have left. A cosine below 0 means that what helps one task hurts the other. An update only has
the sum of the gradients, so they are measured now and then in separate passes, and averaged over processes. They leave
out the KL term and the loss on real images.
"""

# B samples, N transitions of a task

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm, Outputs
from rlcm_fast.config import UpdateConfig
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.stages.rollout import Rollout
from rlcm_fast.stages.selection import Selection, step_weights
from rlcm_fast.trajectory import AnyTrajectory, micro_batches

Gradient = list[Tensor]


class TaskGradients:
    """Measures the gradients every so many iterations, once all tasks have had their turn."""

    def __init__(
        self, policy: GaussianPolicy, algorithm: Algorithm, config: UpdateConfig, every: int, num_tasks: int
    ) -> None:
        """policy: must be around the network, not its engine, and hold whole weights, so ZeRO-3 does not work.

        every: the number of iterations between measurements; 0 measures nothing.
        """
        assert isinstance(policy.unet, torch.nn.Module)
        self._policy, self.algorithm, self._config = policy, algorithm, config
        self._trained = [parameter for parameter in policy.unet.parameters() if parameter.requires_grad]
        self._every, self._num_tasks = every, num_tasks
        self._found: dict[str, Gradient] = {}  # of this iteration's rounds so far

    def __call__(self, batch: Rollout, sample_weights: Tensor, turn: Turn) -> dict[str, float]:
        """Returns `gradient_metrics` if a measurement is due, else nothing; sample_weights (B,) are the algorithm's."""
        if self._every == 0 or turn.iteration % self._every:
            return {}
        generator = turn.generator(Stream.TASK_GRADIENTS)
        names = [prompt.task for prompt in batch.prompts]
        with stage("task_gradients"):
            self._found |= self.by_task(batch.trajectory, sample_weights, names, generator)
        if len(self._found) < self._num_tasks:
            return {}
        gradients, self._found = self._found, {}
        return gradient_metrics(gradients)

    def by_task(
        self, trajectory: AnyTrajectory, sample_weights: Tensor, tasks: Sequence[str], generator: torch.Generator
    ) -> dict[str, Gradient]:
        """Returns each task's gradient, float32 on the CPU; sample_weights (B,) and tasks (B) belong to the samples."""
        # Choose transitions as an update would, and compute the signal of each.
        sample_weights = sample_weights.to(self._policy.device)
        rows = Selection(trajectory, self._config, self.algorithm.samples_together, generator).rows  # (N,)
        sample, step = rows // trajectory.num_actions, rows % trajectory.num_actions
        weights = sample_weights[sample.to(sample_weights.device)]  # (N,)
        unchanged = torch.zeros_like(weights)
        signals = self.algorithm.signals(weights, lambda: unchanged, trajectory.num_actions)
        of_steps = step_weights(self._policy.schedule, self._config.step_weights).to(weights.device)
        signals = signals * of_steps[step.to(weights.device)]

        # Differentiate the loss of each task's transitions, and average over processes.
        gradients = {}
        for task in dict.fromkeys(tasks):
            is_of_task = torch.tensor([name == task for name in tasks])[sample]
            gradient = self._gradient(trajectory, rows[is_of_task], signals[is_of_task.to(signals.device)])
            gradients[task] = [parallel.mean(part) for part in gradient]
        return gradients

    def _gradient(self, trajectory: AnyTrajectory, rows: Tensor, signals: Tensor) -> Gradient:
        """Returns d(mean loss of the transitions rows (N,)) / d(network weights), computed in micro-batches."""
        total = [torch.zeros(parameter.shape) for parameter in self._trained]
        for places in micro_batches(trajectory, rows, self._config.micro_batch_size):
            loss = self._loss(trajectory, rows[places], signals[places.to(signals.device)])
            parts = torch.autograd.grad(loss * len(places) / len(rows), self._trained)
            for sum_, part in zip(total, parts, strict=True):
                sum_ += part.float().cpu()
        return total

    def _loss(self, trajectory: AnyTrajectory, rows: Tensor, signals: Tensor) -> Tensor:
        transitions = trajectory.transitions(rows)
        m = self._policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
        outputs = Outputs(m, self._policy.coefficients(transitions.step))
        loss, _ = self.algorithm.loss_of_output(transitions, outputs, None, signals)
        return loss


def gradient_metrics(gradients: dict[str, Gradient]) -> dict[str, float]:
    """Returns `gradient/TASK/norm` of each task and `gradient/TASK/OTHER/cosine` of any two."""
    norms = {task: math.sqrt(_dot(gradient, gradient)) for task, gradient in gradients.items()}
    metrics = {f"gradient/{task}/norm": norm for task, norm in norms.items()}
    for first, second in itertools.combinations(gradients, 2):
        product = norms[first] * norms[second]
        cosine = _dot(gradients[first], gradients[second]) / product if product > 0 else 0.0
        metrics[f"gradient/{first}/{second}/cosine"] = cosine
    return metrics


def _dot(first: Gradient, second: Gradient) -> float:
    return math.fsum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(first, second, strict=True))
