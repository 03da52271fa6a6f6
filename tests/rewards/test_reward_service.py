from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast.faults import Diverged
from rlcm_fast.rewards import Reward, RewardError, RewardService, Workers
from rlcm_fast.trajectory import Prompt


class Brightness:
    """The mean of each image; waits `seconds` times the first image's mean before it answers."""

    scope = "image"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        values = images.mean(dim=(1, 2, 3))
        time.sleep(self.seconds * values[0].item())
        return values


class Answer:
    """Returns what it was given, or raises it; sees nothing of the images."""

    scope = "image"

    def __init__(self, answer) -> None:
        self.answer = answer

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@contextmanager
def serving(rewards: Mapping[str, tuple[Reward, float]], num_workers: int = 2) -> Iterator[RewardService]:
    workers = Workers(num_workers)
    try:
        yield RewardService(rewards, workers)
    finally:
        workers.shutdown()


def flat(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def named(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


class Gated(Brightness):
    """Brightness that answers for dark images at once and for bright ones only when `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.finished: list[float] = []

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        values = super().__call__(images, prompts)
        if values[0] > 0.5:
            assert self.gate.wait(timeout=60)
        self.finished.append(values[0].item())
        self.gate.set()
        return values


def test_scores_come_back_in_the_order_of_submission_whatever_finishes_first():
    reward = Gated()
    with serving({"bright": (reward, 1.0)}, num_workers=2) as service:
        service.submit(flat(1.0, 0.9), named("a", "b"))
        service.submit(flat(0.0, 0.1), named("c", "d"))
        rewards = service.gather(iteration=0)
    assert reward.finished == [0.0, 1.0]
    torch.testing.assert_close(rewards.total, torch.tensor([1.0, 0.9, 0.0, 0.1]))


@given(
    means=st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), min_size=1, max_size=5),
    num_workers=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_the_number_of_workers_and_micro_batches_do_not_change_a_bit(means: list[list[float]], num_workers: int):
    rewards: dict[str, tuple[Reward, float]] = {"slow": (Brightness(0.002), 0.7), "quick": (Brightness(), -0.3)}
    with serving(rewards, num_workers) as service:
        for batch in means:
            service.submit(flat(*batch), named(*["a"] * len(batch)))
        split = service.gather(iteration=0)
        everything = [value for batch in means for value in batch]
        service.submit(flat(*everything), named(*["a"] * len(everything)))
        whole = service.gather(iteration=1)
    assert torch.equal(split.total, whole.total)
    assert all(torch.equal(split.by_name[name], whole.by_name[name]) for name in rewards)


def test_the_total_is_the_weighted_sum_and_the_parts_are_unweighted():
    scores = torch.tensor([1.0, -2.0])
    with serving({"a": (Answer(scores), 0.5), "b": (Answer(scores**2), 2.0)}) as service:
        service.submit(flat(0.0, 0.0), named("x", "y"))
        rewards = service.gather(iteration=0)
    assert torch.equal(rewards.by_name["a"], scores) and torch.equal(rewards.by_name["b"], scores**2)
    assert rewards.total.tolist() == [2.5, 7.0] and rewards.total.dtype == torch.float32


def test_scoring_does_not_hold_up_the_caller_and_what_is_waited_for_is_reported():
    reward = Gated()
    with serving({"slow": (reward, 1.0)}, num_workers=1) as service:
        service.submit(flat(1.0), named("a"))
        assert reward.finished == []  # the caller samples on while the reward is at work
        threading.Timer(0.3, reward.gate.set).start()
        blocked = service.gather(iteration=0).wait_seconds
        service.submit(flat(1.0), named("a"))
        while len(reward.finished) < 2:
            time.sleep(0.01)
        overlapped = service.gather(iteration=1).wait_seconds
    assert 0 <= overlapped < blocked
    assert blocked > 0.1


def test_each_gather_returns_only_what_was_submitted_since_the_last():
    with serving({"bright": (Brightness(), 1.0)}) as service:
        service.submit(flat(0.25), named("a"))
        assert service.gather(0).total.tolist() == [0.25]
        service.submit(flat(0.5), named("b"))
        assert service.gather(1).total.tolist() == [0.5]
        with pytest.raises(ValueError, match="submit images first"):
            service.gather(2)


def test_rewards_run_without_gradients_in_a_worker_thread():
    seen: list[tuple[bool, str]] = []

    class Watching(Brightness):
        def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), threading.current_thread().name))
            return super().__call__(images, prompts)

    with serving({"bright": (Watching(), 1.0)}) as service:
        service.submit(flat(0.5).requires_grad_(), named("a"))
        assert not service.gather(0).total.requires_grad
    assert seen[0][0] is False and seen[0][1].startswith("reward")


def test_an_exception_names_reward_prompt_and_iteration_and_keeps_its_cause():
    cause = KeyError("clip")
    with serving({"good": (Brightness(), 1.0), "bad": (Answer(cause), 1.0)}) as service:
        service.submit(flat(0.5, 0.5), named("a cat", "a dog"))
        with pytest.raises(
            RewardError, match=r"reward 'bad', prompt 'a cat', iteration 7: raised KeyError: 'clip'"
        ) as caught:
            service.gather(iteration=7)
    assert caught.value.__cause__ is cause


def test_a_reward_that_exits_does_not_end_the_run_without_a_word():
    with serving({"bad": (Answer(SystemExit(3)), 1.0)}) as service:
        service.submit(flat(0.5), named("a cat"))
        with pytest.raises(RewardError, match="reward 'bad', prompt 'a cat', iteration 1: raised .*SystemExit: 3"):
            service.gather(iteration=1)


def test_a_nan_names_the_prompt_of_its_own_image():
    with serving({"bad": (Answer(torch.tensor([0.0, float("nan")])), 1.0)}) as service:
        service.submit(flat(0.5, 0.5), named("a cat", "a dog"))
        with pytest.raises(RewardError, match="reward 'bad', prompt 'a dog', iteration 2: returned nan for image 1"):
            service.gather(iteration=2)


@pytest.mark.parametrize("answer", [torch.zeros(1), torch.zeros(2).double(), 3.0])
def test_a_wrong_answer_is_a_reward_error(answer):
    with serving({"bad": (Answer(answer), 1.0)}) as service:
        service.submit(flat(0.5, 0.5), named("a cat", "a dog"))
        with pytest.raises(RewardError, match="reward 'bad', prompt 'a cat', iteration 0: returned"):
            service.gather(iteration=0)


def test_a_broken_image_is_the_models_fault_and_names_its_prompt():
    images = flat(0.5, 0.5).clone()
    images[1, 2, 3, 3] = float("nan")
    with serving({"constant": (Answer(torch.zeros(2)), 1.0)}) as service:
        service.submit(images, named("a cat", "a dog"))
        with pytest.raises(Diverged, match=r"prompt 'a dog', iteration 4: image 1 .* the model has diverged"):
            service.gather(iteration=4)


def test_the_first_failure_in_submission_order_is_reported_and_the_service_goes_on():
    class Failing(Brightness):
        def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            super().__call__(images, prompts)
            if prompts[0].text != "good":
                raise OSError(prompts[0].text)
            return images.mean(dim=(1, 2, 3))

    with serving({"bright": (Failing(seconds=0.2), 1.0)}, num_workers=2) as service:
        service.submit(flat(1.0), named("slow and first"))
        service.submit(flat(0.0), named("quick and second"))
        with pytest.raises(RewardError, match="prompt 'slow and first'"):
            service.gather(iteration=0)
        service.submit(flat(0.5), named("good"))
        assert service.gather(iteration=1).total.tolist() == [0.5]


def test_bad_use_is_refused_at_once():
    with pytest.raises(ValueError, match="at least one reward"):
        RewardService({}, Workers(1))
    with pytest.raises(ValueError, match=r"rollout.reward_workers=0 must be at least 1"):
        Workers(0)
    with serving({"bright": (Brightness(), 1.0)}) as service, pytest.raises(ValueError, match="prompts=1 for 2 images"):
        service.submit(flat(0.5, 0.5), named("a cat"))


def test_shutdown_ends_the_threads_without_waiting_for_what_has_not_started():
    workers = Workers(1)
    service = RewardService({"slow": (Brightness(seconds=0.2), 1.0)}, workers)
    for _ in range(20):
        service.submit(flat(1.0), named("a"))
    start = time.perf_counter()
    workers.shutdown()
    assert time.perf_counter() - start < 3  # all 20 would take 4
