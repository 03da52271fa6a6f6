"""Held-out images at fixed seeds, on a network of 300 weights; tests/test_processes.py shares them out."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import two_ranks
from PIL import Image
from plugin_rewards import Brightness, Faulty
from tiny_policies import TinyBackbone, TinyNetwork, decode, encode, images_of, policy_of, prompts

from benchmarks.shared import run_processes
from rlcm_fast import parallel
from rlcm_fast.config import RolloutConfig
from rlcm_fast.prompts import prompts_for_images
from rlcm_fast.rewards import GroupReward, RewardError
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.stages.album import Album
from rlcm_fast.stages.evaluation import Evaluator, HeldOut
from rlcm_fast.stages.guard import Describe
from rlcm_fast.trajectory import Prompt

POLICY = policy_of(TinyNetwork())
IMAGES = images_of(POLICY)


def evaluator(num_images: int = 5, micro_batch_size: int = 2, seed: int = 9) -> Evaluator:
    rewards = {"eval": {"brightness": (Brightness(), 3.0)}}
    return Evaluator(HeldOut(prompts_for_images(prompts(2), num_images, seed), seed, micro_batch_size), rewards)


def test_an_evaluation_repeats_exactly_and_depends_on_its_seed():
    first = evaluator()(IMAGES, 0)
    torch.randn(7)
    assert evaluator()(IMAGES, 5) == first
    assert evaluator(seed=10)(IMAGES, 0) != first


def test_its_numbers_are_those_of_the_images_without_reward_weights():
    drawn = [POLICY.sample(encode(batch), parallel.generator(9, i))[1] for i, batch in enumerate(_micro_batches())]
    images = decode(torch.cat(drawn))
    scores = Brightness()(images, []).double()
    metrics = evaluator()(IMAGES, 0)
    assert metrics == {
        "eval/brightness/mean": pytest.approx(scores.mean().item()),
        "eval/brightness/std": pytest.approx(scores.std(correction=0).item()),
        "eval/diversity": pytest.approx(diversity_of(images)),
    }


def test_some_images_are_kept_with_the_scores_of_all():
    album = Album(3)
    metrics = evaluator(num_images=7)(IMAGES, 0, album)
    assert [row["image"] for row in album.scores] == list(range(7))
    scores = torch.tensor([row["scores"]["eval/brightness"] for row in album.scores]).double()
    assert metrics["eval/brightness/mean"] == pytest.approx(scores.mean().item())

    # The files hold the images that were scored, and they are the same ones at every evaluation.
    assert len(album.files) == 3
    for row in album.scores:
        if "file" in row:
            pixels = np.asarray(Image.open(io.BytesIO(album.files[row["file"]])))
            shown = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
            assert Brightness()(shown, []).item() == pytest.approx(row["scores"]["eval/brightness"], abs=1 / 255)
    again = Album(3)
    evaluator(num_images=7)(IMAGES, 5, again)
    assert again.files.keys() == album.files.keys()


def test_kept_images_are_spread_over_prompts_that_repeat():
    album = Album(8)
    kept = album._kept(16)
    assert len(kept) == 8 and {row % 4 for row in kept} == {0, 1, 2, 3}
    assert Album(20)._kept(16) == frozenset(range(16)) and not Album()._kept(16)


def test_a_score_that_is_missing_is_missing_in_the_album():
    album = Album(1)
    album.add(prompts(2), [(1, b"png")], {"eval/a": torch.tensor([1.0, float("nan")])})
    assert album.scores[0]["scores"] == {"eval/a": 1.0} and album.files == {"0001.png": b"png"}
    assert math.isnan(album.scores[1]["scores"]["eval/a"])  # null in the file, which readers skip


def diversity_of(images: torch.Tensor) -> float:
    diversity = Diversity()
    return diversity.value(diversity.describe(images, [])[None]).item()


def test_a_set_reward_is_measured_by_its_groups_values_whatever_its_credit():
    images = torch.cat([decode(POLICY.sample(encode(b), parallel.generator(9, i))[1]) for i, b in enumerate(_cut(6))])
    order = [0, 2, 4, 1, 3, 5]  # two prompts in turn; their repeats are neighbours
    expected = torch.tensor([diversity_of(images[order[i : i + 2]]) for i in (0, 2, 4)]).double()
    reward = GroupReward("diversity", Diversity(), 2, "leave_one_out")
    held_out = HeldOut(prompts_for_images(prompts(2), 6, 9), 9, 2)
    metrics = Evaluator(held_out, {"eval": {"pairs": (reward, 1.0)}})(IMAGES, 0)
    assert metrics["eval/pairs/mean"] == pytest.approx(expected.mean().item())
    assert metrics["eval/pairs/std"] == pytest.approx(expected.std(correction=0).item())


def test_a_guard_shows_the_images_of_the_first_eight_prompts_whatever_the_micro_batch():
    drawn = torch.cat([decode(POLICY.sample(encode(b), parallel.generator(9, i))[1]) for i, b in enumerate(_cut(12))])
    held_out = HeldOut(prompts_for_images(prompts(2), 12, 9), 9, 2)
    evaluator = Evaluator(held_out, {"eval": {"brightness": (Brightness(), 1.0)}})
    _, seen = evaluator.looked(IMAGES, 0, Describe(Thumbnails()))
    assert seen is not None and len(seen.pictures) == 8
    torch.testing.assert_close(torch.stack(list(seen.pictures)), drawn[:8].clamp(0, 1), atol=0.5 / 255 + 1e-6, rtol=0)
    assert seen.texts == [prompt.text for prompt in held_out.prompts[:8]]


@pytest.mark.parametrize("num_images", [4, 12])
def test_groups_go_across_processes_so_two_of_them_measure_what_one_does(num_images: int, tmp_path: Path):
    alone, seen = two_ranks.evaluate_groups(num_images), two_ranks.seen_by_a_guard(num_images)
    group = (2, run_processes.free_port())
    processes = [
        run_processes.start(
            two_ranks.run_evaluation, num_images, tmp_path, log=tmp_path / f"{rank}.log", rank=rank, group=group
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        process.join(timeout=300)
        assert process.exitcode == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
        assert json.loads((tmp_path / f"seen_{rank}.json").read_text()) == seen
        faults_are_of_all(json.loads((tmp_path / f"faults_{rank}.json").read_text()), rank)


def faults_are_of_all(faults: list[str], rank: int) -> None:
    """A reward that fails on rank 1 ends an evaluation and a rollout on both, and may be skipped on both."""
    evaluation, rollout, skipped, metrics, last = faults
    for fault in (evaluation, rollout):
        assert re.fullmatch(r"RewardError True: reward 'judge', prompt '.', iteration 7: .* \(rank 1\)", fault)
    assert skipped == f"1 of {[False, rank == 1, False, False]}"
    assert '["skipped_images", 1.0]' in metrics and last == "none"


def _micro_batches() -> list:
    return _cut(5)


def _cut(num_images: int) -> list:
    assigned = prompts_for_images(prompts(2), num_images, 9)
    return [assigned[i : i + 2] for i in range(0, num_images, 2)]


def test_a_single_image_has_no_diversity():
    assert evaluator(num_images=1)(IMAGES, 0)["eval/diversity"] == 0.0


def test_a_reward_that_fails_is_named_with_the_iteration():
    faulty = Evaluator(HeldOut(prompts(2), 1, 2), {"eval": {"faulty": (Faulty("nan", 0), 1.0)}})
    with pytest.raises(RewardError, match=r"reward 'faulty', prompt 'b', iteration 30: returned nan"):
        faulty(IMAGES, 30)


def test_tasks_with_the_same_prompts_are_scored_on_one_draw():
    backbone = TinyBackbone()
    rewards = {"eval/a": {"brightness": (Brightness(), 1.0)}, "eval/b": {"pairs": (Brightness(), 1.0)}}
    both = Evaluator(HeldOut(prompts_for_images(prompts(2), 5, 9), 9, 2), rewards)
    metrics = both(images_of(POLICY, backbone), 0)
    assert [len(x_0) for x_0 in backbone.decoded] == [2, 2, 1]
    alone = evaluator()(IMAGES, 0)
    for key in ("a/brightness/mean", "b/pairs/mean"):
        assert metrics[f"eval/{key}"] == alone["eval/brightness/mean"]
    assert metrics["eval/a/diversity"] == metrics["eval/b/diversity"] == alone["eval/diversity"]


class Choosy(Brightness):
    """Cannot score images of prompt b, alone or with others."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        if any(prompt.text == "b" for prompt in prompts):
            raise ConnectionError("no answer")
        return super().__call__(images, prompts)


