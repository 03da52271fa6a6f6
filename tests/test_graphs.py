"""Work that is recorded once and replayed, on CPUs by a recorder that replays operations as a CUDA graph does."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from recorded_work import CpuRecorder
from torch import Tensor

from rlcm_fast import graphs
from rlcm_fast.graphs import MAX_GRAPHS, GraphFailed, Graphs, Work


@dataclass(frozen=True)
class Pair:
    first: Tensor
    second: Tensor | None
    more: tuple[Tensor, ...] = ()


class Setting:
    def __init__(self, must_work: bool = False) -> None:
        self.said: list[str] = []
        self.recorder = CpuRecorder()
        self.graphs = Graphs(self.recorder, self.said.append, must_work)
        self.weight = torch.ones(3)


def test_replays_compute_with_new_inputs_and_results_stay():
    setting, calls = Setting(), []

    def run(pair: Pair) -> Pair:
        calls.append(1)
        total = pair.first * 2 + pair.more[0]
        return Pair(total, None, (total.sum(),))

    work = Work("sum", run)
    results = []
    for value in (1.0, 2.0, 3.0):
        pair = Pair(torch.full((3,), value), None, (torch.full((3,), 10 * value),))
        results.append(setting.graphs(work, pair))
    for value, result in zip((1.0, 2.0, 3.0), results, strict=True):
        assert torch.equal(result.first, torch.full((3,), 12 * value)) and result.more[0] == 36 * value
        assert result.second is None
    assert len(calls) == 2 and setting.recorder.num_recorded == 1  # run as it is, and recorded
    [line] = setting.said
    assert re.fullmatch(r"graphs: recorded the sum in \d+\.\d s, with the run that it was compared with", line)


def test_an_input_that_has_changed_in_place_is_copied_again():
    setting, x = Setting(), torch.ones(3)
    work = Work("double", lambda x: x * 2)
    assert setting.graphs(work, x).tolist() == [2, 2, 2]
    x += 1
    assert setting.graphs(work, x).tolist() == [4, 4, 4]
    x = torch.full((3,), 5.0)
    assert setting.graphs(work, x).tolist() == [10, 10, 10]


def test_fixed_tensors_may_change_their_values_and_if_they_move_it_is_recorded_anew():
    setting = Setting()
    work = Work("product", lambda x: x * setting.weight, fixed=lambda: [setting.weight])
    assert setting.graphs(work, torch.ones(3)).tolist() == [1, 1, 1]
    setting.weight.fill_(3.0)
    assert setting.graphs(work, torch.ones(3)).tolist() == [3, 3, 3]
    setting.weight = torch.full((3,), 4.0)
    assert setting.graphs(work, torch.ones(3)).tolist() == [4, 4, 4]
    assert setting.recorder.num_recorded == 2 and setting.recorder.num_forgotten == 1
    assert setting.said[1] == "graphs: the weights of the product lie elsewhere now; recording anew"


def test_what_recording_adds_to_fixed_tensors_is_undone():
    setting, total = Setting(), torch.zeros(3)

    def run(x: Tensor) -> Tensor:
        total.add_(x)
        return x.sum()

    work = Work("addition", run, lambda: [total], sums=lambda: [total])
    setting.graphs.record(work, torch.ones(3))
    assert total.tolist() == [0] * 3
    for count in (1, 2, 3):
        setting.graphs(work, torch.ones(3))
        assert total.tolist() == [count] * 3
    assert setting.recorder.num_replayed == 1 + 3


def test_what_adds_to_sums_is_recorded_on_request_alone_so_that_no_sum_is_lost():
    setting, total = Setting(), torch.zeros(2)

    def run(x: Tensor) -> Tensor:
        total.add_(x.sum())
        return x.sum()

    work = Work("addition", run, lambda: [total], sums=lambda: [total])
    setting.graphs.record(work, torch.ones(3))
    setting.graphs(work, torch.ones(3))
    setting.graphs(work, torch.ones(5))  # no graph
    assert total.tolist() == [8, 8] and setting.recorder.num_recorded == 1
    total = torch.tensor([8.0, 8.0])  # it lies elsewhere, and is not zero
    setting.graphs(work, torch.ones(3))
    assert total.tolist() == [11, 11] and setting.recorder.num_forgotten == 1
    total.zero_()
    for x in (torch.ones(3), torch.ones(5)):
        setting.graphs.record(work, x)
    for x in (torch.ones(3), torch.ones(5), torch.ones(3)):
        setting.graphs(work, x)
    assert total.tolist() == [11, 11] and setting.recorder.num_recorded == 3


def test_a_shape_that_cannot_be_recorded_ends_the_graphs_of_its_work_and_leaves_sums_of_zero():
    setting, total = Setting(), torch.zeros(2)

    def run(x: Tensor) -> Tensor:
        total.add_(x.sum())
        return x.sum() if len(x) == 3 else x.sum() + x.sum().item()

    work, other = Work("addition", run, lambda: [total], sums=lambda: [total]), Work("double", lambda x: x * 2)
    setting.graphs(other, torch.ones(1))
    for x in (torch.ones(3), torch.ones(5)):
        setting.graphs.record(work, x)
        assert total.tolist() == [0, 0]
    assert setting.said[2].startswith("graphs: the addition runs without one from here on: it could not be recorded (")
    for x in (torch.ones(3), torch.ones(5)):
        setting.graphs(work, x)
    assert total.tolist() == [8, 8] and len(setting.said) == 3
    assert setting.graphs(other, torch.ones(1)).tolist() == [2]
    assert setting.recorder.num_forgotten == 0 and setting.recorder.num_recorded == 2


def test_each_state_of_the_host_has_a_graph():
    setting, factor = Setting(), [2]
    for factor[0] in (2, 3, 2, 3):
        work = Work("product", lambda x: x * factor[0], state=factor[0])
        assert setting.graphs(work, torch.ones(3)).tolist() == [factor[0]] * 3
    assert setting.recorder.num_recorded == 2


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda x: x * x.sum().item(), "could not be recorded (it waits for the device: a tensor was read"),
        (lambda x: x + torch.rand(3), "could not be recorded (it draws random numbers: aten.rand.default)"),
        (lambda x, count=[0]: (count.append(0), x * len(count))[1], "its replay gave other results than its first run"),
    ],
)  # fmt: skip
def test_what_no_graph_can_replay_runs_without_one_or_is_an_error(run, problem: str):
    setting = Setting()
    for _ in range(2):
        assert setting.graphs(Work("work", run), torch.ones(3)).shape == (3,)
    assert len(setting.said) == 1 and problem in setting.said[0]
    assert setting.said[0].startswith("graphs: the work runs without one from here on: ")
    with pytest.raises(GraphFailed, match=r"engine.graphs=on: the graph of the work: .*; set engine.graphs=off"):
        Setting(must_work=True).graphs(Work("work", run), torch.ones(3))


def test_a_gradient_with_another_sign_is_noticed_though_its_norm_is_right():
    setting, total, calls = Setting(), torch.zeros(3), []

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        total.add_(x * (-1 if len(calls) == 2 else 1))  # wrong while it is recorded
        return x.sum()

    work = Work("addition", run, lambda: [total], sums=lambda: [total])
    setting.graphs.record(work, torch.ones(3))
    setting.graphs(work, torch.ones(3))
    assert "its replay gave other results than its first run" in setting.said[0]
    assert total.tolist() == [1.0] * 3


def test_a_gradient_that_differs_by_rounding_or_is_nothing_else_stays():
    large, tiny = torch.ones(1000, dtype=torch.bfloat16), torch.full((3,), 1e-5, dtype=torch.bfloat16)
    assert graphs._add_up_alike([large, tiny], [large * 1.01, -tiny])
    assert not graphs._add_up_alike([large, tiny], [large * 0, tiny])
    assert not graphs._add_up_alike([large], [large * torch.nan])
    assert graphs._add_up_alike([large * torch.nan], [large * torch.nan])
    assert not graphs._add_up_alike([large.float()], [large.float() * 1.01])


def test_whatever_a_library_raises_while_it_is_recorded_leaves_a_run_without_that_graph():
    setting, calls = Setting(), []

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no kernel for this")
        return x * 2

    for _ in range(2):
        assert setting.graphs(Work("work", run), torch.ones(3)).tolist() == [2.0] * 3
    assert setting.said == [
        "graphs: the work runs without one from here on: it could not be recorded (no kernel for this)"
    ]


def test_only_so_many_shapes_have_a_graph():
    setting, work = Setting(), Work("double", lambda x: x * 2)
    for size in (*range(1, MAX_GRAPHS + 3), 1):
        assert setting.graphs(work, torch.ones(size)).tolist() == [2.0] * size
    assert setting.recorder.num_recorded == MAX_GRAPHS and setting.recorder.num_replayed == 2 * MAX_GRAPHS + 1
    line = f"graphs: there are {MAX_GRAPHS} of the double; further shapes run without one"
    assert setting.said[MAX_GRAPHS:] == [line]
    assert setting.graphs(Work("triple", lambda x: x * 3), torch.ones(1)).tolist() == [3]
    assert setting.recorder.num_recorded == MAX_GRAPHS + 1  # each kind of work has its own
