"""The Plackett-Luce head, against closed forms and against rankings that it made itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlcm_fast.rating.preference import Ranking, fit, negative_log_likelihood


def test_two_images_are_bradley_and_terrys():
    scores = torch.tensor([0.7, -0.4], dtype=torch.float64)
    loss = negative_log_likelihood(scores, [Ranking([0, 1], [1, 2])])
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.1))))


def test_the_orders_of_four_images_are_a_distribution():
    scores = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        ranks = [order.index(image) + 1 for image in range(4)]
        total += math.exp(-negative_log_likelihood(scores, [Ranking(range(4), ranks)]).item())
    assert total == pytest.approx(1)


def test_a_tie_of_two_is_half_a_win_for_each():
    scores = torch.tensor([0.7, -0.4], dtype=torch.float64)
    tie = negative_log_likelihood(scores, [Ranking([0, 1], [1, 1])]).item()
    wins = [negative_log_likelihood(scores, [Ranking([0, 1], ranks)]).item() for ranks in ([1, 2], [2, 1])]
    assert tie == pytest.approx(sum(wins) - math.log(2))


def test_a_tie_above_others_follows_efrons_rule():
    scores = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
    e = scores.exp()
    expected = math.log(e.sum()) + math.log(e.sum() - 0.5 * (e[0] + e[2])) - (scores[0] + scores[2])
    assert negative_log_likelihood(scores, [Ranking([0, 1, 2], [1, 3, 1])]).item() == pytest.approx(expected.item())


def test_images_that_were_left_out_say_nothing_about_each_other():
    picked = [Ranking(range(4), [1, 2, 2, 2])]
    scores = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64)
    assert negative_log_likelihood(scores, picked).item() == pytest.approx(-math.log(scores.softmax(0)[0].item()))


def test_rankings_of_several_lengths_add_up_and_have_exact_gradients():
    rankings = [Ranking([0, 1], [2, 1]), Ranking([4, 2, 3], [1, 1, 3]), Ranking(range(5), [3, 1, 1, 4, 5])]
    scores = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    together = negative_log_likelihood(scores, rankings)
    alone = sum(negative_log_likelihood(scores, [ranking]).item() for ranking in rankings)
    assert together.item() == pytest.approx(alone)
    assert torch.autograd.gradcheck(lambda values: negative_log_likelihood(values, rankings), scores)


def drawn(weights: torch.Tensor, num_rankings: int, size: int) -> tuple[torch.Tensor, list[Ranking]]:
    """Embeddings, and rankings that the model with these weights makes of them (Gumbel noise on the scores)."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(num_rankings * size, len(weights), generator=generator) * 3 + 1
    gumbel = -(-torch.rand(num_rankings * size, generator=generator).log()).log()
    noisy = (embeddings @ weights + gumbel).reshape(num_rankings, size)
    ranks = (-noisy).argsort(dim=1).argsort(dim=1) + 1
    return embeddings, [Ranking(range(i * size, (i + 1) * size), ranks[i].tolist()) for i in range(num_rankings)]


def test_the_head_finds_the_weights_that_made_the_rankings():
    weights = torch.tensor([0.6, -0.3, 0.0, 0.15])
    embeddings, rankings = drawn(weights, 400, 4)
    head = fit(embeddings, rankings)
    scores = embeddings @ weights
    assert torch.corrcoef(torch.stack([head(embeddings), scores]))[0, 1] > 0.995
    assert head(embeddings).std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert head(embeddings).mean().item() == pytest.approx(0, abs=1e-5)
    assert 0.7 < head.accuracy < 0.95
    assert head.num_pairs == 400 * 6


def test_what_cannot_be_learned_from_is_refused():
    with pytest.raises(ValueError, match="fewer than two prompts"):
        fit(torch.randn(4, 2), [Ranking([0, 1], [1, 1]), Ranking([2, 3], [1, 2])])
    with pytest.raises(ValueError, match="cannot tell"):
        fit(torch.ones(8, 3), [Ranking([i, i + 1], [1, 2]) for i in range(7)])
