"""Updates on images of several sizes, by one graph for each size, do the same as without graphs."""

# B samples, K actions: 8 x 2 transitions of two image sizes

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphed_updates import ADVANTAGES, WIDTHS, Setting, mixed_trajectory, same_weights
from recorded_work import CpuRecorder

from rlcm_fast.engine import direct
from rlcm_fast.stages.graphed_update import filled_sizes
from rlcm_fast.trajectory import Batch

pytestmark = pytest.mark.usefixtures("one_process")
EVEN = [0, 1, 1, 0, 1, 0, 0, 1]  # the size of each sample: 8 transitions of each size
UNEVEN = [0, 1, 0, 0, 1, 0, 0, 1]  # 10 and 6
SWAPPED = [1 - size for size in UNEVEN]  # 6 and 10


class FailingRecorder(CpuRecorder):
    """Refuses the recording of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def record(self, run: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            run()  # which has added to the gradients
            raise RuntimeError("no kernel for this")
        return super().record(run)


def pair(kl_weight: float = 0.0, **update: Any) -> tuple[Setting, Setting]:
    """Returns two settings that are alike, the first with graphs and the second without."""
    with_graphs, without = (Setting(is_graphed, kl_weight, **update) for is_graphed in (True, False))
    return with_graphs, without


def compare(with_graphs: Setting, without: Setting, rollouts: list[list[int]]) -> None:
    """Trains both on the same rollouts; they get the same weights and metrics bit for bit."""
    for seed, sizes in enumerate(rollouts):
        trajectory = mixed_trajectory(sizes, seed)
        assert with_graphs.update_on(trajectory, seed) == without.update_on(trajectory, seed)
        assert same_weights(with_graphs.engine, without.engine)


@pytest.mark.parametrize("update", [{"num_passes": 1}, {"num_passes": 2}, {"num_updates": 2}])
@pytest.mark.parametrize("kl", [(0.0, "copy"), (0.1, "copy"), (0.1, "offload")])
def test_micro_batches_of_two_sizes_in_one_update_add_up_bit_for_bit(update: dict[str, int], kl: tuple[float, str]):
    """`offload` gives the network the start weights and takes them away between the replays."""
    with_graphs, without = pair(kl[0], kl_reference=kl[1], micro_batch_size=2, **update)
    compare(with_graphs, without, [EVEN, EVEN[::-1], EVEN])
    assert with_graphs.recorder.num_recorded == 2
    assert with_graphs.recorder.num_replayed == 2 + 3 * 8 * update.get("num_passes", 1)
    assert [line.partition(" in ")[0] for line in with_graphs.said] == ["graphs: recorded the update"] * 2


def test_sums_of_many_micro_batches_of_two_sizes_are_rounded_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", 2)
    compare(*pair(micro_batch_size=2), [EVEN, EVEN])


def test_filled_micro_batches_give_the_same_bits_by_graphs_and_without():
    """Two graphs do for rollouts that have other numbers of samples of a size."""
    with_graphs = Setting(True, 0.1, micro_batch_size=4)
    filled = Setting(True, 0.1, FailingRecorder(1), micro_batch_size=4)
    plain = Setting(False, 0.1, micro_batch_size=4)
    compare(with_graphs, filled, [UNEVEN, SWAPPED, UNEVEN])
    assert with_graphs.recorder.num_recorded == 2 and filled.recorder.num_replayed == 0
    metrics = plain.update_on(mixed_trajectory(UNEVEN, 0), 0)
    again = Setting(True, 0.1, micro_batch_size=4).update_on(mixed_trajectory(UNEVEN, 0), 0)
    torch.testing.assert_close(again.loss, metrics.loss, rtol=1e-5, atol=1e-6)
    assert again.grad_norm == pytest.approx(metrics.grad_norm, rel=1e-2)  # bfloat16 has 8 bits


def test_a_size_that_first_comes_in_a_later_update_is_recorded_before_that_update():
    with_graphs, without = pair(micro_batch_size=2)
    trajectory = mixed_trajectory(EVEN, 4)
    one_size = ADVANTAGES * (torch.tensor(EVEN) == 0)  # the other one has no signal, so it is left out
    for number, advantages in enumerate((one_size, ADVANTAGES, one_size)):
        one, other = (setting.update_on(trajectory, 4, advantages) for setting in (with_graphs, without))
        assert one == other and same_weights(with_graphs.engine, without.engine)
        assert with_graphs.recorder.num_recorded == min(2, number + 1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_size_that_cannot_be_recorded_leaves_the_gradients_right(number: int):
    without = Setting(False, micro_batch_size=2)
    failing = Setting(True, recorder=FailingRecorder(number), micro_batch_size=2)
    compare(failing, without, [EVEN, EVEN])
    assert failing.said[number - 1] == (
        "graphs: the update runs without one from here on: it could not be recorded (no kernel for this)"
    )
    assert failing.recorder.num_replayed == number - 1  # as what was recorded was compared


def test_a_run_of_two_sizes_goes_on_after_a_resume_with_the_same_bits(tmp_path: Path):
    through, before = pair(micro_batch_size=2)
    compare(through, before, [EVEN])
    before.engine.save(tmp_path)
    resumed = Setting(True, micro_batch_size=2)
    resumed.engine.load(tmp_path)
    compare(through, resumed, [EVEN[::-1], EVEN])


def test_out_of_memory_in_the_recording_of_the_second_size_begins_the_update_anew():
    small, given = Setting(True, micro_batch_size=8), Setting(False, micro_batch_size=4)
    forward = small.network.forward

    def limited(x_t: Any, *inputs: Any, **more: Any) -> Any:
        if len(x_t) > 4 and x_t.shape[3] == WIDTHS[1] and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x_t, *inputs, **more)

    small.network.forward = limited
    said: list[str] = []
    small.updater.may_lower, small.updater.say = True, said.append
    compare(small, given, [EVEN, EVEN])
    assert small.updater.size == 4
    assert [line.partition(";")[0] for line in said] == ["an update's micro-batch of 8 transitions is out of memory"]


def test_micro_batches_are_filled_up_to_few_sizes():
    def made(*rows: tuple[int, int]) -> list[Batch]:
        return [Batch(size, torch.zeros(count), torch.zeros(count)) for size, count in rows]

    assert filled_sizes(made((0, 64), (0, 16), (1, 64)), 64) == {0: 64, 1: 64}
    assert filled_sizes(made((0, 36), (1, 33), (2, 32)), 64) == {0: 40, 1: 40, 2: 32}
    assert filled_sizes(made((0, 3), (1, 1)), 4) == {0: 3, 1: 1}
