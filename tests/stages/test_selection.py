"""Which transitions an update trains on."""

# B samples, K actions: 8 x 5

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import UpdateConfig
from rlcm_fast.stages.selection import Selection
from rlcm_fast.trajectory import Conditioning, Trajectory

B, K = 8, 5


def select(samples_together: int = 1, seed: int = 0, **settings: Any) -> Selection:
    conditioning = Conditioning(torch.zeros(1, 1, 1), torch.zeros(B, dtype=torch.int64))
    trajectory = Trajectory(torch.zeros(B, K + 1, 1, 1, 1), torch.zeros(B, K), conditioning)
    return Selection(trajectory, UpdateConfig(**settings), samples_together, torch.Generator().manual_seed(seed))


def trained(selection: Selection) -> Tensor:
    """(U, N) the transitions of a pass in the order of training."""
    return torch.stack([part.rows[part.order] for part in selection.one_pass()])


def steps_of(rows: Tensor) -> set[int]:
    return set((rows % K).tolist())


@pytest.mark.parametrize("num_updates", [1, 2, 4])
@pytest.mark.parametrize("samples_together", [1, 2])
def test_a_pass_has_every_transition_once(num_updates: int, samples_together: int):
    selection = select(samples_together, num_updates=num_updates)
    parts = trained(selection)
    assert parts.shape == (num_updates, B * K // num_updates)
    assert parts.flatten().sort().values.tolist() == selection.rows.tolist() == list(range(B * K))
    assert not torch.equal(parts, trained(selection)), "a second pass has another order"


def test_pairs_stay_together_with_all_their_actions_in_order():
    for part in select(samples_together=2, num_updates=2).one_pass():
        assert part.order.tolist() != list(range(len(part.rows))), "micro-batches mix them"
        for pair in part.rows.reshape(-1, 2 * K):
            first = int(pair[0])
            assert first % (2 * K) == 0
            assert pair.tolist() == list(range(first, first + 2 * K))


def test_mixed_subsampling_draws_other_steps_for_each_sample_and_rollout():
    selection = select(num_timesteps=2)
    samples = selection.rows.reshape(B, 2)
    assert (samples // K == torch.arange(B)[:, None]).all(), "two steps of every sample"
    assert len({tuple(row) for row in (samples % K).tolist()}) > 1
    assert trained(selection).flatten().sort().values.tolist() == selection.rows.tolist()
    assert selection.rows.tolist() != select(num_timesteps=2, seed=1).rows.tolist()


def test_every_step_is_drawn_about_as_often():
    drawn = torch.cat([select(num_timesteps=2, seed=seed).rows % K for seed in range(300)])
    share = torch.bincount(drawn, minlength=K) / len(drawn)
    assert (share - 1 / K).abs().max() < 0.02  # 4800 draws: a standard deviation of 0.006


def test_by_step_an_update_is_one_step_of_all_samples():
    parts = trained(select(num_timesteps=3, num_updates=3, order="by_step"))
    steps = [steps_of(part) for part in parts]
    assert all(len(of_update) == 1 for of_update in steps) and len(set.union(*steps)) == 3
    assert all(sorted((part // K).tolist()) == list(range(B)) for part in parts)
    assert any((part // K).tolist() != list(range(B)) for part in parts), "shuffled"


def test_by_step_an_update_is_one_step_on_all_processes(monkeypatch: pytest.MonkeyPatch):
    theirs: list[Any] = []

    def of_two_ranks(mine: list[Any]) -> list[Any]:
        theirs.extend(mine if not theirs else [])
        return [*theirs, *mine]

    monkeypatch.setattr(parallel, "all_gather_list", of_two_ranks)
    settings = {"num_timesteps": 3, "num_updates": 3, "order": "by_step"}
    ranks = [trained(select(seed=seed, **settings)) for seed in (0, 1)]
    assert [steps_of(part) for part in ranks[0]] == [steps_of(part) for part in ranks[1]]
    assert not torch.equal(*ranks), "each has an order of its own samples"


def test_by_step_hands_out_whole_steps_to_fewer_updates():
    parts = trained(select(num_timesteps=4, num_updates=2, order="by_step"))
    assert [len(steps_of(part)) for part in parts] == [2, 2]
