"""Updates, sampling and decoding by graphs do the same as without, on CPUs by a recorder of operations."""

# B samples, K actions: 8 x 2 transitions

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from graphed_updates import ADVANTAGES, Setting, same_weights
from recorded_work import ArgumentRecorder, CpuRecorder
from tiny_policies import TinyNetwork, engine_of
from torch import Tensor

from rlcm_fast.config import parse_config
from rlcm_fast.engine import direct
from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.stages import graphing
from rlcm_fast.stages.graphed_update import MicroBatch
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("update", [{"num_passes": 1}, {"num_passes": 2}, {"num_updates": 2}])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_three_rollouts_give_the_same_weights_and_metrics_bit_for_bit(update: dict[str, int], kl_weight: float):
    with_graphs, without = (
        Setting(is_graphed, kl_weight, micro_batch_size=4, **update) for is_graphed in (True, False)
    )
    for seed in (4, 5, 6):
        one, other = with_graphs.update(seed), without.update(seed)
        assert replace(one, seconds=0) == replace(other, seconds=0)
        assert same_weights(with_graphs.engine, without.engine)
    assert with_graphs.recorder.num_recorded == 1 and with_graphs.recorder.num_replayed > 12
    assert [line.partition(" in ")[0] for line in with_graphs.said] == ["graphs: recorded the update"]


FEW = ADVANTAGES * torch.tensor([1, 0, 0, 1, 0, 0, 1, 0])  # 6 of 16 transitions have a signal: 2 micro-batches of 4


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_sums_of_many_micro_batches_are_rounded_anew_in_each_replay_bit_for_bit_as_without_graphs(
    kernels: str, monkeypatch: pytest.MonkeyPatch
):
    """Updates of few, which are rounded to nearest, replay the graph of many."""
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", 2)
    with_graphs, without = (Setting(is_graphed, micro_batch_size=4) for is_graphed in (True, False))
    with dispatch.use(kernels):
        for seed, advantages in ((4, ADVANTAGES), (5, FEW), (6, ADVANTAGES)):
            one, other = with_graphs.update(seed, advantages), without.update(seed, advantages)
            assert replace(one, seconds=0) == replace(other, seconds=0)
            assert same_weights(with_graphs.engine, without.engine)
    assert [line.partition(" in ")[0] for line in with_graphs.said] == ["graphs: recorded the update"]
    assert with_graphs.recorder.num_replayed == 1 + 4 + 2 + 4


def test_an_update_of_few_micro_batches_may_be_the_one_that_records_the_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", 2)
    settings = [Setting(is_graphed, micro_batch_size=4) for is_graphed in (True, False)]
    for setting in settings:
        for seed, advantages in ((5, FEW), (6, ADVANTAGES), (7, ADVANTAGES * torch.nan), (8, ADVANTAGES)):
            setting.update(seed, advantages)
    assert same_weights(*(setting.engine for setting in settings))
    assert settings[0].recorder.num_recorded == 1


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("most_to_nearest", [64, 2])
def test_what_changes_between_updates_is_a_tensor_at_an_address_that_stays(
    most_to_nearest: int, kernels: str, monkeypatch: pytest.MonkeyPatch
):
    """A CUDA graph repeats the numbers of its launches, so the region that is recorded must not have others."""
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", most_to_nearest)
    recorder = ArgumentRecorder()
    setting = Setting(True, 0.1, recorder, micro_batch_size=4)
    with dispatch.use(kernels):
        for seed in (4, 5):
            setting.update(seed)
    first, *others = recorder.replays
    assert len(others) == 2 * 4 and all(replayed == first for replayed in others)
    added = [arguments for name, arguments in first if "add_rounded" in name]
    assert bool(added) == (kernels == "triton" and most_to_nearest == 2)  # in torch it is made of other operations


def test_a_run_of_many_micro_batches_goes_on_after_a_resume_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", 4)
    through, resumed = Setting(False, micro_batch_size=2), Setting(True, micro_batch_size=2)
    through.update(4)
    through.engine.save(tmp_path)
    through.update(5)
    resumed.engine.load(tmp_path)
    resumed.update(5)
    assert same_weights(through.engine, resumed.engine)


