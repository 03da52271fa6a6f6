"""Measures how rewards pull on the weights they share: the norm of each reward's gradient and the cosine of any two.

    g_k = d/dweights of the algorithm's loss with the advantages that reward k adds (combining.py), on the transitions
          that task_gradients.py chooses, under the weights before the update

A cosine below 0 means that what helps one reward hurts the other; a small norm, that the others drown it.
"""

# B samples of this process, A of all

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.stages.rollout import Rollout
from rlcm_fast.stages.task_gradients import Gradient, TaskGradients, gradient_metrics


class RewardGradients:
    """Measures the gradients of tasks, and every so many iterations those of the rewards of each task."""

    def __init__(self, of_tasks: TaskGradients, parts: Callable[[], Mapping[str, Tensor]], every: int) -> None:
        """parts: returns what each reward adds to the last advantages (A,), by LABEL or TASK/LABEL.

        every: the number of iterations between measurements of rewards; 0 measures none.
        """
        self._of_tasks, self._parts, self._every = of_tasks, parts, every

    def __call__(self, batch: Rollout, sample_weights: Tensor, turn: Turn) -> dict[str, float]:
        """Returns the metrics of tasks and rewards that are due; sample_weights (B,) are the algorithm's."""
        metrics = self._of_tasks(batch, sample_weights, turn)
        if self._every == 0 or turn.iteration % self._every:
            return metrics
        with stage("task_gradients"):
            for task, gradients in self._by_task(batch, turn).items():
                for key, value in gradient_metrics(gradients).items():
                    metrics[f"gradient/{task}{key.removeprefix('gradient/')}"] = value
        return metrics

    def _by_task(self, batch: Rollout, turn: Turn) -> dict[str, dict[str, Gradient]]:
        """Returns the gradient of each reward, by `TASK/`, or `` without tasks, and by label."""
        rows = parallel.rows_of_this_process(len(batch.prompts))
        found: dict[str, dict[str, Gradient]] = {}
        for name, part in self._parts().items():
            task, slash, label = name.rpartition("/")
            weights = self._of_tasks.algorithm.sample_weights(part)[rows]
            if slash:
                of_task = [prompt.task for prompt in batch.prompts]
            else:
                of_task = [""] * len(batch.prompts)
            generator = turn.generator(Stream.TASK_GRADIENTS)  # the same transitions for each
            by_task = self._of_tasks.by_task(batch.trajectory, weights, of_task, generator)
            found.setdefault(f"{task}{slash}", {})[label] = by_task[task]
        return found