class ChoosyDiversity(Diversity):
    def describe(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        Choosy()(images, prompts)
        return super().describe(images, prompts)


def skipping_evaluator(max_skipped: float) -> Evaluator:
    rewards = {"choosy": (Choosy(), 1.0), "set": (GroupReward("set", ChoosyDiversity(), 4), 1.0)}
    rewards |= {"all": (Brightness(), 1.0)}
    held_out = HeldOut([*prompts(4), *prompts(4)], 9, 2)
    skipped = {"eval": frozenset(["choosy", "set"])}
    return Evaluator(held_out, {"eval": rewards}, RolloutConfig(max_skipped=max_skipped), skipped)


def test_an_evaluation_leaves_out_the_images_that_a_reward_fails_for(capsys: pytest.CaptureFixture[str]):
    metrics = skipping_evaluator(0.3)(IMAGES, 30)
    assert metrics["eval/choosy/skipped"] == metrics["eval/set/skipped"] == 2
    assert "eval/all/skipped" not in metrics
    batches = [[*prompts(4), *prompts(4)][i : i + 2] for i in range(0, 8, 2)]
    images = torch.cat([decode(POLICY.sample(encode(b), parallel.generator(9, i))[1]) for i, b in enumerate(batches)])
    rest = [0, 2, 3, 4, 6, 7]
    scores = Brightness()(images[rest], []).double()
    assert metrics["eval/choosy/mean"] == pytest.approx(scores.mean().item())
    assert metrics["eval/choosy/std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-5)
    values = [diversity_of(images[[0, 4]]), diversity_of(images[[2, 6, 3, 7]])]  # a alone of a and b; c and d
    assert metrics["eval/set/mean"] == pytest.approx(sum(values) / 2, rel=1e-5)
    said = "evaluation of iteration 30 skipped images: reward 'set', prompt 'b': ConnectionError: no answer\n"
    assert capsys.readouterr().err == said


def test_an_evaluation_that_leaves_out_too_many_stops_the_run():
    message = "rollout.max_skipped allows 1: repair the reward, or raise rollout.max_skipped"
    with pytest.raises(RewardError, match=message) as raised:
        skipping_evaluator(0.2)(IMAGES, 30)
    assert raised.value.is_on_all_processes
