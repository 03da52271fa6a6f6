"""The sections of the configuration, which `config/__init__.py` puts together.

A field has its type and choices, its range (ranges.py), its default, and a docstring, which is its text in --help.
A `Source` may name a file that lies beside the YAML file (files.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlcm_fast.config.files import Source
from rlcm_fast.config.ranges import NonNegativeInt, PositiveInt, ZeroIsOff, at_least, positive, within


@dataclass(frozen=True)
class ModelConfig:
    """The model to fine-tune."""

    path: str = "shapes/lcm"
    """A shipped model (shapes/lcm, shapes/teacher), a diffusers folder, a hub id; with base: of a UNet alone."""
    revision: str | None = None
    """The revision of a hub id; null is its main branch."""
    base: str | None = None
    """The pipeline that path's UNet goes into (for latent-consistency/lcm-sdxl: SDXL); null: path is a pipeline."""
    lora: str | None = None
    """An LCM-LoRA to fuse into the UNet before training: a folder, a .safetensors file or a hub id."""
    image_size: NonNegativeInt = 0
    """Pixels of an image's sides, as 512; 0: what the UNet's config names. An export draws this size, too."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters to train instead of all weights."""

    rank: NonNegativeInt = 0
    """Rank of the adapters B A, which are float32 beside a frozen UNet; 0: all weights of the UNet are trained."""
    alpha: Annotated[float, positive("16")] = 16.0
    """The adapters are scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers of the UNet that get one, by the end of their names."""


@dataclass(frozen=True)
class PolicyConfig:
    """The sampler that is trained."""

    kind: Literal["consistency", "ddim"] = "consistency"
    """consistency: few-step sampling of a latent consistency model; ddim: a diffusion model (DDPO)."""
    num_steps: PositiveInt = 4
    """Denoising steps S of a sample; S - 1 of them are actions, since the last is deterministic."""
    guidance_scale: Annotated[float, at_least(1, "1 (no guidance) or more")] = 4.0
    """Classifier-free guidance; 1 is none. A consistency model takes it as an input; an LCM-LoRA model calls twice."""
    eta: Annotated[float, within("(0, 1]", "a number in (0, 1]: without noise there is no action")] = 1.0
    """Noise of a ddim step, in (0, 1]; without meaning for consistency."""
    last_step: Literal["deterministic", "renoise", "sampled"] = "deterministic"
    """renoise: the RLCM paper's last action, which noises an image that is thrown away; sampled: one that draws it."""
    last_sigma: Annotated[float, positive("0.1; the latent's own deviation is about 1")] = 0.1
    """Noise of the last action, in the latent, with last_step=sampled; evaluations draw without it."""


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from, and how many an iteration takes."""

    source: Source = "shapes:one"
    """shapes:one, two, neutral, all (also with :held_out), a .txt or .jsonl file, hf:PATH, package.module:function."""
    num_prompts: PositiveInt = 16
    """Distinct prompts of an iteration, over all processes."""
    images_per_prompt: PositiveInt = 4
    """Images of each prompt in an iteration; times num_prompts it is the batch size B."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward."""

    name: str
    """A name of `rlcm_fast.rewards.BUILT_IN` (jpeg_compressibility, shapes_alignment, ...), or package.module:Class."""
    weight: float = 1.0
    """Its factor in the total reward."""
    arguments: dict = field(default_factory=dict)
    """Keyword arguments of its class."""
    group_size: Annotated[int, at_least(0, "0 (all images) or more")] = 0
    """Images of a set reward's group, neighbours in the batch; 0: all images of a task on a process."""
    credit: Literal["group", "leave_one_out"] = "group"
    """What an image gets of its group's value: all of it, or the value minus that of the group without the image."""


