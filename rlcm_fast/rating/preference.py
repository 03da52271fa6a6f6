"""Fits a linear score of embeddings to rankings: Plackett and Luce's model, for two images Bradley and Terry's.

A ranking is made by picking the best image, then the best of the rest, each with a probability of e^s over the sum of
e^s of all that are left (Luce 1959; Plackett 1975, Applied Statistics 24; Bradley & Terry 1952, Biometrika 39). With
s = w x, -log p is convex in w, plus l2 / 2 |w|^2 on features of mean 0 and deviation 1:

    -log p = sum over images i of [log sum_j a_ij e^(s_j) - s_i],    a_ij = 1 if j is not better than i, else 0

Ties are half wins: for the l-th of m tied images, l from 0 on, a_ij is 1 - l / m for the tied ones. That is Efron's
rule for tied events in Cox's likelihood (1977, JASA 72); for two tied images it is half a win for each. Davidson (1970,
JASA 65) also models how often ties happen, with one more parameter, which scores alone do not need. Images that tie for
the last place, below others, were only left out by the person: they say nothing about each other. `l2` is chosen by
cross-validation over rankings.
"""

# N images, F features, R rankings of at most n images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 5
_ITERATIONS = 200


@dataclass(frozen=True)
class Ranking:
    """The images of one prompt, as rows of the embeddings, and their ranks."""

    rows: Sequence[int]
    ranks: Sequence[int]  # 1 is best, equal numbers tie


@dataclass(frozen=True)
class Head:
    """A linear score, of deviation 1 over the images that it was fitted to."""

    weights: Tensor  # (F,) float64
    bias: float
    l2: float
    accuracy: float  # share of held-out pairs in the right order; a tied score is half right
    num_pairs: int  # pairs of images of one prompt that are not tied

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Returns the scores (N,) float32 of embeddings (N, F)."""
        return (embeddings.double() @ self.weights.to(embeddings.device) + self.bias).float()


def fit(embeddings: Tensor, rankings: Sequence[Ranking]) -> Head:
    """Fits the head to embeddings (N, F) and rankings of their rows.

    Raises:
        ValueError: there are fewer than two rankings that prefer an image, or the embedding cannot tell images apart.
    """
    # Standardise the features; a constant one tells nothing.
    rankings = [ranking for ranking in rankings if len(ranking.rows) > 1]
    if sum(len(set(ranking.ranks)) > 1 for ranking in rankings) < 2:
        raise ValueError("fewer than two prompts have one image preferred to another; rate more")
    mean, deviation = embeddings.double().mean(dim=0), embeddings.double().std(dim=0, correction=0)
    scale = torch.where(deviation > 1e-8, 1 / deviation.clamp(min=1e-8), torch.zeros_like(deviation))
    features = (embeddings.double() - mean) * scale

    # Choose the penalty by how well other rankings are predicted, then fit to all.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rankings), generator=generator).tolist()
    folds = [[rankings[place] for place in order[first::_FOLDS]] for first in range(min(_FOLDS, len(rankings)))]
    tried = [(_held_out(features, folds, l2), l2) for l2 in _PENALTIES]
    (_, accuracy), l2 = min(tried, key=lambda found: found[0][0])
    weights = _fitted(features, rankings, l2)

    # Scale the scores, and put the standardisation into the weights.
    spread = (features @ weights).std(correction=0)
    if not spread > 1e-6:
        raise ValueError("the embedding cannot tell preferred images from others; give another embedding")
    weights = weights * scale / spread
    num_pairs = sum(_num_pairs(ranking) for ranking in rankings)
    return Head(weights, -float(mean @ weights), l2, accuracy, num_pairs)


def negative_log_likelihood(scores: Tensor, rankings: Sequence[Ranking]) -> Tensor:
    """Returns -log p of the rankings, (), for scores (N,) of all images; differentiable."""
    rows, present, ranks = _padded(rankings, scores.device)
    of_images = scores[rows]  # (R, n)
    log_shares, counts = _log_shares(ranks, present)
    log_sums = torch.logsumexp(of_images[:, None, :] + log_shares, dim=2)  # (R, n)
    return ((log_sums - of_images) * counts).sum()


def _padded(rankings: Sequence[Ranking], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows, whether there is an image, and ranks, each (R, n)."""
    longest = max(len(ranking.rows) for ranking in rankings)
    rows, ranks = torch.zeros(2, len(rankings), longest, dtype=torch.int64)
    for number, ranking in enumerate(rankings):
        rows[number, : len(ranking.rows)] = torch.tensor(ranking.rows)
        ranks[number, : len(ranking.rows)] = torch.tensor(ranking.ranks)
    return rows.to(device), (ranks > 0).to(device), ranks.to(device)


def _log_shares(ranks: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log a_ij (R, n, n), and whether image i counts (R, n), for ranks (R, n)."""
    is_tied = (ranks[:, :, None] == ranks[:, None, :]) & present[:, None, :]
    is_left = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, None, :]
    place = is_tied.tril(-1).sum(dim=2)  # l: of the images tied with i, how many come before it in the row
    share = 1 - place / is_tied.sum(dim=2).clamp(min=1)
    shares = torch.where(is_tied, share[:, :, None].expand(is_tied.shape), is_left.double())

    # The last place counts only if all are tied.
    worst = ranks.amax(dim=1, keepdim=True)
    all_tied = (torch.where(present, ranks, worst) == worst).all(dim=1, keepdim=True)
    counts = present & ((ranks != worst) | all_tied)
    shares = torch.where(counts[:, :, None], shares, torch.ones_like(shares))  # finite where nothing counts
    return shares.log(), counts.double()


def _fitted(features: Tensor, rankings: Sequence[Ranking], l2: float) -> Tensor:
    """Returns the weights (F,) that minimise -log p + l2 / 2 |w|^2."""
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = negative_log_likelihood(features @ weights, rankings) + l2 / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def _held_out(features: Tensor, folds: Sequence[Sequence[Ranking]], l2: float) -> tuple[float, float]:
    """Returns -log p of all rankings and the share of right pairs, each fold predicted from the others."""
    loss, right, total = 0.0, 0.0, 0
    for number, fold in enumerate(folds):
        others = [ranking for place, of_fold in enumerate(folds) if place != number for ranking in of_fold]
        scores = features @ _fitted(features, others, l2)
        loss += float(negative_log_likelihood(scores, fold))
        for ranking in fold:
            right += _right_pairs(scores[list(ranking.rows)], torch.tensor(ranking.ranks))
            total += _num_pairs(ranking)
    return loss, right / max(1, total)


def _right_pairs(scores: Tensor, ranks: Tensor) -> float:
    is_better = ranks[:, None] < ranks[None, :]
    difference = scores[:, None] - scores[None, :]
    return float((is_better & (difference > 0)).sum() + (is_better & (difference == 0)).sum() / 2)


def _num_pairs(ranking: Ranking) -> int:
    ranks = torch.tensor(ranking.ranks)
    return int((ranks[:, None] < ranks[None, :]).sum())
