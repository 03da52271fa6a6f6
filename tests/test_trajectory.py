"""Trajectories: flat transition indices, shared encodings, concatenation."""

# B samples, K actions, D distinct prompts, L tokens, E embedding

from __future__ import annotations

import pytest
import torch

from rlcm_fast.trajectory import Conditioning, Trajectory

B, K, D = 5, 3, 2


def make(table: torch.Tensor | None = None, offset: float = 0.0) -> Trajectory:
    table = torch.randn(D, 4, 6) if table is None else table
    conditioning = Conditioning(table, torch.arange(B) % D, torch.zeros(1, 4, 6))
    latents = torch.arange(B * (K + 1)).view(B, K + 1, 1, 1, 1).expand(B, K + 1, 2, 3, 3).float() + offset
    return Trajectory(latents, torch.arange(B * K).view(B, K).float() + offset, conditioning)


def test_counts_follow_from_the_log_probs() -> None:
    trajectory = make()
    assert (trajectory.num_samples, trajectory.num_actions, trajectory.num_transitions) == (B, K, B * K)


def test_a_flat_row_is_sample_times_actions_plus_step() -> None:
    trajectory, rows = make(), torch.randperm(B * K)
    part = trajectory.transitions(rows)
    assert torch.equal(part.sample * K + part.step, rows)
    assert torch.equal(part.log_prob_old, rows.float())
    assert torch.equal(part.x_s, part.x_t + 1)  # neighbours in time
    assert torch.equal(part.x_t[:, 0, 0, 0], (part.sample * (K + 1) + part.step).float())


def test_transitions_carry_the_encoding_of_their_sample() -> None:
    trajectory = make()
    part = trajectory.transitions(torch.tensor([14, 0, 4]))
    assert torch.equal(part.conditioning.embeds, trajectory.conditioning.embeds[[4, 0, 1]])
    assert part.conditioning.prompt_embeds is trajectory.conditioning.prompt_embeds


def test_cat_keeps_the_order_and_shares_the_table() -> None:
    table = torch.randn(D, 4, 6)
    parts = [make(table), make(table, offset=100.0)]
    whole = Trajectory.cat(parts)
    assert whole.num_samples == 2 * B
    assert torch.equal(whole.latents[B:], parts[1].latents)
    assert torch.equal(whole.conditioning.embeds[B:], parts[1].conditioning.embeds)
    assert whole.conditioning.prompt_embeds is table
    assert whole.conditioning.negative_embeds is parts[0].conditioning.negative_embeds


def test_cat_refuses_different_tables_and_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="prompt_embeds"):
        Trajectory.cat([make(), make()])
    with pytest.raises(ValueError, match=r"parts=\[\]"):
        Trajectory.cat([])