@dataclass(frozen=True)
class TaskConfig:
    """One of several tasks that are trained together."""

    name: str
    """Its name in metrics and checkpoints."""
    source: Source
    """Its prompts, as prompts.source."""
    rewards: list[RewardConfig]
    """Its rewards, as the section rewards."""
    share: Annotated[float, within("(0, inf)", "a positive number, or drop the task")] = 1.0
    """Its share of an iteration's images, in proportion to the others'."""
    images_per_prompt: NonNegativeInt = 0
    """Images of each of its prompts in an iteration; 0: prompts.images_per_prompt."""
    advantages: Literal["", "prompt", "batch", "group", "leave_one_out"] = ""
    """Its advantages, of statistics of its own; empty: advantages.kind."""
    evaluation: Source = ""
    """Its prompts for evaluation; empty: evaluation.prompts."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling and rewarding."""

    micro_batch_size: PositiveInt = 64
    """Samples of one sampling pass, per process."""
    reward_workers: PositiveInt = 2
    """Threads that compute rewards while the next samples are drawn, per process; all tasks share them."""
    shared_noise: bool = False
    """All images of a prompt in an iteration start from the same noise, and differ by the noise of their steps."""
    decode_batch_size: NonNegativeInt = 0
    """Images that the VAE decodes at once, in evaluations too; 0: as many as were sampled."""


@dataclass(frozen=True)
class AdvantagesConfig:
    """How rewards become advantages."""

    kind: Literal["prompt", "batch", "group", "leave_one_out"] = "prompt"
    """prompt: running statistics per prompt; batch: the batch's; group, leave_one_out: the prompt's other images."""
    scale: Literal["batch", "group", "none"] = "batch"
    """Whose standard deviation divides (kinds group and leave_one_out): the batch's, each group's own, or nobody's."""
    buffer_size: PositiveInt = 16
    """Rewards kept per prompt (kind prompt)."""
    min_count: int = 16
    """Rewards a prompt needs before its own statistics are used instead of the batch's (kind prompt)."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """What an update does with advantages."""

    name: Literal["ppo", "grpo", "reinforce", "rebel", "dpok", "rwr"] = "ppo"
    """ppo: RLCM's and DDPO's clipped loss; grpo: that within groups; dpok: that with KL; rwr: weighted regression."""
    eta: Annotated[float, positive("1")] = 1.0
    """rebel: change of the log-prob (mean over C, H, W, sum over steps) that one unit of advantage asks for."""
    temperature: Annotated[float, positive("1")] = 1.0
    """rwr: samples are weighted by exp(advantage / temperature)."""


@dataclass(frozen=True)
class UpdateConfig:
    """The optimizer steps on a rollout."""

    clip_range: Annotated[float, within("(0, 1)", "a number in (0, 1), as 1e-4")] = 1e-4
    """PPO clip of the ratio; log-probs are means over C, H, W, hence its size."""
    advantage_clip: Annotated[float, positive("10")] = 10.0
    """Advantages are clamped to plus and minus this."""
    num_passes: PositiveInt = 1
    """Passes over a rollout."""
    num_updates: PositiveInt = 1
    """Optimizer steps of a pass."""
    num_timesteps: NonNegativeInt = 0
    """Actions of each sample that are trained on, drawn anew for each rollout, as 5 of DDPO's 50; 0: all."""
    order: Literal["mixed", "by_step"] = "mixed"
    """mixed: an update's transitions are of all steps; by_step: of as few steps as can be (2401.12244: one)."""
    micro_batch_size: PositiveInt = 64
    """Transitions of one forward and backward, per process; must divide the transitions of an update."""
    old_log_probs: Literal["rollout", "recompute"] = "rollout"
    """What ratios compare with: the rollout's, or once more in the update's micro-batch size, which rounds as it does.
    With one update a rollout neither is needed."""
    step_weights: Literal["equal", "sensitivity"] = "equal"
    """sensitivity: each step's loss is divided by B / sigma, what its mean moves by the network's output."""
    max_grad_norm: ZeroIsOff = 1.0
    """Gradient norm above which gradients are scaled down; 0 is off."""
    kl_weight: ZeroIsOff = 0.0
    """Weight of the closed-form KL divergence to the frozen start model; 0 is off."""
    kl_reference: Literal["copy", "offload"] = "copy"
    """The start model: a second copy on the device, or in the CPU's memory, swapped in for a pass a rollout."""

    @property
    def is_on_policy(self) -> bool:
        """Whether a rollout has one update: then its old log-probs are the new ones, and every ratio is 1."""
        return self.num_passes * self.num_updates == 1

    @property
    def recomputes_log_probs(self) -> bool:
        return self.old_log_probs == "recompute" and not self.is_on_policy


