from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast.prompts import PromptSampler, Share, build_sampler, prompts_for_images
from rlcm_fast.trajectory import Prompt


def numbered(num_prompts: int) -> list[Prompt]:
    return [Prompt(f"prompt {number}") for number in range(num_prompts)]


def next_prompts(sampler: PromptSampler, num_batches: int) -> list[Prompt]:
    return [prompt for _ in range(num_batches) for prompt in sampler.next_batch()]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """A number of prompts, and how many of them to draw at a time."""
    total = draw(st.integers(1, 30))
    return total, draw(st.integers(1, total))


@given(sizes=sizes(), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_every_prompt_comes_once_a_pass(sizes: tuple[int, int], seed: int):
    total, count = sizes
    prompts = numbered(total)
    order = next_prompts(PromptSampler(prompts, Share(count, 1, seed)), num_batches=3 * total)
    for start in range(0, len(order), total):
        assert sorted(order[start : start + total], key=prompts.index) == prompts


@given(sizes=sizes(), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_the_prompts_of_one_iteration_are_distinct_even_across_passes(sizes: tuple[int, int], seed: int):
    sampler = PromptSampler(numbered(sizes[0]), Share(sizes[1], 1, seed))
    for _ in range(20):
        assert len(set(sampler.next_batch())) == sizes[1]


@given(num_prompts=st.integers(1, 5), world_size=st.integers(1, 4), extra=st.integers(0, 9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_ranks_share_out_the_order_of_a_single_process(num_prompts: int, world_size: int, extra: int, seed: int):
    prompts = numbered(num_prompts * world_size + extra)
    alone = PromptSampler(prompts, Share(num_prompts * world_size, 2, seed))
    ranks = [PromptSampler(prompts, Share(num_prompts, 2, seed, rank, world_size)) for rank in range(world_size)]
    for _ in range(8):
        parts = [rank.next_batch() for rank in ranks]
        assert [prompt for part in parts for prompt in part] == alone.next_batch()
        assert sum(len(set(part)) for part in parts) == len(set().union(*parts))


@given(sizes=sizes(), seed=st.integers(0, 2**32), num_before=st.integers(0, 12))
@settings(deadline=None)
def test_a_resumed_sampler_goes_on_as_if_nothing_had_happened(sizes: tuple[int, int], seed: int, num_before: int):
    uninterrupted = PromptSampler(numbered(sizes[0]), Share(sizes[1], 3, seed))
    next_prompts(uninterrupted, num_before)
    resumed = PromptSampler(numbered(sizes[0]), Share(sizes[1], 3, seed))
    next_prompts(resumed, 2)  # whatever was drawn before loading is forgotten
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert next_prompts(resumed, 10) == next_prompts(uninterrupted, 10)


def passes_of_lists(total: int, count: int, seed: int, num_batches: int) -> list[list[int]]:
    """The rows of each iteration, as they were drawn when permutations were lists; checkpoints rely on them."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    batches = []
    for _ in range(num_batches):
        rows, left = left[:count], left[count:]
        if len(rows) < count:
            left = torch.randperm(total, generator=generator).tolist()
            while len(rows) < count:
                rows.append(left.pop(next(i for i, row in enumerate(left) if row not in rows)))
        batches.append(rows)
    return batches


@given(sizes=sizes(), seed=st.integers(0, 2**32))
def test_permutations_are_those_of_earlier_versions(sizes: tuple[int, int], seed: int):
    sampler = PromptSampler(numbered(sizes[0]), Share(sizes[1], 1, seed))
    for rows in passes_of_lists(*sizes, seed, num_batches=20):
        assert [prompt.text for prompt in sampler.next_batch()] == [f"prompt {row}" for row in rows]


def test_resuming_draws_once_a_pass_and_not_once_an_iteration(monkeypatch: pytest.MonkeyPatch):
    far = PromptSampler(numbered(1000), Share(7, 1, seed=0))
    next_prompts(far, 5000)
    resumed = PromptSampler(numbered(1000), Share(7, 1, seed=0))
    draw, num_draws = resumed._draw, 0

    def counted() -> torch.Tensor:
        nonlocal num_draws
        num_draws += 1
        return draw()

    monkeypatch.setattr(resumed, "_draw", counted)
    resumed.load_state_dict(far.state_dict())
    assert num_draws == 35  # passes begun by 5000 iterations of 7
    assert next_prompts(resumed, 300) == next_prompts(far, 300)


def test_a_state_is_two_numbers_and_the_second_that_of_earlier_versions():
    sampler = PromptSampler([Prompt("a cat"), Prompt("a d\xf6g", "dogs")], Share(1, 1, seed=5))
    sampler.next_batch()
    words = "\0".join(["5", "1", "default", "a cat", "dogs", "a d\xf6g"])
    assert sampler.state_dict() == {"num_batches": 1, "fingerprint": zlib.crc32(words.encode())}


def test_every_prompt_carries_the_task_of_its_sampler_and_else_its_own_label(tmp_path):
    (tmp_path / "pets.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog", "task": "dogs"}\n')
    source = str(tmp_path / "pets.jsonl")
    own = build_sampler(source, Share(2, 1, seed=0)).next_batch()
    assert {(prompt.text, prompt.task) for prompt in own} == {("a cat", "default"), ("a dog", "dogs")}
    named = build_sampler(source, Share(2, 1, seed=0, task="pets")).next_batch()
    assert named == [Prompt(prompt.text, "pets") for prompt in own]


def test_a_run_may_be_resumed_on_another_number_of_processes():
    prompts = numbered(11)
    alone = PromptSampler(prompts, Share(4, 1, seed=5))
    next_prompts(alone, 7)
    pair = [PromptSampler(prompts, Share(2, 1, 5, rank, world_size=2)) for rank in range(2)]
    for sampler in pair:
        sampler.load_state_dict(alone.state_dict())
    assert [prompt for sampler in pair for prompt in sampler.next_batch()] == alone.next_batch()


@pytest.mark.parametrize(
    "other",
    [
        PromptSampler(numbered(8), Share(2, 1, seed=1)),
        PromptSampler(numbered(9), Share(2, 1, seed=0)),
        PromptSampler(numbered(8), Share(3, 1, seed=0)),
        PromptSampler([Prompt(prompt.text, "pets") for prompt in numbered(8)], Share(2, 1, seed=0)),
    ],
)
def test_a_checkpoint_of_other_prompts_is_refused(other: PromptSampler):
    with pytest.raises(ValueError, match=r"the checkpoint was made with prompts .*; resume with those"):
        PromptSampler(numbered(8), Share(2, 1, seed=0)).load_state_dict(other.state_dict())


def test_seeds_and_passes_are_shuffled_differently():
    prompts = numbered(50)
    sampler = PromptSampler(prompts, Share(50, 1, seed=0))
    first, second = sampler.next_batch(), sampler.next_batch()
    assert first != prompts and first != second
    assert first != PromptSampler(prompts, Share(50, 1, seed=1)).next_batch()
    assert first == PromptSampler(prompts, Share(50, 1, seed=0)).next_batch()


def test_the_images_of_a_prompt_lie_side_by_side():
    batch = PromptSampler(numbered(6), Share(3, images_per_prompt=4, seed=0)).next_batch()
    assert len(batch) == 12
    assert all(len(set(batch[start : start + 4])) == 1 for start in (0, 4, 8))


def test_more_prompts_an_iteration_than_there_are_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"source holds 6 prompts, fewer than the prompts.num_prompts=8 .*; lower it"):
        PromptSampler(numbered(6), Share(4, 1, seed=0, rank=0, world_size=2))


def test_a_task_with_too_few_prompts_is_named_with_its_source(tmp_path: Path):
    source = tmp_path / "few.txt"
    source.write_text("a\nb\n")
    problem = r"^tasks\[1\].source=\S+few.txt holds 2 prompts, fewer than the 6 of task pets .*; raise its images"
    with pytest.raises(ValueError, match=problem):
        build_sampler(str(source), Share(3, 1, seed=0, world_size=2, task="pets"), "tasks[1].source")


@pytest.mark.parametrize(("num_prompts", "images", "field"), [(0, 1, "num_prompts"), (1, 0, "images_per_prompt")])
def test_counts_below_one_are_refused(num_prompts: int, images: int, field: str):
    with pytest.raises(ValueError, match=f"prompts.{field}=0 must be at least 1"):
        PromptSampler(numbered(3), Share(num_prompts, images, seed=0))


def test_images_share_the_prompts_evenly_in_an_order_of_the_seed():
    prompts = [Prompt(str(i)) for i in range(10)]
    first, again, other = (prompts_for_images(prompts, 25, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(p.text for p in prompts_for_images(prompts, 10, seed=0)) == [str(i) for i in range(10)]
    assert prompts_for_images(prompts, 20, seed=0)[10:] == prompts_for_images(prompts, 10, seed=0)


def test_a_part_of_the_prompts_comes_from_all_over_their_list():
    part = prompts_for_images([Prompt(str(i)) for i in range(1000)], 50, seed=9)
    assert len(set(part)) == 50
    assert sum(int(prompt.text) >= 500 for prompt in part) == pytest.approx(25, abs=10)  # 2.8 standard deviations


@given(total=st.integers(1, 200), num_images=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_part_of_the_prompts_is_as_by_shuffling_the_whole_list(total: int, num_images: int, seed: int):
    shuffled = random.Random(seed).sample(numbered(total), total)
    assert prompts_for_images(numbered(total), num_images, seed) == [shuffled[i % total] for i in range(num_images)]
