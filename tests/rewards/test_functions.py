"""Plain functions as rewards: what they may return, what they are called, when their code counts as changed."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from rlcm_fast.rewards import Reward
from rlcm_fast.rewards.functions import FunctionReward, as_scores, code_digest, name_of
from rlcm_fast.trajectory import Prompt


@pytest.mark.parametrize(
    "scores",
    [[1, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.float64)],
)
def test_numbers_of_any_kind_become_scores(scores: object):
    torch.testing.assert_close(as_scores(scores), torch.tensor([1.0, 2.0]))


def test_scores_may_be_a_list_of_tensors_and_none_stays_none():
    torch.testing.assert_close(as_scores([torch.tensor(1.0), torch.tensor(2)]), torch.tensor([1.0, 2.0]))
    assert as_scores(None) is None


def test_a_function_gets_texts_and_follows_the_protocol():
    reward = FunctionReward(lambda images, texts: [len(text) for text in texts])
    assert isinstance(reward, Reward)
    assert reward(torch.zeros(2, 3, 4, 4), [Prompt("a"), Prompt("a cat")]).tolist() == [1.0, 5.0]


def _doubled(images, texts):
    """Is told apart by what it does."""
    return 2 * images.mean(dim=(1, 2, 3))


class _Called:
    def __call__(self, images, texts):
        return [0.0] * len(texts)


def test_names_are_those_of_functions_and_classes():
    named = [_doubled, functools.partial(_doubled, texts=[]), _Called(), _Called().__call__, lambda images, texts: 0]
    assert [name_of(reward) for reward in named] == ["_doubled", "_doubled", "_Called", "__call__", "lambda"]


def test_the_digest_of_code_changes_with_what_it_does_and_not_with_its_place():
    one, same, other = (lambda i, t: i * 2), (lambda i, t: i * 2), (lambda i, t: i * 3)
    assert code_digest(one) == code_digest(same) != code_digest(other)
    assert code_digest(_Called()) == code_digest(_Called().__call__) is not None
    assert code_digest(functools.partial(_doubled)) is None
    nested = [lambda i, t: [(lambda x: x + 1)(x) for x in i], lambda i, t: [(lambda x: x + 2)(x) for x in i]]
    assert code_digest(nested[0]) != code_digest(nested[1])