@dataclass(frozen=True)
class PretrainingConfig:
    """The loss on real images and their captions that keeps images real."""

    data: Source = ""
    """A folder, a .jsonl file, .tar shards, hf:PATH, shapes:all or package.module:function; see pairs/sources.py."""
    weight: ZeroIsOff = 0.0
    """Its factor beside the reward's loss (beta of arXiv 2401.12244); 0 is off."""
    batch_size: PositiveInt = 64
    """Pairs of an update, over all processes."""
    micro_batch_size: PositiveInt = 64
    """Pairs of one forward and backward, per process; must divide those of an update."""
    caption_dropout: Annotated[float, within("[0, 1]", "a share in [0, 1], as 0.1")] = 0.1
    """Share of captions replaced by the empty text, which guidance needs."""
    workers: NonNegativeInt = 0
    """Processes that decode images ahead of their use, per process; 0: the training process itself."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adam", "adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit"] = "adamw"
    """adamw and adam of torch; adamw_8bit, our kernel; bnb_...: bitsandbytes', paged: states may move to the CPU."""
    lr: Annotated[float, positive("1e-4")] = 1e-4
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[float, float], within("[0, 1)", "a number in [0, 1)")] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, positive("1e-8")] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: ZeroIsOff = 0.0
    """Decoupled weight decay (adamw)."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    final_lr_fraction: Annotated[float, within("[0, 1]", "a number in [0, 1]; 1 is constant")] = 1.0
    """The learning rate falls linearly to this fraction of lr over the run; 1 is constant."""


@dataclass(frozen=True)
class EngineConfig:
    """Where weights, gradients and states live, and how the network runs."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: what processes share out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    dtype: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    """Precision of the trained network; bf16 has fp32 master weights and zero_stage >= 1, pure_bf16 has neither."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Log-probs, steps and loss by plain torch or by Triton; auto: Triton on a GPU, torch on a CPU."""
    offload_optimizer: bool = False
    """Keep states and master weights on the CPU and step there (DeepSpeedCPUAdam); needs zero_stage >= 1."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is there, so that gradients never all exist; one backward an update."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activations computed anew in the backward pass: of whole blocks, or all but convolutions and matrix products."""
    channels_last: bool = False
    """Keep weights and activations in channels_last, which convolutions on a GPU prefer; needs zero_stage=0."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """torch's scaled_dot_product_attention, or xformers' (needs the extra: pip install 'rlcm_fast[xformers]')."""
    compile: Literal["off", "regional", "whole"] = "off"
    """torch.compile of the network: of each transformer block (quick to compile), or of all of it in one graph."""
    offload_idle: bool = False
    """Text encoders and VAE wait in the CPU's memory, and are on the GPU only while they encode and decode."""


@dataclass(frozen=True)
class EmaConfig:
    """A moving average of the weights."""

    decay: Annotated[float, within("[0, 1)", "a number in [0, 1), as 0.99; 0 is off")] = 0.0
    """Evaluations, grids and the export use weights averaged with this decay, as 0.99; 0 is off."""
    device: Literal["model", "cpu"] = "model"
    """Where the average (float32) is kept: beside the network, or in the CPU's memory."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out images at fixed seeds."""

    every: NonNegativeInt = 10
    """Iterations between evaluations; 0 is off."""
    num_images: PositiveInt = 64
    """Images of an evaluation, over all processes."""
    prompts: Source = "shapes:one:held_out"
    """Prompt source, as prompts.source."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """Rewards to measure besides the trained ones, which are always measured; of several tasks those of others, too."""
    micro_batch_size: PositiveInt = 64
    """Samples of one sampling pass, per process."""
    seed: NonNegativeInt = 1234
    """Seed of the initial noise."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from."""

    every: NonNegativeInt = 50
    """Iterations between checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept; older ones are deleted."""


@dataclass(frozen=True)
class TrackingConfig:
    """What is written for people to look at."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the extra: pip install 'rlcm_fast[wandb]')."""
    grid_every: NonNegativeInt = 20
    """Iterations between image grids from fixed prompts and seeds; 0 is off."""
    grid_images: PositiveInt = 16
    """Images of a grid."""
    task_gradients_every: NonNegativeInt = 10
    """Iterations between measurements of each task's gradient, where an engine holds all gradients; 0 is off."""
    plan: bool = True
    """On a GPU, say at the start whether the run fits, and after an iteration how far off that was."""
