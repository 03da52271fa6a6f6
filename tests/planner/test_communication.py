"""The model of communication against numbers worked out by hand."""

from __future__ import annotations

import pytest

from rlcm_fast.planner.communication import Network, TrafficCase, bytes_sent, efficiency, smallest_global_batch

NETWORK = Network(within_node=100.0, between_nodes=25.0, gpus_per_node=2)


def case(zero_stage: int, num_processes: int) -> TrafficCase:
    """400 bytes of weights; a sample takes 10 s and is one micro-batch and 2 passes of the rollout."""
    return TrafficCase(NETWORK, zero_stage, num_processes, 200, 2, 10.0, 4, 4, 2, 1)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, 2 * 3 / 4 * 1000),
        (1, 2 * 3 / 4 * 1000),
        (2, (5 + 1) * 3 / 4 * 1000),
        (3, (3 * 5 + 7) * 3 / 4 * 1000),
    ],
)
def test_bytes_of_four_processes_five_micro_batches_and_seven_rollout_passes(stage: int, expected: float):
    assert bytes_sent(stage, 4, 1000, 5, 7) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_process_alone_says_nothing(stage: int):
    assert bytes_sent(stage, 1, 1000, 5, 7) == 0
    assert efficiency(case(stage, 1), 1) == 1
    assert smallest_global_batch(case(stage, 1)) == 1


def test_stage_0_of_sd15_on_eight_gpus_sends_three_gigabytes_in_bfloat16():
    assert bytes_sent(0, 8, 2 * 859_600_000, 1) == pytest.approx(3.0086e9)


def test_a_ring_is_as_slow_as_its_slowest_link():
    assert NETWORK.bandwidth(2) == 100
    assert NETWORK.bandwidth(3) == 25
    assert Network(100.0, 400.0).bandwidth(64) == 100


def test_efficiency_by_hand():
    # 2 processes send 2 * 1/2 * 400 = 400 bytes at 100 bytes/s: 4 s beside 30 s of three samples
    assert efficiency(case(1, 2), 3) == pytest.approx(30 / 34)
    assert efficiency(case(1, 2), 3, overlap=0.5) == pytest.approx(30 / 32)
    # stage 3: 3 micro-batches of 3 passes and 3 * 2 of the rollout, 15 * 200 bytes: 30 s
    assert efficiency(case(3, 2), 3) == pytest.approx(30 / 60)


def test_the_smallest_batch_by_hand():
    # over 90 % takes more than 9 * 4 s of compute: 4 samples on each of 2 processes
    assert smallest_global_batch(case(1, 2)) == 8
    # 4 processes: 2 * 3/4 * 400 = 600 bytes at 25 bytes/s are 24 s, so 22 samples (more than 216 s)
    assert smallest_global_batch(case(1, 4)) == 88
    assert smallest_global_batch(case(1, 4), overlap=0.5) == 44


def test_what_grows_with_the_batch_no_batch_pays_for():
    assert smallest_global_batch(case(3, 2)) is None