def test_a_last_micro_batch_filled_up_with_rows_of_signal_0_gives_the_same_gradient():
    settings = [Setting(is_graphed, 0.1, micro_batch_size=6) for is_graphed in (True, False)]
    gradients: list[list[Tensor]] = []
    for setting in settings:
        step = setting.engine._optimizer.step  # type: ignore[attr-defined]

        def noted(setting: Setting = setting, step: Any = step, **keywords: Any) -> None:
            gradients.append([gradient.float().clone() for gradient in setting.gradients()])
            step(**keywords)

        setting.engine._optimizer.step = noted  # type: ignore[attr-defined]
    metrics = [setting.update() for setting in settings]  # micro-batches of 6, 6 and 4
    for filled, plain in zip(*gradients, strict=True):
        assert (filled - plain).norm() <= 1e-2 * plain.norm()  # bfloat16 has 8 bits
    torch.testing.assert_close(metrics[0].loss, metrics[1].loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics[0].kl_to_start, metrics[1].kl_to_start, rtol=1e-2, atol=0)
    assert metrics[0].ratio_mean == 1 and metrics[0].ratio_max_deviation == 0
    assert settings[0].recorder.num_recorded == 1


@pytest.mark.parametrize("is_graphed", [False, True])
def test_the_kernel_is_told_what_its_gradient_will_be_multiplied_by(is_graphed: bool, monkeypatch: pytest.MonkeyPatch):
    came: list[tuple[float, Tensor]] = []
    compute = functional.policy_loss

    def noted(*arguments: Any, factor: float = 1.0, **keywords: Any) -> Any:
        loss, stats = compute(*arguments, **keywords)
        if loss.requires_grad:
            loss.register_hook(lambda above: came.append((factor, above)))
        return loss, stats

    monkeypatch.setattr(functional, "policy_loss", noted)
    setting = Setting(is_graphed, 0.1, micro_batch_size=6)
    setting.update()  # micro-batches of 6, 6 and 4
    assert came[0][0] == 0.375
    if not is_graphed:
        assert [told for told, _ in came] == [0.375, 0.375, 0.25]
        assert all(told == arrived.item() for told, arrived in came)


def test_a_gradient_by_triton_has_the_same_bits_whatever_the_kernel_was_told(monkeypatch: pytest.MonkeyPatch):
    def gradients(share: float | None) -> list[Tensor]:
        compute = functional.policy_loss
        with monkeypatch.context() as patch:
            if share is not None:
                patch.setattr(functional, "policy_loss", lambda *a, factor, **k: compute(*a, factor=share, **k))
            setting = Setting(False, micro_batch_size=6)
            with dispatch.use("triton"):
                setting.update()
        return list(setting.engine.full_weights().values())

    assert all(map(torch.equal, gradients(None), gradients(1.0)))


@pytest.mark.parametrize("is_graphed", [False, True])
def test_an_update_that_is_out_of_memory_begins_anew_with_smaller_micro_batches(is_graphed: bool):
    small, given = Setting(is_graphed, 0.1, micro_batch_size=8), Setting(False, 0.1, micro_batch_size=4)
    forward, calls = small.network.forward, []

    def limited(x_t: Tensor, *inputs: Any, **more: Any) -> Any:
        calls.append(len(x_t))
        # Without graphs, the first micro-batch has left its gradients.
        if len(x_t) > 4 and torch.is_grad_enabled() and len(calls) > (not is_graphed):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(x_t, *inputs, **more)

    small.network.forward = limited
    said: list[str] = []
    small.updater.may_lower, small.updater.say = True, said.append
    for seed in (4, 5):
        one, other = small.update(seed), given.update(seed)
        assert replace(one, seconds=0) == replace(other, seconds=0)
        assert same_weights(small.engine, given.engine)
    assert small.updater.size == 4 and len(said) == 1
    assert said[0].startswith("an update's micro-batch of 8 transitions is out of memory; beginning the update anew")


