"""Random numbers by place, and what the helpers do in a single process; tests/test_processes.py has two."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.faults import Diverged, Fault


def draw(seed: int, *place: int) -> torch.Tensor:
    return torch.randn(64, generator=parallel.generator(seed, *place))


def test_a_place_has_the_same_random_numbers_every_time():
    assert torch.equal(draw(7, 1, 2), draw(7, 1, 2))


def test_neighbouring_places_have_unrelated_random_numbers():
    places = [(seed, *place) for seed in range(3) for place in [(), *product(range(3)), *product(range(3), repeat=2)]]
    draws = torch.stack([draw(*place) for place in places])
    correlation = torch.corrcoef(draws) - torch.eye(len(places))
    assert correlation.abs().max() < 0.6  # five standard deviations of 64 independent numbers


def test_no_two_places_of_a_run_share_a_seed():
    places = product(range(4), range(8), range(50))  # purpose, rank, iteration
    seeds = [parallel.generator(0, *place).initial_seed() for place in places]
    assert len(set(seeds)) == len(seeds)


def test_a_single_process_has_its_own_values_only():
    assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
    values = torch.arange(3)
    assert torch.equal(parallel.all_gather(values), values)
    assert parallel.all_gather_list(["a"]) == ["a"]
    assert parallel.any_rank(True) and not parallel.any_rank(False)
    parallel.barrier()


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_values_travel_by_way_of_the_gpu_where_nccl_carries_them(backend: str, monkeypatch: pytest.MonkeyPatch):
    """NCCL says "No backend type associated with device type cpu" of rewards, which are in the CPU's memory."""
    on_gpu: list[Tensor] = []  # a copy stands for the tensor on a GPU

    def cuda(values: Tensor) -> Tensor:
        on_gpu.append(values.clone())
        return on_gpu[-1]

    def is_on_gpu(values: Tensor) -> bool:
        return any(values is other for other in on_gpu)

    def all_gather(parts: list[Tensor], values: Tensor) -> None:
        assert is_on_gpu(values) == (backend == "nccl")
        for part in parts:
            part.copy_(values)

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.mul_(2))
    monkeypatch.setattr(Tensor, "cuda", cuda)
    assert parallel.all_gather(torch.arange(2)).tolist() == [0, 1, 0, 1]
    values = torch.arange(2.0)
    assert parallel.mean(values).tolist() == [0.0, 1.0] == values.tolist()
    assert len(on_gpu) == (2 if backend == "nccl" else 0)


def test_a_lost_process_is_known_by_what_the_libraries_say():
    said = "[pair.cc:553] Connection closed by peer [10.0.0.2]:52387. This is typically caused by a remote worker"
    assert parallel.lost_process(RuntimeError(said)) == "Connection closed by peer"
    assert parallel.lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert parallel.lost_process(OSError("Broken pipe")) is None, "of a file, say"


@pytest.mark.parametrize(
    ("faults", "expected", "message"),
    [
        ([None, Fault("a reward failed")], Fault, r"^a reward failed \(rank 1\)$"),
        ([Fault("first"), Fault("second")], Fault, r"^first \(rank 0\)$"),
        ([Fault("first"), Diverged("worst")], Diverged, r"^worst \(rank 1\)$"),
    ],
)
def test_every_rank_raises_the_same_fault_at_one_place(
    faults: list[Fault | None], expected: type[Fault], message: str, monkeypatch: pytest.MonkeyPatch
):
    sent = [(type(fault), str(fault), number) for number, fault in enumerate(faults) if fault]
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "all_gather_list", lambda mine: sent)
    for number, fault in enumerate(faults):
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        with pytest.raises(expected, match=message) as raised:
            parallel.raise_together(fault)
        assert type(raised.value) is expected and raised.value.is_on_all_processes
        assert raised.value.__cause__ is fault


def test_one_process_raises_its_own_fault_and_none_is_no_fault():
    parallel.raise_together(None)
    with pytest.raises(Fault, match="^gone$"):
        parallel.raise_together(Fault("gone"))
