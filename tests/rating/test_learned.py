"""The reward `ratings`: what a rater preferred, learned from the file and the images beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.rating.learned import Ratings
from rlcm_fast.rating.ranks import ranks_of
from rlcm_fast.rating.records import Journal, Rating
from rlcm_fast.rewards import make_reward
from rlcm_fast.shapes.embedding import NUM_FEATURES, ShapesEmbedding
from rlcm_fast.shapes.grammar import Caption, Object
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import scene_of
from rlcm_fast.trajectory import Prompt

PROMPT = Prompt("a fox")


def picture(red: float, seed: int) -> Tensor:
    """A noisy image with so much red."""
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))
    noise[0] = 0.6 * noise[0] + 0.4 * red
    return noise


def recorded(folder: Path, num_prompts: int) -> Path:
    """A file whose rater picks the reddest of three images, and skips each fifth prompt."""
    journal = Journal(folder / "ratings.jsonl")
    generator = torch.Generator().manual_seed(0)
    for number in range(num_prompts):
        reds = torch.rand(3, generator=generator).tolist()
        files = []
        for place, red in enumerate(reds):
            files.append(f"ratings/{number}_{place}.png")
            (folder / files[-1]).parent.mkdir(exist_ok=True)
            pixels = (picture(red, 3 * number + place) * 255).round().to(torch.uint8).permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(folder / files[-1])
        ranks = None if number % 5 == 4 else tuple(ranks_of([[reds.index(max(reds))]], 3))
        journal.add(Rating(f"{number}", number, "ranking", "a fox", "default", tuple(files), ranks, 1.0, ""))
    return journal.file


def test_the_score_rises_with_what_the_rater_preferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reward = make_reward("ratings", {"file": str(recorded(tmp_path, 100))})
    assert isinstance(reward, Ratings)
    images = torch.stack([picture(red, 900 + number) for number, red in enumerate((0.0, 0.25, 0.5, 0.75, 1.0))])
    scores = reward(images, [PROMPT] * 5)
    assert scores.dtype == torch.float32
    assert scores.argsort().tolist() == [0, 1, 2, 3, 4]
    assert reward.head.accuracy > 0.8
    assert f"80 prompts, 160 pairs; predicts {reward.head.accuracy:.0%} of held-out pairs" in capsys.readouterr().err


def test_too_few_ratings_and_missing_images_are_named(tmp_path: Path):
    file = recorded(tmp_path, 10)
    with pytest.raises(ValueError, match="has 8 rated prompts; rate 10 or more"):
        make_reward("ratings", {"file": str(file)})
    file = recorded(tmp_path, 20)
    (tmp_path / "ratings/3_1.png").unlink()
    with pytest.raises(ValueError, match=r"3_1.png of the ratings cannot be read; keep the folder"):
        make_reward("ratings", {"file": str(file)})
    with pytest.raises(ValueError, match="cannot be read"):
        make_reward("ratings", {"file": str(tmp_path / "none.jsonl")})


def scene(shape: str, colour: str) -> Tensor:
    drawn = render(scene_of(Caption((Object(shape, colour),)), np.random.default_rng(0)))
    return torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1).float() / 255


def test_the_shapes_embedding_tells_colours_and_shapes_apart():
    images = torch.stack(
        [scene("circle", "red"), scene("star", "red"), scene("circle", "blue"), torch.zeros(3, 64, 64)]
    )
    found = ShapesEmbedding()(images, [PROMPT] * 4)
    assert found.shape == (4, NUM_FEATURES)
    assert found.min() >= 0
    assert found.max() <= 1
    circle, star = found[:, 30], found[:, 33]  # after 24 pairs and 6 colours
    assert circle[0] > star[0]
    assert star[1] > circle[1]
    assert (found[:, 24] > 0.5).tolist() == [True, True, False, False], "red"
    assert not found[3].any()
