"""Samples a batch of trajectories, decodes them to images and scores these; no gradients.

    prompts -> conditioning -> [sample -> decode -> submit to the reward workers] per micro-batch -> gather

The images of a micro-batch have one size; several sizes (image_sizes.py) make a MixedTrajectory.
Worker threads compute the rewards while the next micro-batch is sampled. The time that is left to wait is measured.
Before it decodes a micro-batch, the rollout waits if too many others still wait for scores: they would fill the memory.

A micro-batch that is out of memory is drawn again with half the images if its size was `auto` and there is one process.
Noise does not depend on micro-batches, and nothing of it was kept.

With update.rollout_lag=1, the next round is drawn before this one's rewards are waited for: `upcoming` says what it is.
Its images are then of the weights before this round's update, and their log-probs, too, as the ratio needs them.

A reward that fails on one process ends the rollout on all of them, once all have drawn their images. An image without a
score (on_failure: skip) stays in the rollout; its total is NaN, and it gets no advantage.
"""

# B samples of this process

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlcm_fast import parallel
from rlcm_fast.algorithms import Scores
from rlcm_fast.config import RolloutConfig
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.policies import SeededNoise
from rlcm_fast.rewards import Offloading, Rewards, Skipping
from rlcm_fast.rewards.task_rewards import Submitted, TaskRewards
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.constant_rewards import ConstantRewards
from rlcm_fast.stages.image_sizes import ImageSizes, joined
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.kept_rounds import KeptRounds, Piece
from rlcm_fast.tasks import Tasks
from rlcm_fast.trajectory import AnyTrajectory, Conditioning, Prompt, Trajectory


@dataclass(frozen=True)
class Rollout:
    """A batch of images: their prompts, trajectories and rewards, and the seconds that they took."""

    prompts: Sequence[Prompt]  # len B
    trajectory: AnyTrajectory
    rewards: dict[str, Rewards]  # by task, in the order of the samples
    seconds: float  # sampling, decoding and waiting for rewards
    num_skipped: int | None = None  # images without a score, on all processes; None if no reward may fail

    @property
    def total(self) -> Tensor:
        """The reward of each sample, (B,) float32 on the CPU: the sum of weight * score; NaN if a score is missing."""
        return torch.cat([rewards.total for rewards in self.rewards.values()])

    @property
    def by_reward(self) -> Tensor:
        """The score of each sample by each of its task's rewards, (B, M) float32; 0 where its task has fewer."""
        columns = [torch.stack(list(rewards.by_name.values()), dim=1) for rewards in self.rewards.values()]
        width = max(of_task.shape[1] for of_task in columns)
        return torch.cat([pad(of_task, (0, width - of_task.shape[1])) for of_task in columns])

    def gathered(self) -> tuple[Scores, list[Prompt]]:
        """Returns the scores and the prompts of all A samples of all processes; every rank must call this."""
        scores = Scores(parallel.all_gather(self.total), parallel.all_gather(self.by_reward))
        return scores, parallel.all_gather_list(list(self.prompts))

    @property
    def wait_seconds(self) -> float:
        return sum(rewards.wait_seconds for rewards in self.rewards.values())

    def metrics(self, has_tasks: bool) -> dict[str, float]:
        """Returns the mean and standard deviation of each reward and of the weighted sum, over all processes.

        Keys are reward/NAME/mean; with `has_tasks` they are reward/TASK/NAME/mean. Images without a score do not count.
        """
        metrics: dict[str, float] = {} if self.num_skipped is None else {"skipped_images": float(self.num_skipped)}
        for task, rewards in self.rewards.items():
            prefix = f"reward/{task}" if has_tasks else "reward"
            for name, values in {**rewards.values, "total": rewards.total}.items():
                metrics |= mean_and_std(f"{prefix}/{name}", parallel.all_gather(values))
        return metrics

    def timings(self) -> dict[str, float]:
        return {"seconds/rollout": self.seconds, "seconds/reward_wait": self.wait_seconds}


def mean_and_std(key: str, values: Tensor) -> dict[str, float]:
    """Returns KEY/mean and KEY/std of the values (N,) that are there; nothing if all are missing (NaN)."""
    known = values[~values.isnan()].double()
    if len(known) == 0:
        return {}
    return {f"{key}/mean": known.mean().item(), f"{key}/std": known.std(correction=0).item()}


@dataclass(frozen=True)
class Drawn:
    """A round whose rewards are being computed."""

    turn: Turn
    trajectory: AnyTrajectory
    submitted: Submitted


@dataclass(frozen=True)
class Upcoming:
    """The rounds to come of a run."""

    tasks: Tasks
    num_iterations: int

    def __call__(self, turn: Turn) -> tuple[Turn, list[Prompt]] | None:
        """Returns the turn after `turn` and its prompts; None after the last."""
        after = turn.following
        if after.iteration >= self.num_iterations:
            return None
        return after, self.tasks.upcoming_batch(self.tasks.rounds[after.round])


