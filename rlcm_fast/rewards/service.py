"""Scores micro-batches in worker threads while the next micro-batches are sampled.

    rollout:  submit(images, prompts) after each decoded micro-batch ... gather(iteration) once, at the end

The scores come back in the order of submission, whatever order the work finishes in, so a run does not depend on the
number of workers. `Rewards.wait_seconds` reports the seconds that the rollout still had to wait without any overlap.
Workers describe the images of a set reward; gather groups the descriptions and values the groups. So the border of a
micro-batch may lie inside a group. A score that is missing, because its reward failed and may be skipped (failures.py),
is NaN.

On a GPU, each worker has its own stream, which waits for the decoded images alone (streams.py). The scoring runs beside
the next micro-batch, and the rollout waits only for the last micro-batch.
"""

# B images of a micro-batch, or of all micro-batches after gather, F numbers that describe one image, G groups

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlcm_fast.faults import Fault
from rlcm_fast.rewards.asked import PersonReward
from rlcm_fast.rewards.base import (
    ImagesFailed,
    Reward,
    ScoreError,
    check_descriptions,
    check_scores,
    diverged,
    first_not_finite,
    one_line,
    reward_error,
)
from rlcm_fast.rewards.failures import Answer, Skipping, Tally, answer_with_skips
from rlcm_fast.rewards.groups import GroupReward, side_by_side
from rlcm_fast.rewards.streams import event_after, own_stream
from rlcm_fast.rewards.unchanged import Watch
from rlcm_fast.rewards.workers import Call, Workers
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Rewards:
    """The scores of all images submitted since the last gather, in order, on the CPU; NaN where one is missing."""

    by_name: dict[str, Tensor]  # each (B,) float32, the score or credit of an image, without the reward's weight
    values: dict[str, Tensor]  # the same, but for a set reward the value of the image's group, whatever its credit
    total: Tensor  # (B,) float32, the sum of weight * score; missing if one of them is
    wait_seconds: float  # how long the rollout was blocked
    problems: tuple[str, ...] = ()  # what failed and was skipped, a line per reward and image


@dataclass(frozen=True)
class RawScores:
    """What the rewards said of all images submitted since the last gather, in order; NaN where something is missing."""

    by_name: dict[str, Tensor]  # scores (B,) float32; descriptions (B, F) float32 of a set reward
    wait_seconds: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class SubmittedBatch:
    """A micro-batch and the calls of its rewards."""

    prompts: tuple[Prompt, ...]
    calls: dict[str, Call]  # by reward name; the answers are not yet checked


