"""The guard on numbers and pictures made up: bands, what it says, what it does, what it keeps."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.config import GuardConfig
from rlcm_fast.config.guard import STATISTICS
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.run_folder.guard_pictures import GuardPictures
from rlcm_fast.stages.guard import Describe, Guard, HeldOutReward
from rlcm_fast.stages.guard_measures import (
    Band,
    Measured,
    Seen,
    distance_to_start,
    diversity_across,
    diversity_within,
)
from rlcm_fast.stages.kl_weight import AIM, FIRST, FIRST_RATE, LEAST_RATE, MOST, KlWeight
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt(text) for text in ("a circle", "a star") * 8]


def pictures(seed: int, contrast: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(16, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return 0.5 + contrast * (coarse - 0.5)


def seen(images: Tensor) -> Seen:
    described = Describe(Thumbnails())(images, PROMPTS)
    return Seen.of(described, PROMPTS, list(images[:8]))


class Run:
    """A guard over a held-out reward "taste", and what it says."""

    def __init__(self, folder: Path, kl_weight: float = 0.0, **settings: Any) -> None:
        self.lines: list[str] = []
        config = GuardConfig(**{"action": "warn", **settings})
        self.kl_weight = KlWeight(kl_weight, is_measured=True, is_moved=config.raises_kl)
        held_out = [HeldOutReward("taste", 16)]
        self.guard = Guard(config, held_out, self.kl_weight, Describe(Thumbnails()), GuardPictures(folder), 20)

    def __call__(self, iteration: int, taste: float, images: Tensor | None = None) -> dict[str, float]:
        evaluated = {"eval/taste/mean": taste, "eval/taste/std": 0.1}
        return self.guard(seen(pictures(0) if images is None else images), evaluated, iteration, self.lines.append)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "guard")


def test_a_band_is_the_wider_of_standard_errors_and_floor(tmp_path: Path):
    error = 0.1 / math.sqrt(15)
    by_error = Run(tmp_path)(0, 0.8)
    assert by_error["guard/taste/low"] == pytest.approx(0.8 - 3 * error)
    by_floor = Run(tmp_path, z=0.1, floor=0.2)(0, 0.8)
    assert by_floor["guard/taste/low"] == pytest.approx(0.8 * (1 - 0.2))
    assert "guard/taste/high" not in by_error  # a reward that nobody optimises may rise
    own = Run(tmp_path, z=0.1, floors={"saturation": 0.5})(0, 0.8)
    assert own["guard/saturation/low"] == pytest.approx(0.5 * own["guard/saturation"])
    assert own["guard/saturation/high"] == pytest.approx(1.5 * own["guard/saturation"])


def test_excess_counts_half_widths_from_the_end():
    band = Band(10.0, 2.0)
    assert [band.excess(value) for value in (10, 11, 12, 14, 8, 4)] == [-1, -0.5, 0, 1, 0, 2]
    assert Band(10.0, 2.0, has_high=False).excess(40) == -16
    assert Band(0.0, 0.0).excess(0.0) == -1 and Band(0.0, 0.0).excess(0.1) == math.inf
    assert band.excess(math.nan) == math.inf


def test_unchanged_images_are_inside_and_nothing_is_said(run: Run):
    metrics = [run(iteration, 0.8) for iteration in (0, 5, 20)]
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0]["guard/outside"] == 0 and run.lines == []
    assert metrics[0]["guard/distance_to_start"] == 0


def test_what_leaves_its_band_is_said_once_with_a_picture_of_start_and_now(run: Run, tmp_path: Path):
    run(0, 0.8)
    metrics = run(5, 0.5)
    run(6, 0.4)
    assert metrics["guard/outside"] == 1
    (line,) = run.lines
    picture = tmp_path / "guard" / "000005.png"
    low = f"{0.8 - 0.3 / math.sqrt(15):.3g}"
    assert line == f"guard: iteration 5: taste 0.5 is below its band ({low}; 0.8 at the start); see {picture}"
    assert picture.is_file() and not (tmp_path / "guard" / "000006.png").exists()
    run(7, 0.8)
    assert run.lines[1:] == ["guard: iteration 7: back inside: taste"]


def test_blank_images_leave_the_bands_of_statistics_diversity_and_distance(run: Run):
    run(0, 0.8)
    metrics = run(5, 0.8, pictures(0, contrast=0.02))
    outside = {line.split(":")[2].split()[0] for line in run.lines}
    assert outside >= {"colour_entropy", "edge_density", "saturation", "flat_area", "jpeg_kb", "diversity_across"}
    assert metrics["guard/outside"] == len(outside)
    far = run(6, 0.8, pictures(1))  # other images of the same kind
    assert far["guard/distance_to_start"] == pytest.approx(1, abs=0.1)
    assert far["guard/diversity_across"] == pytest.approx(metrics["guard/diversity_across/high"] / 1.5, rel=0.1)


def test_the_weight_falls_well_inside_and_rises_outside_by_the_mean_of_measurements(tmp_path: Path):
    run = Run(tmp_path, action="raise_kl", z=0.1, floor=0.1)  # the band of taste 0.8 ends at 0.72
    assert run.kl_weight.value == FIRST
    found = [run(i, taste)["guard/kl_weight"] for i, taste in enumerate((0.8, 0.76, 0.52, 0.52, 0.8))]
    means, rate, base, weights = (-1, -0.75, 0.625, 1.3125, 0.15625), FIRST_RATE, FIRST, []
    for mean in means:
        rate = FIRST_RATE / 2 if mean > 0 else rate
        base *= 2 ** (rate * (mean - AIM))
        weights.append(base * 2 ** (max(mean, 0) / 2))
    assert found == pytest.approx(weights)
    assert found[1] < found[0] < FIRST and found[3] > found[2] > found[1]
    assert f"; update.kl_weight {found[1]:.3g} -> {found[2]:.3g}; see " in run.lines[0]
    assert "guard: iteration 4: back inside: taste" in run.lines


def test_one_bad_measurement_does_not_raise_the_weight():
    weight = KlWeight(0.0, is_moved=True)
    weight.follow(-1.0)
    before = weight.value
    weight.follow(0.3)
    assert weight.value < before and weight.rate == FIRST_RATE
    weight.follow(0.9)
    assert weight.value > before


def test_the_weight_comes_to_rest_near_the_end_of_the_band():
    """A model whose excess follows the logarithm of the weight, some measurements late."""
    weight, excess, found = KlWeight(0.0, is_moved=True), -1.0, []
    for _ in range(150):
        weight.follow(excess)
        wanted = -5 * math.log2(weight.value / 0.08)  # half-widths: the band ends at a weight of 0.08
        excess += (wanted - excess) / (5 if wanted > excess else 2)  # pictures are spoiled late, and come back at once
        found.append((weight.value, excess))
    assert all(0.08 < value < 0.083 and -0.15 < excess < -0.05 for value, excess in found[-50:])
    assert max(excess for _, excess in found) < 1.5


def test_the_rate_halves_at_each_way_out_down_to_its_least():
    weight, rates = KlWeight(0.0, is_moved=True), []
    for _ in range(4):
        for excess in (2.0, 2.0, -1.0, -1.0, -1.0):
            weight.follow(excess)
        rates.append(weight.rate)
    assert rates == [FIRST_RATE / 2, LEAST_RATE, LEAST_RATE, LEAST_RATE]


def test_the_weight_stays_between_update_kl_weight_and_its_most():
    weight = KlWeight(0.05, is_moved=True)
    assert weight.value == FIRST and KlWeight(0.7, is_moved=True).value == 0.7
    for _ in range(40):
        weight.follow(-1.0)
    assert weight.value == 0.05
    for _ in range(400):
        weight.follow(math.inf)
    assert weight.value == MOST
    fixed = KlWeight(0.0)
    assert fixed.value == 0.0 and not fixed.is_needed


def test_a_weight_that_no_guard_moves_any_more_is_that_of_the_config():
    moved = KlWeight(0.0, is_moved=True)
    fixed, again = KlWeight(0.03), KlWeight(0.0, is_moved=True)
    for weight in (fixed, again):
        weight.load_state_dict(moved.state_dict())
    assert fixed.value == 0.03
    assert again == moved


def test_a_checkpoint_of_the_earlier_law_goes_on_with_its_weight():
    weight = KlWeight(0.0, is_moved=True)
    weight.load_state_dict(
        {"value": 0.0441, "divergence": 0.02, "floor": 0.01, "excess": 1.2, "divergence_before": 0.03}
    )
    assert (weight.value, weight.base, weight.divergence) == (0.0441, 0.0441, 0.02)


def test_only_what_it_acts_on_moves_the_weight(tmp_path: Path):
    run = Run(tmp_path, action="raise_kl")
    first = run(0, 0.8)["guard/kl_weight"]
    assert run(5, 0.8, pictures(0, contrast=0.02))["guard/kl_weight"] < first
    every = Run(tmp_path, action="raise_kl", acts_on=["all"])
    assert every(0, 0.8)["guard/kl_weight"] == first
    assert every(5, 0.8, pictures(0, contrast=0.02))["guard/kl_weight"] > first


def test_stop_ends_the_run_for_what_it_acts_on_and_not_at_the_end(tmp_path: Path):
    run = Run(tmp_path, action="stop")
    run(0, 0.8)
    run(5, 0.8, pictures(0, contrast=0.02))
    assert not run.guard.stops(5)
    run(6, 0.1)
    assert run.guard.stops(6) and not run.guard.stops(20)
    assert not Run(tmp_path).guard.stops(6)


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path):
    settings: dict[str, Any] = {"action": "raise_kl", "max_kl": 0.1}
    run, resumed = Run(tmp_path / "a", **settings), Run(tmp_path / "a", **settings)
    run(0, 0.8)
    run.kl_weight.divergence = 0.2
    run(4, 0.3, pictures(2))
    resumed.guard.load_state_dict(json.loads(json.dumps(run.guard.state_dict())))
    run.lines.clear()
    for iteration, taste in ((8, 0.3), (12, 0.79)):
        assert run(iteration, taste, pictures(3)) == resumed(iteration, taste, pictures(3))
    assert run.lines == resumed.lines
    assert run.guard.state_dict() == resumed.guard.state_dict()


def test_bands_follow_settings_that_change_and_are_learned_late_if_they_must(tmp_path: Path):
    run, other = Run(tmp_path), Run(tmp_path, floor=0.5, watch=["held_out"])
    run(0, 0.8)
    other.guard.load_state_dict(run.guard.state_dict())
    metrics = other(4, 0.5)
    assert metrics == {"guard/taste": 0.5, "guard/taste/low": pytest.approx(0.4), "guard/outside": 0}
    late = Run(tmp_path)
    late(30, 0.8)
    assert late.lines == ["guard: the bands are around the weights after 30 iterations, the first that it measured"]


def test_it_measures_with_evaluations_or_on_a_schedule_of_its_own(tmp_path: Path):
    assert [Run(tmp_path).guard.is_due(5, is_scored) for is_scored in (True, False)] == [True, False]
    own = Run(tmp_path, every=4).guard
    assert [i for i in range(21) if own.is_due(i, False)] == [0, 4, 8, 12, 16, 20]
    assert [i for i in range(21) if Run(tmp_path, every=7).guard.is_due(i, True)] == [0, 7, 14, 20]


def test_the_divergence_has_a_band_if_it_is_given_one(tmp_path: Path):
    run = Run(tmp_path, max_kl=0.1)
    assert "guard/kl_to_start" not in run(0, 0.8)
    run.kl_weight.divergence = 0.2
    assert run(4, 0.8)["guard/kl_to_start/high"] == 0.1
    assert run.lines[0].startswith("guard: iteration 4: kl_to_start 0.2 is above its band (0.1; 0 at the start)")


def test_the_error_of_a_diversity_is_that_of_many_draws():
    # Points on a line: distances of normal numbers have mean 2 / sqrt(pi).
    generator = torch.Generator().manual_seed(0)
    draws = [diversity_across(torch.randn(100, 1, generator=generator)) for _ in range(200)]
    values = torch.tensor([draw.value for draw in draws])
    assert values.mean().item() == pytest.approx(2 / math.sqrt(math.pi), abs=0.02)
    assert sum(draw.error for draw in draws) / 200 == pytest.approx(values.std().item(), rel=0.15)


def test_diversity_is_the_rewards_and_within_prompts_counts_pairs_of_a_prompt():
    embedding = torch.rand(16, 5, generator=torch.Generator().manual_seed(1))
    assert diversity_across(embedding).value == pytest.approx(Diversity().value(embedding[None]).item())
    within = diversity_within(embedding, PROMPTS)
    expected = [torch.pdist(embedding[start::2].double()).mean() for start in (0, 1)]
    assert within == Measured.of(torch.stack(expected))
    assert diversity_within(embedding, [Prompt(str(i)) for i in range(16)]) is None


def test_distance_is_in_units_of_the_starts_diversity():
    start = torch.zeros(2, 3)
    assert distance_to_start(start + torch.tensor([3.0, 4.0, 0.0]), start, 2.0) == pytest.approx(2.5)


def test_a_picture_without_the_start_shows_the_present(tmp_path: Path):
    places = GuardPictures(tmp_path)
    path = places.compare(3, list(pictures(0)[:2]), ["a", "b"])
    assert path.is_file()
    assert places.compare(4, [], []) == tmp_path / "000004.png" and not (tmp_path / "000004.png").exists()


def test_pictures_of_several_sizes_stand_beside_those_of_the_start(tmp_path: Path):
    places, now = GuardPictures(tmp_path), [torch.full((3, size, size), 0.2) for size in (32, 64)]
    alone = places.compare(3, now, ["a", "b"]).read_bytes()
    places.keep([torch.full((3, size, size), 0.7) for size in (32, 64)])
    assert Image.open(io.BytesIO(alone)).width < Image.open(places.compare(4, now, ["a", "b"])).width


def test_what_is_seen_of_several_evaluations_is_joined():
    one = seen(pictures(0))
    both = Seen.joined([one, seen(pictures(1))])
    assert len(both.prompts) == 32 and both.statistics.shape == (32, len(STATISTICS))
    assert both.pictures is one.pictures and both.texts == one.texts == [prompt.text for prompt in PROMPTS[:8]]
