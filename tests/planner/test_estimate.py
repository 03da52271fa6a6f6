"""The planner's bytes against those of real runs on the CPU, of real optimizers, and against known figures."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from rlcm_fast.backbones.loading import SHIPPED
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import EngineConfig, ModelConfig, OptimizerConfig, PolicyConfig, parse_config
from rlcm_fast.engine.base import UpdatePlan
from rlcm_fast.engine.recomputation import set_recomputation
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.kernels.adamw import AdamW8bit
from rlcm_fast.planner import estimate
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.planner.estimate import GIB, Memory, Profiles, Strategy, estimate_memory, measure, strategy_of
from rlcm_fast.planner.optimizer_states import moment_bytes
from rlcm_fast.planner.tracing import LiveBytes, Setup, prepare_unet, trace_unet, unet_inputs
from rlcm_fast.planner.workload import Workload
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.rewards import RewardLoad
from rlcm_fast.trajectory import Prompt, Transitions

ARCHITECTURE = load_architecture(str(SHIPPED["shapes/lcm"]))
WORK = Workload(
    num_processes=1,
    samples=8,
    samples_at_once=8,
    num_steps=3,
    num_actions=2,
    num_trained=2,
    num_passes=1,
    transitions_per_update=16,
    num_updates=1,
    pairs_per_update=0,
)
WITHIN = 0.02  # what the planner promises


@cache
def profiles_of(recompute: Any) -> Profiles:
    return measure(ARCHITECTURE, Strategy(recompute=recompute, micro_batch_size=16), device="cpu")


def memory_of(strategy: Strategy, num_processes: int = 1) -> Memory:
    """Of the shipped model; weights and states do not depend on what was traced."""
    return estimate_memory(strategy, profiles_of(strategy.recompute), replace(WORK, num_processes=num_processes))


def close(real: float) -> Any:
    return pytest.approx(real, rel=WITHIN)


def real_run(recompute: str, micro_batch_size: int) -> tuple[GaussianPolicy, nn.Module, Transitions]:
    """The shipped model as the trainer has it, and a micro-batch of its own transitions."""
    backbone = Backbone.load(ModelConfig(), torch.device("cpu"), torch.float32, kind="consistency")
    set_recomputation(backbone.unet, recompute)
    config = PolicyConfig(num_steps=3)
    policy = build_policy(config, Network(backbone.unet, backbone.unet.config), backbone.scheduler_config)
    conditioning = backbone.encode([Prompt("a red circle")] * WORK.samples, with_negative=False)
    trajectory, _ = policy.sample(conditioning, torch.Generator().manual_seed(0))
    return policy, backbone.unet, trajectory.transitions(torch.arange(micro_batch_size))


def saved_bytes(policy: GaussianPolicy, unet: nn.Module, transitions: Transitions) -> tuple[int, Tensor]:
    """Of the distinct storages that the forward saves for the backward, weights excluded."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = policy.log_prob(transitions).mean()
    for parameter in unet.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values()), loss


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("micro_batch_size", [3, 16])
def test_bytes_are_those_of_a_real_update(recompute: Any, micro_batch_size: int):
    policy, unet, transitions = real_run(recompute, micro_batch_size)
    saved, loss = saved_bytes(policy, unet, transitions)
    loss.backward()
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.step()
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())

    memory = memory_of(Strategy(recompute=recompute, micro_batch_size=micro_batch_size))
    assert memory.weights == close(sum(p.nbytes for p in unet.parameters()))
    assert memory.gradients == close(sum(p.grad.nbytes for p in unet.parameters() if p.grad is not None))
    assert memory.moments == close(states)
    assert profiles_of(recompute).unet.saved(micro_batch_size) == close(saved)


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_the_peak_of_a_real_backward_pass_is_the_traced_one(recompute: Any):
    setup = Setup(torch.float32, recompute, device="cpu")
    profile = profiles_of(recompute).unet
    backbone = Backbone.load(ModelConfig(), torch.device("cpu"), torch.float32, kind="consistency")
    unet = prepare_unet(backbone.unet, setup)
    for rows in (16, 40):
        real = trace_unet(unet, ARCHITECTURE, setup, rows, trains=True)
        assert profile.training_peak(rows) == close(real.peak)
        assert profile.saved(rows) == close(real.saved)


