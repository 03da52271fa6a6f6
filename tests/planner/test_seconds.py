"""The planner: known figures of full-size models, the largest micro-batch, what to change, the table of GPUs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planners import SHAPES, planner_of

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.resolved import resolve
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.planner.efficiency import CALL_SECONDS, UNET_SHARE, VAE_SHARE
from rlcm_fast.planner.estimate import GIB, strategy_of
from rlcm_fast.planner.gpus import GPUS, find_gpu
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.tracing import Setup, prepare_unet, profile_vae, trace_unet
from rlcm_fast.planner.workload import Workload

SD15, SDXL = "SimianLuo/LCM_Dreamshaper_v7", "latent-consistency/lcm-sdxl"
STRATEGY = strategy_of(Config())


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of(SHAPES, Workload.of(resolve(Config(), 1)))


def gpu_of(gib: float):
    return replace(GPUS["rtx4090"], name="small", memory_gib=gib)


def test_the_figures_of_the_sd15_consistency_model_are_the_known_ones():
    architecture, bf16 = load_architecture(SD15), Setup(torch.bfloat16, image_size=512)
    unet = prepare_unet(architecture.build_unet(), bf16)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(859.6, abs=0.05)
    training = trace_unet(unet, architecture, bf16, 1, trains=True)
    assert training.forward_flops.total / 1e9 == pytest.approx(803, abs=0.5)
    assert training.saved / GIB == pytest.approx(0.87, abs=0.005)
    assert training.peak / GIB == pytest.approx(0.89, abs=0.005)
    block = replace(bf16, recompute="block")
    checkpointed = trace_unet(prepare_unet(unet, block), architecture, block, 1, trains=True)
    assert checkpointed.peak / GIB == pytest.approx(0.225, abs=0.001)
    decoder = profile_vae(architecture, 512, torch.bfloat16).decoder
    assert decoder.peak(1) / GIB == pytest.approx(0.375, abs=0.001)
    assert decoder.flops.total / 1e9 == pytest.approx(2515, abs=1)
    assert sum(p.numel() for p in architecture.build_text_encoders()[0].parameters()) / 1e6 == pytest.approx(123, abs=1)


def test_the_sizes_of_stable_diffusion_2_are_the_known_ones():
    architecture = load_architecture("stabilityai/stable-diffusion-2-base")
    assert sum(p.numel() for p in architecture.build_unet().parameters()) == 865_910_724
    assert sum(p.numel() for p in architecture.build_text_encoders()[0].parameters()) / 1e6 == pytest.approx(
        340.4, abs=0.1
    )
    assert architecture.image_size == 512


def test_a_vae_of_ones_own_decodes_in_float16_unless_its_folder_says_that_it_overflows(tmp_path: Path):
    model = load_architecture(SDXL)
    assert model.vae_overflows
    assert not model.with_vae("madebyollin/sdxl-vae-fp16-fix").vae_overflows
    for overflows in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(model.vae | {"force_upcast": overflows}))
        assert model.with_vae(str(tmp_path)).vae_overflows == overflows
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ValueError, match=r"^model.vae=.* has a vae of class Other; the planner knows AutoencoderKL"):
        model.with_vae(str(tmp_path))


@pytest.mark.slow
def test_sdxl_is_planned_within_a_minute_and_its_figures_are_the_known_ones():
    start = time.perf_counter()
    config = parse_config(["--engine.dtype=bf16", "--engine.zero_stage=1", "--update.micro_batch_size=2"])
    planner = Planner(load_architecture(SDXL), Workload.of(resolve(config, 1)))
    strategy = strategy_of(config)
    memory, unet = planner.memory(strategy), planner.profiles(strategy).unet
    assert time.perf_counter() - start < 60
    assert unet.training_peak(64) == pytest.approx(64 * unet.training_peak(1), rel=0.001)
    assert sum(unet.trainable) / 1e6 == pytest.approx(2567, abs=1)
    assert unet.forward_flops.total / 1e9 == pytest.approx(6761, abs=1)
    assert unet.training_peak(1) / GIB == pytest.approx(6.45, abs=0.01)
    # Bytes a weight: 2, its gradients' sum 4, its master copy 4, two moments 8.
    assert (memory.weights + memory.gradients + memory.master + memory.moments) / GIB == pytest.approx(43.04, abs=0.1)
    assert planner.profiles(strategy).vae.decoder.flops.total / 1e9 == pytest.approx(10470, abs=1)


@pytest.mark.parametrize("gib", [1.4, 1.5, 1.6])
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(planner: Planner, gib: float):
    gpu, transitions = gpu_of(gib), planner.workload.transitions_per_update
    largest = planner.largest_micro_batch(STRATEGY, gpu)
    assert transitions % largest == 0
    peaks = {n: planner.memory(replace(STRATEGY, micro_batch_size=n)).stages["update"] for n in range(1, 193)}
    assert peaks[largest] <= gib * GIB
    assert all(peaks[n] > gib * GIB for n in range(largest + 1, 193) if transitions % n == 0)


def test_where_nothing_fits_the_largest_micro_batch_is_none(planner: Planner):
    assert planner.largest_micro_batch(STRATEGY, gpu_of(1.0)) == 0
    assert planner.largest_rollout_micro_batch(STRATEGY, gpu_of(1.0)) == 0


def test_seconds_follow_the_rate_and_the_work(planner: Planner):
    slow, fast = GPUS["rtx3090"], GPUS["rtx4090"]
    ratio = planner.seconds(STRATEGY, slow).update / planner.seconds(STRATEGY, fast).update
    calls = planner.profiles(STRATEGY).unet.training_calls * (192 / 64) * CALL_SECONDS  # the host's part
    rates = fast.fp32_tflop_s / slow.fp32_tflop_s
    update = planner.seconds(STRATEGY, slow).update
    assert ratio == pytest.approx(update / (calls + (update - calls) / rates))
    assert slow.seconds(1e12, 0, is_bf16=True) == pytest.approx(1 / 71)
    work = planner.workload
    twice = planner_of(SHAPES, replace(work, samples=2 * work.samples))
    for stage in ("sampling", "decoding", "update"):
        once = getattr(planner.seconds(STRATEGY, slow), stage)
        assert getattr(twice.seconds(STRATEGY, slow), stage) == pytest.approx(2 * once)


def test_the_workload_of_tasks_in_turn_and_of_some_timesteps_is_what_a_run_does():
    small, large = (f"source: 'shapes:one', rewards: [{{name: diversity}}], share: {share}" for share in (1, 3))
    tasks = f"[{{name: small, {small}}}, {{name: large, {large}}}]"
    in_turn = ["--tasks", tasks, "--task_schedule=by_task", "--update.num_timesteps=2", "--update.num_updates=2"]
    pairs = ["--pretraining.weight=1", "--pretraining.data=shapes:all", "--update.micro_batch_size=4"]
    work = Workload.of(resolve(parse_config([*in_turn, *pairs]), 2))
    assert (work.samples, work.samples_at_once, work.num_actions, work.num_trained) == (32, 24, 3, 2)
    assert (work.num_updates, work.transitions_per_update, work.pairs_per_update) == (4, 24, 32)
    planner, gpu = planner_of(SHAPES, work), GPUS["rtx4090"]
    bare = planner_of(SHAPES, replace(work, pairs_per_update=0))
    update, profiles = bare.seconds(STRATEGY, gpu).update, planner.profiles(STRATEGY)
    encoder = profiles.vae.encoder.flops * (4 * 32)
    encoding = gpu.seconds(encoder.convolutions, encoder.others, False) / VAE_SHARE
    with_pairs = replace(STRATEGY, real_image_micro_batch_size=STRATEGY.micro_batch_size)
    assert planner.seconds(with_pairs, gpu).update == pytest.approx(update * (1 + 4 * 32 / (32 * 2)) + encoding)
    once_more = [*in_turn, "--update.micro_batch_size=4", "--update.old_log_probs=recompute"]
    again = Workload.of(resolve(parse_config(once_more), 2))
    forward = profiles.unet.forward_flops * (32 * 2)
    calls = 32 * 2 / 64 * profiles.unet.forward_calls * CALL_SECONDS
    at_rate = gpu.seconds(forward.convolutions, forward.others, False)
    recomputing = update + calls + at_rate / UNET_SHARE
    assert planner_of(SHAPES, again).seconds(STRATEGY, gpu).update == pytest.approx(recomputing)
    trajectory = bare.memory(STRATEGY).trajectory
    assert trajectory == 24 * 4 * profiles.latent_bytes


def test_gpus_are_found_by_their_usual_names():
    for name in ("rtx4090", "4090", "RTX 4090", "rtx-4090"):
        assert find_gpu(name) is GPUS["rtx4090"]
    with pytest.raises(ValueError, match="gpu=gtx1080 is not in the table; give one of rtx3060, "):
        find_gpu("gtx1080")
    for gpu in GPUS.values():
        assert gpu.bf16_tflop_s >= gpu.tf32_tflop_s >= gpu.fp32_tflop_s > 0
        assert gpu.source


def test_an_unknown_hub_id_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=f"model.path=some/one is not known without a network; give a folder, or one of {SD15}, "
    ):
        load_architecture("some/one")


def test_a_folder_without_a_part_is_refused(tmp_path: Path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    with pytest.raises(ValueError, match="has no unet/config.json; give a folder that diffusers saved whole"):
        load_architecture(str(tmp_path))


def test_what_is_known_without_tracing_is_of_the_same_trained_weights(planner: Planner):
    """A profile of all weights says nothing of adapters."""
    adapters = replace(STRATEGY, lora_rank=4)
    alone = Planner(planner.architecture, planner.workload)
    planner.memory(STRATEGY)
    assert planner.least(adapters) == alone.least(adapters) < planner.least(STRATEGY)