def test_an_update_whose_size_was_given_ends_where_it_is_out_of_memory():
    setting = Setting(False, micro_batch_size=8)

    def none(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    setting.network.forward = none
    with pytest.raises(torch.OutOfMemoryError):
        setting.update()


def test_engines_begin_an_update_anew_only_where_nothing_has_moved_and_sums_stay_exact():
    direct = Setting(
        False, micro_batch_size=4
    ).engine  # built for 4 micro-batches: the sums of 64 are rounded to nearest
    assert direct.may_begin_again(64) and not direct.may_begin_again(65)
    stepping = engine_of(TinyNetwork().bfloat16(), 1, 0, "pure_bf16", name="adamw_8bit", in_backward=True)
    assert not stepping.may_begin_again(2)
    assert not engine_of(TinyNetwork(), 1).may_begin_again(2)


def test_a_filled_micro_batch_repeats_its_rows_without_a_signal():
    signals = torch.tensor([1.0, torch.nan])
    batch = MicroBatch.filled(torch.tensor([7, 3]), signals, 0.25, 5)
    assert batch.rows.tolist() == [7, 3, 7, 3, 7] and batch.is_real.tolist() == [1, 1, 0, 0, 0]
    assert batch.signals[0] == 1 and batch.signals[1].isnan() and batch.signals[2:].tolist() == [0, 0, 0]
    assert batch.share == 0.25


def test_gradients_and_weights_stay_where_they_are_and_skipped_updates_leave_zeros(tmp_path: Path):
    setting = Setting(True, micro_batch_size=4, max_skipped_updates=3)
    places = [tensor.data_ptr() for tensor in (*setting.network.parameters(), *setting.gradients())]
    before = setting.engine.full_weights()
    for advantages in (ADVANTAGES, ADVANTAGES * torch.nan, ADVANTAGES):
        setting.update(advantages=advantages)
        assert not any(gradient.any() for gradient in setting.gradients())
        assert [tensor.data_ptr() for tensor in (*setting.network.parameters(), *setting.gradients())] == places
    assert any(not torch.equal(before[name], weight) for name, weight in setting.engine.full_weights().items())
    setting.engine.save(tmp_path)
    setting.update()
    setting.engine.load(tmp_path)
    setting.update()
    assert [tensor.data_ptr() for tensor in (*setting.network.parameters(), *setting.gradients())] == places
    assert setting.recorder.num_recorded == 1


def test_engines_say_why_they_have_no_graphs():
    assert "DeepSpeed sets gradients to None after each step" in engine_of(TinyNetwork(), 1).graph_problem
    network = TinyNetwork().bfloat16()
    in_backward = engine_of(network, 1, 0, "pure_bf16", in_backward=True, name="adamw_8bit")
    assert "steps weights in the backward pass" in in_backward.graph_problem
    many = engine_of(TinyNetwork().bfloat16(), 65, 0, "pure_bf16", name="adamw_8bit")
    assert many.graph_problem == ""


RUN: dict[str, object] = {
    "engine.dtype": "pure_bf16",
    "optimizer.name": "adamw_8bit",
    "optimizer.final_lr_fraction": 1.0,
    "engine.recompute": "selective",
    "update.kl_weight": 0.1,
    "evaluation.every": 1,
    "checkpoint.every": 1,
    "ema.decay": 0.5,
}


def trained(model: str, run_dir: Path, **more: object) -> Trainer:
    settings = {**RUN, **{name.replace("__", "."): value for name, value in more.items()}}
    trainer = Trainer(parse_config(tiny_runs.arguments(model, run_dir, settings)))
    trainer.run()
    return trainer


TWO_SIZES = {"model.image_sizes": [[24, 16], [16, 16]], "update.kl_reference": "offload"}


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.parametrize(("settings", "num_sizes"), [({}, 1), (TWO_SIZES, 2)])
def test_a_run_by_graphs_is_the_run_without_and_goes_on_after_a_resume(
    settings: dict[str, object],
    num_sizes: int,
    tiny_lcm_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Sampling, decoding, updates; the average's evaluation and the start weights swap weights in place."""
    trained(tiny_lcm_folder, tmp_path / "without", **settings)
    monkeypatch.setattr(graphing, "recorder_of", lambda device: recorder)
    recorder = CpuRecorder()
    trained(tiny_lcm_folder, tmp_path / "with", engine__graphs="on", num_iterations=2, **settings)
    said = capsys.readouterr().err
    assert "engine.graphs=on: graphs for sampling, decoding, updates\n" in said
    assert said.count("graphs: recorded the update") == num_sizes and "elsewhere" not in said
    num_recorded = recorder.num_recorded
    assert 3 * num_sizes <= num_recorded <= 6 * num_sizes and recorder.num_replayed > 20

    recorder = CpuRecorder()
    trained(tiny_lcm_folder, tmp_path / "with", engine__graphs="on", resume="latest", **settings)
    assert "elsewhere" not in capsys.readouterr().err and recorder.num_replayed > 10
    lines = [tiny_runs.metrics(tmp_path / name) for name in ("without", "with")]
    assert len(lines[0]) == 4
    for without, by_graphs in zip(*lines, strict=True):
        assert by_graphs == pytest.approx(without, rel=1e-6)


def test_auto_says_that_a_cpu_has_no_graphs_and_on_is_refused(
    tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = {"engine.dtype": "pure_bf16", "optimizer.name": "adamw_8bit", "engine.graphs": "auto"}
    trainer = Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "auto", config)))
    assert trainer.images.graphs is None and trainer.updater.graphed is None
    assert "engine.graphs=auto: no graphs on a cpu\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="engine.graphs=on needs a CUDA device, and this is a cpu; set engine.graphs="):
        Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "on", {**config, "engine.graphs": "on"})))