def test_the_peak_of_encoding_real_images_is_the_traced_one():
    backbone = Backbone.load(ModelConfig(), torch.device("cpu"), torch.float32, kind="consistency")
    vae = backbone._pipeline.vae
    for rows in (3, 32):
        images = torch.rand(rows, 3, 64, 64)
        with LiveBytes([*vae.parameters(), images]) as live:
            backbone.encode_images(images)
        assert profiles_of("none").vae.encoder.peak(rows) == close(live.peak)


def test_a_decode_on_a_gpu_has_the_workspace_of_its_convolutions():
    on_cpu = estimate_memory(Strategy(), profiles_of("none"), WORK, device="cpu").decoding
    assert on_cpu > 0
    assert memory_of(Strategy()).decoding == close((1 + estimate.WORKSPACE_SHARE) * on_cpu)


def test_encoding_real_images_comes_on_top_of_an_update():
    strategy = Strategy(real_image_micro_batch_size=16)
    memory = memory_of(strategy)
    encoder = profiles_of("none").vae.encoder
    assert "encoding images" not in memory_of(Strategy()).stages
    resident = memory.always + memory.gradients + memory.bucket
    of_cudnn = 1 + estimate.WORKSPACE_SHARE
    assert memory.stages["encoding images"] == resident + round(of_cudnn * encoder.peak(16))
    sliced = memory_of(replace(strategy, decode_batch_size=4))
    assert sliced.stages["encoding images"] == resident + round(of_cudnn * encoder.peak(4))
    moves = memory_of(replace(strategy, moves_idle=True))
    assert moves.stages["encoding images"] == memory.stages["encoding images"] - memory.text_encoders


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_weights_states_and_gradients_are_those_of_a_real_engine(stage: Any, dtype: Any):
    memory = memory_of(Strategy(dtype=dtype, zero_stage=stage, micro_batch_size=8))  # two micro-batches of an update
    before = live_storages()
    unet = ARCHITECTURE.build_unet().to_empty(device="cpu").to(estimate.DTYPES[dtype])
    for weight in unet.parameters():
        nn.init.zeros_(weight)  # an update of what lay in memory might be skipped
    engine = ZeroEngine(unet, EngineConfig(stage, dtype), OptimizerConfig(), UpdatePlan(2, 10, 1.0), 0)
    in_update = 0
    for micro_batch in range(4):  # two of each update
        engine.backward(sum((p.float().sum() for p in unet.parameters()), torch.zeros(())))
        in_update = bytes_since(before) if micro_batch == 2 else in_update
        engine.step()
    everything = memory.weights + memory.master + memory.moments
    assert bytes_since(before) == close(everything)
    # at stage 1 DeepSpeed keeps its bucket between the micro-batches of an update, at others while it goes backwards;
    # the copy that it sends comes at the end
    bucket = 4 * estimate.BUCKET_ELEMENTS if stage == 1 else 0
    assert in_update == close(everything + memory.gradients + bucket)


