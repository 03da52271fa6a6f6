"""Scores each image of a round with the rewards of its task; tasks share threads, and may share rewards.

rollout -> submit, detach -> gather -> scores by task
"""

# B images of a micro-batch

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rlcm_fast.config import RolloutConfig
from rlcm_fast.rewards import (
    Call,
    DecodedImages,
    PersonReward,
    Reward,
    Rewards,
    RewardService,
    RunPlace,
    Skipping,
    SubmittedBatch,
    Workers,
)
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Submitted:
    """The images of a round that are being scored."""

    by_task: Mapping[str, Sequence[SubmittedBatch]]  # in the order of submission
    blocked_seconds: float  # that the rollout waited for room


class TaskRewards:
    """Scores each image with the rewards of its task; has the methods of a single RewardService."""

    def __init__(
        self,
        trained: Mapping[str, Mapping[str, tuple[Reward, float]]],
        config: RolloutConfig,
        name_of: Callable[[Prompt], str],
        skipping: Mapping[str, Skipping] | None = None,
    ) -> None:
        """trained: the rewards of each task and their weights, by name; skipping: which of them may fail, by task."""
        self._workers = Workers(config.reward_workers, config.reward_timeout)
        self._decoded = DecodedImages(self._workers, config.decoded_batches)
        self.skipping = dict(skipping or {})
        self._services = {  # on the same threads, because tasks may share a reward
            task: RewardService(rewards, self._workers, self.skipping.get(task)) for task, rewards in trained.items()
        }
        self._persons = {  # by the id of the reward, which tasks may share
            id(reward.asking): reward.asking
            for of_task in trained.values()
            for reward, _ in of_task.values()
            if isinstance(reward, PersonReward)
        }
        self.of_persons = {
            (task, name)
            for task, of_task in trained.items()
            for name, (reward, _) in of_task.items()
            if isinstance(reward, PersonReward)
        }
        self._name_of = name_of
        self._waiting: dict[str, None] = {}
        self._blocked_seconds = 0.0

    @property
    def asks_a_person(self) -> bool:
        """Tells whether a person gives a reward."""
        return bool(self._persons)

    @property
    def may_skip(self) -> bool:
        """Tells whether any reward may fail for single images."""
        return any(skipping.names for skipping in self.skipping.values())

    def wait_for_room(self, may_stop: Callable[[], None] = lambda: None) -> None:
        """Waits until one more micro-batch may be decoded; counts as waiting for rewards."""
        self._blocked_seconds += self._decoded.wait_for_room(may_stop)

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Starts to score images (B, 3, H, W); images of one task must lie side by side."""
        names = [self._name_of(prompt) for prompt in prompts]
        calls: list[Call] = []
        for name in dict.fromkeys(names):
            first, count = names.index(name), names.count(name)
            assert names[first : first + count] == [name] * count, "a task's images are not side by side"
            calls += self._services[name].submit(images[first : first + count], prompts[first : first + count])
            self._waiting[name] = None
        self._decoded.add(calls)

    def begin(self, place: RunPlace) -> None:
        """Gets rewards ready that a person gives; raises ValueError if there are several or one cannot ask."""
        if len(self._persons) > 1:
            raise ValueError(
                f"rewards: {len(self._persons)} rewards of a person with different arguments; a run has one page, so "
                "give all tasks the same"
            )
        for person in self._persons.values():
            person.begin(place)

    def person_metrics(self) -> dict[str, float]:
        """Returns `rating/...`, if a person gives a reward and has compared the model with the start."""
        return {key: value for person in self._persons.values() for key, value in person.metrics().items()}

    def finish(self, may_stop: Callable[[], None]) -> None:
        """Waits for what a person still compares after the last iteration; may_stop may raise."""
        for person in self._persons.values():
            person.finish(may_stop)

    def detach(self, iteration: int) -> Submitted:
        """Returns what was submitted since the last call, and shows it to the person who rates it, if one does."""
        waiting, self._waiting = self._waiting, {}
        blocked, self._blocked_seconds = self._blocked_seconds, 0.0
        by_task = {name: self._services[name].detach() for name in waiting}
        for name, batches in by_task.items():
            self._services[name].ask(batches, iteration)
        return Submitted(by_task, blocked)

    def gather(
        self, iteration: int, may_stop: Callable[[], None] = lambda: None, submitted: Submitted | None = None
    ) -> dict[str, Rewards]:
        """Waits for the scores of what was submitted and returns them by task, in the order of submission.

        may_stop: is called now and then during the wait, and may raise. submitted: comes from `detach`; None takes what
        was submitted since the last call.
        """
        taken = submitted or self.detach(iteration)
        found = {
            name: self._services[name].gather(iteration, may_stop, batches) for name, batches in taken.by_task.items()
        }
        first = next(iter(found))
        found[first] = replace(found[first], wait_seconds=found[first].wait_seconds + taken.blocked_seconds)
        return found

    def shutdown(self) -> None:
        """Ends the threads; waits a second at most for what is running."""
        for person in self._persons.values():
            person.close()
        self._workers.shutdown()