class RewardService:
    """Runs rewards over submitted images in the background."""

    def __init__(
        self, rewards: Mapping[str, tuple[Reward, float]], workers: Workers, skipping: Skipping | None = None
    ) -> None:
        """Binds rewards to the threads that run them; services may share `workers`, whose owner shuts them down.

        rewards     each name's reward and its weight in the total
        skipping    the rewards that may fail for single images; None: none may
        """
        if not rewards:
            raise ValueError("rewards=[] leaves nothing to learn from; name at least one reward")
        self._rewards = dict(rewards)
        self._workers = workers
        self._skipping = skipping or Skipping()
        self._tally = Tally(self._skipping.limit())
        self._batches: list[SubmittedBatch] = []

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Call]:
        """Starts scoring images (B, 3, H, W) float32 in [0, 1], one prompt each; leave them unchanged until gather.

        Returns the calls, which keep the images until they are answered.
        """
        if len(prompts) != len(images) or not prompts:
            raise ValueError(
                f"prompts={len(prompts)} for {len(images)} images; give one prompt per image, at least one"
            )
        calls, decoded, watch = {}, event_after(images), Watch(images)
        for name, (reward, _) in self._rewards.items():
            tally = self._tally if name in self._skipping.names else None
            work = partial(_score_in_worker, reward=reward, watch=watch, decoded=decoded, tally=tally)
            calls[name] = Call(name, prompts, work)
            self._workers.submit(calls[name])
        self._batches.append(SubmittedBatch(tuple(prompts), calls))
        return list(calls.values())

    def detach(self) -> list[SubmittedBatch]:
        """Returns what was submitted since the last call, for a `gather` after the next round is submitted."""
        batches, self._batches = self._batches, []
        return batches

    def ask(self, batches: Sequence[SubmittedBatch], iteration: int) -> None:
        """Shows a whole round to the person who rates it, if one does."""
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        for name, (reward, _) in self._rewards.items():
            if not isinstance(reward, PersonReward):
                continue
            answers = [batch.calls[name].answer for batch in batches]
            concurrent.futures.wait(answers)  # not long: an image is only kept
            if any(answer.cancelled() or answer.exception() is not None for answer in answers):
                return  # `gather` raises it
            described = [self._result(name, batch, iteration) for batch in batches]
            reward.asking.ask(torch.cat(described)[:, 0], prompts, iteration)

    def gather(
        self,
        iteration: int,
        may_stop: Callable[[], None] = lambda: None,
        batches: Sequence[SubmittedBatch] | None = None,
    ) -> Rewards:
        """Waits for the scores of `batches`, or of all images submitted since the last call.

        may_stop: is called now and then during the wait, and may raise. Raises RewardError for the first failure in the
        order of submission, and Diverged for an image that is not finite.
        """
        # Wait for the workers, and then for a person.
        batches = self.detach() if batches is None else batches
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        raw_scores = self.raw_scores(iteration, may_stop, batches)
        wait_seconds = raw_scores.wait_seconds
        self.ask(batches, iteration)
        for name, (reward, _) in self._rewards.items():
            if isinstance(reward, PersonReward):
                wait_seconds += reward.wait(raw_scores.by_name[name], may_stop)

        # Value the groups of set rewards and sum up all rewards.
        values, by_name = {}, {}
        for name, (reward, _) in self._rewards.items():
            of_reward = raw_scores.by_name[name]
            values[name], by_name[name] = _values_and_credits(name, reward, of_reward, prompts, iteration)
        weighted = [weight * by_name[name] for name, (_, weight) in self._rewards.items()]
        total = torch.stack(weighted).sum(dim=0)
        return Rewards(by_name, values, total, wait_seconds, raw_scores.problems)

    def raw_scores(
        self,
        iteration: int,
        may_stop: Callable[[], None] = lambda: None,
        batches: Sequence[SubmittedBatch] | None = None,
    ) -> RawScores:
        """Waits as `gather` does, but makes no groups and asks nobody."""
        batches = self.detach() if batches is None else batches
        if not batches:
            raise ValueError("gather() without a submit() before it has nothing to wait for; submit images first")

        # Wait, then check the micro-batches in the order of submission; after a failure, nobody needs the rest.
        calls = [call for batch in batches for call in batch.calls.values()]
        try:
            wait_seconds = self._workers.wait(calls, lambda: _is_settled(calls), may_stop)
            checked = [{name: self._result(name, batch, iteration) for name in self._rewards} for batch in batches]
        finally:
            self._tally.clear()
            for call in calls:
                call.cancel()

        # Join them, reward by reward.
        by_name: dict[str, Tensor] = {}
        for name in self._rewards:
            parts = [raw_scores[name] for raw_scores in checked]
            _check_widths(name, parts, batches, iteration)
            by_name[name] = joined(parts)
        return RawScores(by_name, wait_seconds, tuple(_problems(calls)))

    def _result(self, name: str, batch: SubmittedBatch, iteration: int) -> Tensor:
        """The checked raw scores of one reward on one batch, scores (B,) or descriptions (B, F), NaN if missing."""
        answer = self._answer(name, batch, iteration)
        reward, num_images = self._rewards[name][0], len(batch.prompts)
        if not answer.problems:
            return check_raw_scores(name, reward, answer.raw_scores, batch.prompts, iteration)

        # Check those that are there, and put them into their places.
        scored = answer.scored(num_images)
        shape = (0,) if isinstance(reward, GroupReward) else ()
        rows = torch.empty(0, *shape)
        if scored:
            prompts = [batch.prompts[index] for index in scored]
            rows = check_raw_scores(name, reward, answer.raw_scores, prompts, iteration)
        placed = torch.full((num_images, *rows.shape[1:]), torch.nan)
        placed[scored] = rows
        return placed

    def _answer(self, name: str, batch: SubmittedBatch, iteration: int) -> Answer:
        """What a reward answered; raises a Fault for an exception and for a call that has not come back in time."""
        call = batch.calls[name]
        if not call.answer.done() or call.answer.cancelled():
            assert self._workers.overdue, "the wait ended without an answer"
            late, prompt = self._workers.overdue
            timeout = self._workers.timeout
            raise reward_error(
                late,
                prompt,
                iteration,
                f"has not answered for rollout.reward_timeout={timeout:g} s; raise it, 0 waits for ever, or make "
                "rollout.micro_batch_size smaller",
            )
        with _named(name, batch.prompts, iteration):
            answer = call.answer.result()
        assert isinstance(answer, Answer)
        return answer


