"""Towers: shared by rewards, run once per micro-batch, texts encoded once, nothing kept longer than its images."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import tiny_rewards
import torch
from tiny_rewards import PROMPTS
from torch import Tensor, nn

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import RewardService, Workers, build_rewards, used
from rlcm_fast.rewards.clip_score import ClipScore
from rlcm_fast.rewards.embeddings import ClipEmbedding
from rlcm_fast.rewards.models import Placement
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.towers import ImageTower, TextTower, Tokens, frozen

CPU = Placement.of("fp32", "cpu", 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_rewards.save_clip(tmp_path_factory.mktemp("clip"))


class Counting(nn.Module):
    """A network that counts its calls, takes its time, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0
        self.fails = False

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(0.02)
        if self.fails:
            raise RuntimeError("out of memory")
        return pixels.mean(dim=(2, 3)) * self.weight


def tower(place: Placement = CPU) -> tuple[ImageTower, Counting]:
    network = Counting()
    return ImageTower(network, lambda module, pixels: module(pixels), Preparation(8), place, 3), network


def run_threads(number: int, call: object) -> None:
    threads = [threading.Thread(target=call) for _ in range(number)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_micro_batch_is_embedded_once_for_all_threads_that_ask():
    shared, network = tower()
    images, results = torch.rand(4, 3, 16, 16), []
    run_threads(4, lambda: results.append(shared.embed(images)))
    assert network.calls == 1 and len(results) == 4
    assert all(result is results[0] for result in results)


def test_other_images_and_changed_images_are_embedded_anew():
    shared, network = tower()
    images = torch.rand(4, 3, 16, 16)
    first = shared.embed(images)
    assert torch.equal(shared.embed(images.clone()), first) and network.calls == 2
    images.mul_(0.5)
    assert not torch.equal(shared.embed(images), first) and network.calls == 3


def test_embeddings_are_gone_with_their_images():
    shared, _ = tower()
    images = torch.rand(4, 3, 16, 16)
    shared.embed(images)
    assert len(shared._embedded) == 1
    del images
    gc.collect()
    assert len(shared._embedded) == 0


def test_a_failure_reaches_all_threads_and_is_not_remembered():
    shared, network = tower()
    network.fails = True
    images, errors = torch.rand(4, 3, 16, 16), []

    def ask() -> None:
        try:
            shared.embed(images)
        except RuntimeError as error:
            errors.append(str(error))

    run_threads(3, ask)
    assert errors == ["out of memory"] * 3
    network.fails = False
    assert shared.embed(images).shape == (4, 3)


def test_the_smallest_batch_size_counts():
    shared, network = tower()
    shared.limit_batch(3)
    shared.limit_batch(5)
    shared.embed(torch.rand(7, 3, 16, 16))
    assert network.calls == 3


def test_images_of_inference_mode_are_embedded_too():
    shared, _ = tower()
    with torch.inference_mode():
        images = torch.rand(2, 3, 16, 16)
    assert shared.embed(images).shape == (2, 3)


def test_three_rewards_on_one_clip_run_its_image_tower_once_per_micro_batch(clip: str, tmp_path_factory):
    """From the worker threads of the service, as in a run."""
    layers = (0, 2, 4, 6, 7)
    head = tiny_rewards.save_head(tmp_path_factory.mktemp("head") / "h.pth", tiny_rewards.WIDTH, "layers", layers)
    model = {"model": clip}
    rewards = build_rewards(
        [
            RewardConfig("aesthetic", arguments={**model, "head": head}),
            RewardConfig("clip_score", arguments=model),
            RewardConfig("pickscore", arguments=model),
            RewardConfig("diversity", arguments={"embedding": "clip", "embedding_arguments": model}),
        ]
    )
    calls, texts = [], []
    score = rewards["clip_score"][0]
    assert isinstance(score, ClipScore)
    score._images.network.register_forward_hook(lambda *_: calls.append(1))
    score._texts.network.register_forward_hook(lambda *_: texts.append(1))
    workers = Workers(4)
    service = RewardService(rewards, workers)
    for seed in range(3):
        service.submit(tiny_rewards.images(seed=seed), PROMPTS)
    scores = service.gather(iteration=0)
    workers.shutdown()
    assert scores.total.shape == (12,)
    assert len(calls) == 3  # micro-batches, not 12
    assert len(texts) == 3  # different prompts of all micro-batches and rewards
    assert used(rewards)["diversity"]["model"]["model"] == clip


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.usefixtures("no_warning")
def test_rewards_with_the_same_model_dtype_and_device_share_a_tower(clip: str):
    one, two = ClipEmbedding(clip), ClipScore(clip)
    assert one._tower is two._images


def test_another_dtype_loads_the_model_again_and_says_so(clip: str):
    one = ClipEmbedding(clip)
    with pytest.warns(UserWarning, match="is loaded again, as bfloat16 on cpu, because a reward has it as float32 on"):
        two = ClipEmbedding(clip, dtype="bf16")
    assert two._tower is not one._tower
    images = tiny_rewards.images()
    assert two(images, PROMPTS).dtype == torch.float32
    assert (one(images, PROMPTS) - two(images, PROMPTS)).abs().max() < 0.1


def test_a_tower_is_freed_with_its_last_reward(clip: str):
    network = ClipEmbedding(clip, dtype="fp16")._tower.network
    from weakref import ref

    gone = ref(network)
    del network
    gc.collect()
    assert gone() is None


class Words:
    """A tokenizer: a number for each word, between those of begin and end."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *range(2, 2 + len(text.split())), 1]}


def test_a_long_prompt_is_cut_before_its_end_token_and_that_is_said_once():
    tokens = Tokens(Words(), 5, "CLIP")
    assert tokens("one two three") == [0, 2, 3, 4, 1]
    with pytest.warns(UserWarning, match="CLIP reads 5 tokens, and a prompt has 7: .* it begins 'one two three four"):
        assert tokens("one two three four five") == [0, 2, 3, 4, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens("one two three four five six")


def test_each_text_is_encoded_once_alone_and_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.rewards.towers._MAX_TEXTS", 2)
    seen: list[list[int]] = []

    def read(_: nn.Module, ids: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return ids.float().sum(dim=1, keepdim=True).expand(1, 4)

    texts = TextTower(nn.Identity(), read, Tokens(Words(), 9, "CLIP"), CPU)
    embedded = texts.embed(["a b", "c", "a b"])
    assert embedded.shape == (3, 4) and torch.equal(embedded[0], embedded[2])
    assert seen == [[[0, 2, 3, 1]], [[0, 2, 1]]]
    texts.embed(["a b", "d e f"])  # forgets c
    texts.embed(["a b"])
    assert len(seen) == 3
    texts.embed(["c"])
    assert len(seen) == 4


def test_weights_that_zero_has_partitioned_are_refused():
    network = nn.Linear(2, 2)
    network.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"build rewards outside of deepspeed\.zero\.Init"):
        frozen(network, CPU)
