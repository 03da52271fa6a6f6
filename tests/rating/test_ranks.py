"""Ranks become scores in [-1, 1] that sum to 0 within a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcm_fast.rating.ranks import check_ranks, ranks_of, scores_of


@pytest.mark.parametrize(
    ("tiers", "ranks"),
    [
        ([[0], [1], [2], [3]], [1, 2, 3, 4]),
        ([[2]], [2, 2, 1, 2]),  # the best alone: the others tie for the last place
        ([[1, 3], [0]], [3, 1, 4, 1]),  # as in sport
        ([[3, 2, 1, 0]], [1, 1, 1, 1]),
    ],
)
def test_tiers_become_ranks(tiers: list[list[int]], ranks: list[int]):
    assert ranks_of(tiers, 4) == ranks


@pytest.mark.parametrize("tiers", [[], [[]], [[0], []], [[4]], [[-1]], [[0, 0]], [[0], [0]], [["0"]], [[True], [1]]])
def test_tiers_that_are_none_are_refused(tiers: list):
    with pytest.raises(ValueError, match="tiers"):
        ranks_of(tiers, 4)


@pytest.mark.parametrize(
    ("ranks", "scores"),
    [
        ([1, 2, 3], [1, 0, -1]),
        ([2, 2, 1, 2], [-1 / 3, -1 / 3, 1, -1 / 3]),
        ([1, 1, 3, 4], [2 / 3, 2 / 3, -1 / 3, -1]),
        ([1, 1], [0, 0]),
        ([1], [0]),
    ],
)
def test_the_score_is_wins_minus_losses_over_the_others(ranks: list[int], scores: list[float]):
    assert scores_of(ranks) == pytest.approx(scores)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_scores_sum_to_zero_and_fall_with_the_rank(ranks: list[int]):
    scores = scores_of(ranks)
    assert sum(scores) == pytest.approx(0, abs=1e-12)
    assert all(-1 <= score <= 1 for score in scores)
    for one, rank in zip(scores, ranks, strict=True):
        for other, other_rank in zip(scores, ranks, strict=True):
            assert (one > other) == (rank < other_rank)


def test_ranks_are_whole_numbers_from_one_on():
    check_ranks([1, 2], 2)
    for ranks in ([1], [0, 1], [1.0, 2], [True, 2]):
        with pytest.raises(ValueError, match="ranks"):
            check_ranks(ranks, 2)