def score(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """The raw scores of images: scores, or the descriptions of a set reward; `check_raw_scores` checks them."""
    return reward.reward.describe(images, prompts) if isinstance(reward, GroupReward) else reward(images, prompts)


def check_raw_scores(
    name: str, reward: Reward, raw_scores: object, prompts: Sequence[Prompt], iteration: int
) -> Tensor:
    """Returns `raw_scores` if it is scores (B,), or descriptions (B, F) of a set reward; else raises RewardError."""
    check = check_descriptions if isinstance(reward, GroupReward) else check_scores
    return check(name, raw_scores, prompts, iteration)


def evaluate(name: str, reward: Reward, raw_scores: Tensor, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """The scores (B,) float32 of all images, or for a set reward the values (G,) of its groups, whatever their credit.

    raw_scores come from `RewardService.raw_scores` or `score`, in the order of `prompts`; what is missing is NaN. Equal
    prompts count as neighbours wherever they lie, so the groups are those of a rollout.
    """
    if not isinstance(reward, GroupReward):
        return raw_scores
    if isinstance(reward, PersonReward):  # is shown the images and answers later, if at all
        reward.asking.compare(raw_scores[:, 0], prompts, iteration)
        return torch.full((len(prompts),), torch.nan)
    order = side_by_side(prompts)
    groups = reward.groups(len(order))
    with _named(name, [prompts[position] for position in order], iteration):
        return reward.values(raw_scores[order], groups)


def _values_and_credits(
    name: str, reward: Reward, raw_scores: Tensor, prompts: Sequence[Prompt], iteration: int
) -> tuple[Tensor, Tensor]:
    """The value and the credit of each of the B images; both are the score for a reward of single images."""
    if not isinstance(reward, GroupReward):
        return raw_scores, raw_scores
    groups = reward.groups(len(prompts))
    with _named(name, prompts, iteration):
        return reward.values_and_credits(raw_scores, groups)


@contextmanager
def _named(name: str, prompts: Sequence[Prompt], iteration: int) -> Iterator[None]:
    """Turns every exception of a user's reward into a RewardError, and a broken image into a Diverged."""
    way_out = "repair the reward, or let it fail for single images with on_failure: skip"
    try:
        yield
    except Fault:  # is worded for the user already
        raise
    except _BrokenImage as error:
        raise diverged(prompts[error.index], iteration, error.index) from error
    except ScoreError as error:
        raise reward_error(name, prompts[error.index], iteration, str(error)) from error
    except ImagesFailed as error:
        index = next((index for index in error.problems if index in range(len(prompts))), 0)
        raise reward_error(name, prompts[index], iteration, f"failed for {one_line(error)}; {way_out}") from error
    except Exception as error:
        problem = f"raised {type(error).__name__}: {one_line(error)}"
        raise reward_error(name, prompts[0], iteration, f"{problem}; {way_out}") from error


class _BrokenImage(Exception):
    """An image that is not finite, by its index in the micro-batch."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _score_in_worker(
    call: Call, reward: Reward, watch: Watch, decoded: torch.cuda.Event | None, tally: Tally | None
) -> Answer:
    """The raw scores, unchecked; tensors move to the CPU here, so that the caller waits for no copy.

    decoded: the event after which the images are there; None on a CPU. tally: counts the failures of a reward that may
    fail for single images; None: it may not. Raises ScoreError for a reward that changes the images.
    """
    images = watch.images
    with torch.no_grad(), own_stream(images, decoded):
        # A NaN image has a JPEG size like any other, so a reward would hide it. A sum needs no mask of all pixels.
        broken = first_not_finite(images.flatten(1).sum(dim=1))
        if broken is not None:
            raise _BrokenImage(broken)
        watch.begin()
        if tally is None:
            answer = Answer(_on_cpu(reward, images, call.prompts))
        else:
            answer = answer_with_skips(call, partial(_on_cpu, reward), images, tally)
        watch.check(lambda copy: score(reward, copy, call.prompts))
        return answer


def _on_cpu(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    raw_scores = score(reward, images, prompts)
    return raw_scores.detach().cpu() if isinstance(raw_scores, Tensor) else raw_scores


def _is_settled(calls: Sequence[Call]) -> bool:
    """Tells whether all calls are answered, or one failed and all before it are answered."""
    for call in calls:
        if not call.answer.done():
            return False
        if call.answer.cancelled() or call.answer.exception() is not None:
            return True
    return True


def _problems(calls: Sequence[Call]) -> Iterator[str]:
    """The failures that were skipped, a line for each image and reward."""
    for call in calls:
        answer = call.answer.result()
        assert isinstance(answer, Answer)
        for index, problem in answer.problems.items():
            yield f"reward {call.reward_name!r}, prompt {call.prompts[index].text!r}: {problem}"


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Joins scores (B,), or descriptions (B, F) of which a part without any description may have another F."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(1, max(part.shape[1] for part in parts))
    same = [part if part.shape[1] == width else torch.full((len(part), width), torch.nan) for part in parts]
    return torch.cat(same)


def _check_widths(name: str, descriptions: Sequence[Tensor], batches: Sequence[SubmittedBatch], iteration: int) -> None:
    """Raises a RewardError unless the descriptions (B, F) of all micro-batches have the same F, or none."""
    found = 0
    for rows, batch in zip(descriptions, batches, strict=True):
        width = rows.shape[1] if rows.ndim == 2 else 0
        if found and width not in (0, found):
            problem = f"describe() returned {width} numbers per image and {found} before; return the same number always"
            raise reward_error(name, batch.prompts[0], iteration, problem)
        found = found or width