@dataclass
class Collector:
    """Makes rollouts; holds what stays the same from one rollout to the next."""

    images: TextToImage
    rewards: TaskRewards
    config: RolloutConfig
    offloading: Offloading = field(default_factory=Offloading)  # models of rewards that are away between rollouts
    sizes: ImageSizes = field(default_factory=ImageSizes)
    may_lower: bool = False  # draws fewer images at once if the device is out of memory
    say: Callable[[str], None] = say  # prints a line on the main process
    constants: ConstantRewards = field(default_factory=ConstantRewards)
    upcoming: Callable[[Turn], tuple[Turn, list[Prompt]] | None] = lambda turn: None  # what to draw in advance
    kept: KeptRounds | None = None  # rounds that outlive the process, with their micro-batches
    size: int = field(init=False)  # images that are drawn at once
    _ahead: Drawn | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.size = self.config.micro_batch_size

    def rollout(self, prompts: Sequence[Prompt], turn: Turn, may_stop: Callable[[], None] = lambda: None) -> Rollout:
        """Draws and scores one image for each of the B prompts, in their order.

        may_stop: is called before every micro-batch and while it waits for rewards; stopping there loses nothing.
        Raises a Fault, on all processes together, if a reward fails and may not.
        """
        # Draw the images, and perhaps those of the next round; the reward workers score meanwhile.
        began = time.perf_counter()
        with self.offloading.in_use(), self.images.decoding():
            drawn, self._ahead = self._ahead, None
            if drawn is None or drawn.turn != turn:
                drawn = self._draw(prompts, turn, may_stop)
            following = self.upcoming(turn)
            if following is not None:
                self._ahead = self._draw(following[1], following[0], may_stop)

            # Wait for the rewards that are still missing.
            with stage("reward_wait"):
                rewards = parallel.together(lambda: self.rewards.gather(turn.iteration, may_stop, drawn.submitted))
        self.constants.look(rewards, turn.iteration, self.rewards.of_persons)
        num_skipped = self._num_skipped(rewards, turn.iteration) if self.rewards.may_skip else None
        return Rollout(prompts, drawn.trajectory, rewards, time.perf_counter() - began, num_skipped)

    def _draw(self, prompts: Sequence[Prompt], turn: Turn, may_stop: Callable[[], None]) -> Drawn:
        """Draws a round, or takes up one that an earlier start has drawn, and submits its images to the rewards."""
        # Encode each prompt once, and draw the seeds of the noise; images of a prompt may share the first one.
        policy = self.images.policy
        conditioning = self.images.encode(prompts)
        noise = SeededNoise.draw(len(prompts), policy.num_actions, turn.generator(Stream.ROLLOUT), policy.device)
        if self.config.shared_noise:
            noise = noise.shared_by(conditioning.index)

        # Sample and decode micro-batch by micro-batch, each of one image size; the reward workers score meanwhile.
        kept = self.kept.load(turn, prompts) if self.kept else None
        runs = self.sizes.runs(len(prompts), turn)
        parts: list[list[Trajectory]] = []
        pieces: list[Piece] = []
        for run in runs:
            of_size = self.images.sized(conditioning, run.size)
            parts.append([])
            left = run.rows
            while len(left) > 0:
                may_stop()
                neighbours = left[: self.size]
                rows = slice(int(neighbours[0]), int(neighbours[-1]) + 1)
                if kept is None:
                    drawn = self._drawn(of_size.take(rows), noise.take(rows), may_stop)
                else:
                    drawn = self._decoded(kept.piece(len(pieces), of_size.take(rows)), may_stop)
                if drawn is None:
                    continue  # with fewer
                piece, images = drawn
                pieces.append(piece)
                self.rewards.submit(images, prompts[rows])
                parts[-1].append(piece[0])
                left = left[len(neighbours) :]

        # Keep the round, and join its micro-batches.
        if self.kept and kept is None:
            self.kept.save(turn, prompts, pieces)
        return Drawn(turn, joined(runs, parts), self.rewards.detach(turn.iteration))

    def _drawn(
        self, conditioning: Conditioning, noise: SeededNoise, may_stop: Callable[[], None]
    ) -> tuple[Piece, Tensor] | None:
        """Draws a micro-batch and decodes its images; None if the device is out of memory: then `size` is smaller."""
        num_images = len(conditioning.index)
        try:
            return self._decoded(self.images.explore(conditioning, noise), may_stop)
        except torch.OutOfMemoryError:
            if not self.may_lower or num_images == 1:
                raise
        # Its traceback, which holds the tensors of the pass, is gone here.
        self.size = num_images // 2
        self.say(
            f"a rollout's micro-batch of {num_images} images is out of memory; going on with {self.size} at once. A "
            f"resumed run needs --rollout.micro_batch_size {self.size}"
        )
        if self.images.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _decoded(self, piece: Piece, may_stop: Callable[[], None]) -> tuple[Piece, Tensor]:
        """Returns a micro-batch and its images (B, 3, H, W), once few enough others wait for scores."""
        with stage("reward_wait"):
            self.rewards.wait_for_room(may_stop)
        return piece, self.images.decode(piece[1])

    def _num_skipped(self, rewards: dict[str, Rewards], iteration: int) -> int:
        """Counts the images without a score, on all processes, and says so; raises a Fault if they are too many."""
        # Count them on all processes.
        totals = torch.cat([of_task.total for of_task in rewards.values()])
        problems = [problem for of_task in rewards.values() for problem in of_task.problems]
        skipped = parallel.all_gather(totals).isnan()
        problems = parallel.all_gather_list(problems)
        num_skipped, num_images = int(skipped.sum()), len(skipped)
        if num_skipped == 0:
            return 0

        # Every process comes to the same verdict.
        Skipping(share=self.config.max_skipped).check(num_skipped, num_images, f"iteration {iteration}", problems)
        say(f"iteration {iteration} skipped {num_skipped} of {num_images} images: {problems[-1]}")
        return num_skipped