def live_storages() -> dict[int, int]:
    """Address -> bytes of every tensor that Python can reach, gradients included."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    found += [thing.grad for thing in found if thing.is_leaf and thing.grad is not None]
    sums = [getattr(thing, "grad_accum", None) for thing in found]  # of DeepSpeed's stage 1
    found += [thing for thing in sums if thing is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}


def bytes_since(before: dict[int, int]) -> int:
    return sum(size for address, size in live_storages().items() if address not in before)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw_8bit", AdamW8bit), ("bnb_adamw_8bit", bitsandbytes.optim.AdamW8bit)]
)
def test_8bit_states_are_those_of_the_real_optimizers(name: str, kind: Any):
    sizes = [4096, 4095, 4097, 100_000, 7]
    weights = [nn.Parameter(torch.randn(size)) for size in sizes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = kind(weights)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    distinct = {value.untyped_storage().data_ptr(): value.nbytes for value in states}
    assert moment_bytes(name, sizes, 4) == pytest.approx(sum(distinct.values()), rel=1e-3)


def test_torch_moments_have_the_dtype_of_the_weights():
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(1000, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW([weight])
        optimizer.step()
        real = sum(optimizer.state[weight][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
        assert moment_bytes("adamw", [1000], dtype.itemsize) == real


def test_bytes_per_parameter_of_full_fine_tuning():
    """State by state: weights, gradients, master copy, two moments."""
    numel = sum(profiles_of("none").unet.trainable)
    known = {
        Strategy(): 16,
        Strategy(dtype="bf16", zero_stage=1): 16,
        Strategy(optimizer="adamw_8bit"): 10,
        Strategy(dtype="pure_bf16", optimizer="adamw_8bit"): 6,
        Strategy(dtype="pure_bf16", optimizer="adamw_8bit", optimizer_in_backward=True): 4,
        Strategy(dtype="bf16", zero_stage=1, offload_optimizer=True): 4,
    }
    for strategy, expected in known.items():
        memory = memory_of(strategy)
        gradients = 0 if strategy.optimizer_in_backward else memory.gradients
        found = (memory.weights + gradients + memory.master + memory.moments) / numel
        # scales of blocks, and the float32 states of small tensors; more of them than in a full-size model
        assert found == pytest.approx(expected, abs=0.15), strategy


def test_zero_shares_out_what_its_stage_says():
    whole = memory_of(Strategy(dtype="bf16", zero_stage=1))
    for stage, shared in ((1, {"master", "moments"}), (2, {"master", "moments", "gradients"})):
        memory = memory_of(Strategy(dtype="bf16", zero_stage=stage), num_processes=4)  # pyright: ignore[reportArgumentType]
        for name in ("weights", "gradients", "master", "moments"):
            share = 4 if name in shared else 1
            assert getattr(memory, name) == pytest.approx(getattr(whole, name) / share, abs=16), name


def test_gradients_of_several_micro_batches_add_up_in_float32_under_zero():
    for stage, in_bucket in ((1, 4), (2, 2), (3, 2)):
        strategy = Strategy(dtype="bf16", zero_stage=stage)  # pyright: ignore[reportArgumentType]
        one, several = (memory_of(replace(strategy, micro_batch_size=size), 2) for size in (16, 8))
        assert several.gradients == 2 * one.gradients
        copy = 2 * sum(profiles_of("none").unet.trainable)
        assert one.bucket == 2 * estimate.BUCKET_ELEMENTS
        assert several.bucket == in_bucket * estimate.BUCKET_ELEMENTS + copy
        assert several.stages["step"] >= several.always + several.gradients
    pairs = Strategy(dtype="bf16", zero_stage=2, micro_batch_size=16, real_image_micro_batch_size=4)
    assert memory_of(pairs).gradients == 2 * memory_of(replace(pairs, real_image_micro_batch_size=0)).gradients
    for alone in (Strategy(), Strategy(dtype="pure_bf16", optimizer="adamw_8bit"), Strategy(zero_stage=2)):
        assert memory_of(replace(alone, micro_batch_size=8)).gradients == memory_of(alone).gradients


def test_what_costs_more_memory_is_said_to():
    by_recompute = [memory_of(Strategy(recompute=r)).activations for r in ("none", "selective", "block")]  # pyright: ignore[reportArgumentType]
    assert by_recompute == sorted(by_recompute, reverse=True)
    by_size = [memory_of(Strategy(micro_batch_size=n)).stages["update"] for n in (1, 2, 5, 16, 17, 64, 100)]
    assert by_size == sorted(set(by_size))
    assert memory_of(Strategy(ema="gpu")).ema == memory_of(Strategy()).weights
    assert memory_of(Strategy(ema="cpu")) == memory_of(Strategy())
    with_copy, swapped = memory_of(Strategy(start_model="copy")), memory_of(Strategy(start_model="offload"))
    assert with_copy.start_model == with_copy.weights and swapped.start_model == 0
    assert with_copy.trajectory == swapped.trajectory > memory_of(Strategy()).trajectory
    pairs = memory_of(Strategy(micro_batch_size=8, real_image_micro_batch_size=16))
    assert pairs.activations == memory_of(Strategy(micro_batch_size=16)).activations
    guided = memory_of(Strategy(rows_per_sample=2, micro_batch_size=8))
    assert guided.activations == memory_of(Strategy(micro_batch_size=16)).activations


def test_what_waits_on_the_cpu_counts_where_it_works_alone():
    stays, moves = memory_of(Strategy()), memory_of(Strategy(moves_idle=True))
    vae, text_encoders = stays.vae, stays.text_encoders
    saved = {"encoding": vae, "sampling": text_encoders, "decoding": text_encoders}
    saved |= {"update": vae + text_encoders, "step": vae + text_encoders}
    assert {stage: stays.stages[stage] - size for stage, size in moves.stages.items()} == saved
    assert vae > 0
    assert text_encoders > 0


def test_a_strategy_is_made_of_a_config():
    options = ["--engine.dtype=bf16", "--engine.zero_stage=1", "--update.micro_batch_size=8", "--update.kl_weight=0.1"]
    strategy = strategy_of(parse_config([*options, "--policy.kind=ddim", "--policy.guidance_scale=5"]), image_size=512)
    assert strategy == Strategy(
        dtype="bf16",
        zero_stage=1,
        micro_batch_size=8,
        start_model="copy",
        rows_per_sample=2,
        image_size=512,
        compile="auto",
    )


def test_a_consistency_model_that_does_not_embed_guidance_runs_two_rows_a_sample():
    guided, unguided = parse_config([]), parse_config(["--policy.guidance_scale=1"])
    assert ARCHITECTURE.embeds_guidance and not load_architecture(str(SHIPPED["shapes/teacher"])).embeds_guidance
    assert [strategy_of(guided, None, embeds).rows_per_sample for embeds in (True, False)] == [1, 2]
    assert strategy_of(unguided, None, False).rows_per_sample == 1


def test_lora_leaves_little_to_train():
    strategy = Strategy(lora_rank=4, micro_batch_size=2)
    profiles = measure(ARCHITECTURE, strategy, device="cpu")
    memory, full = estimate_memory(strategy, profiles, WORK), memory_of(Strategy(micro_batch_size=2))
    assert memory.weights > full.weights
    assert memory.gradients < full.gradients / 20
    assert memory.moments < full.moments / 20


def test_offloaded_rewards_count_in_the_rollout_alone():
    rollout = ("encoding", "sampling", "decoding")
    without = estimate_memory(Strategy(), profiles_of("none"), WORK).stages
    for load, staged in ((RewardLoad(offloaded=GIB), rollout), (RewardLoad(always=GIB), without.keys())):
        stages = estimate_memory(Strategy(), profiles_of("none"), WORK, load).stages
        assert stages == {name: size + (GIB if name in staged else 0) for name, size in without.items()}


@pytest.mark.parametrize(("max_chunks", "copies"), [(0, 1), (2, 2), (3, 6), (4, 12)])
def test_long_prompts_have_the_tokens_of_all_chunks(max_chunks: int, copies: int):
    options = ["--prompts.long", "chunks", "--prompts.max_chunks", str(max_chunks)] if max_chunks else []
    strategy = strategy_of(parse_config(options))
    assert strategy.text_chunks == copies
    setup = Setup(torch.float32, text_chunks=strategy.text_chunks)
    text = unet_inputs(ARCHITECTURE, setup, 3, torch.device("meta"))["encoder_hidden_states"]
    assert text.shape[:2] == (3, ARCHITECTURE.num_tokens * copies)


def test_more_tokens_of_a_text_are_more_work():
    unet = prepare_unet(ARCHITECTURE.build_unet(), Setup(torch.float32))
    passes = [
        trace_unet(unet, ARCHITECTURE, Setup(torch.float32, text_chunks=chunks), 2, trains=True) for chunks in (1, 2, 6)
    ]
    flops, saved = [one.flops.total for one in passes], [one.saved for one in passes]
    assert flops[0] < flops[1] < flops[2]
    assert saved[0] < saved[1] < saved[2]
