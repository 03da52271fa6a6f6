"""The sections of the configuration, which `config/__init__.py` puts together.

A field has its type and choices, its range (ranges.py), its default, and a docstring, which is its text in --help.
A `Source` may name a file that lies beside the YAML file (files.py). Rewards and tasks are in reward_sections.py, the
guard in guard.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import rlcm_fast.config.bounds as bounds
from rlcm_fast.config.files import Source
from rlcm_fast.config.ranges import (
    Batch,
    BatchOrAuto,
    BatchOrZeroOrAuto,
    Count,
    FactorOrZero,
    Images,
    Seed,
    Updates,
    UpdatesOrZero,
    Workers,
    WorkersOrZero,
    at_least,
    positive,
    within,
)
from rlcm_fast.config.reward_sections import RewardConfig

_SIDES = "a side in pixels, [height, width], or 0: the model's own"
_LEFT_OUT = cast(int, None)  # default of a number that __post_init__ works out from other fields


@dataclass(frozen=True)
class LoraSource:
    """A LoRA that is added to the model before training."""

    path: str
    """A .safetensors file, a folder, a hub id or owner/name/file.safetensors on the hub."""
    scale: Annotated[float, within("[-10, 10]", "a number from -10 to 10; 1 is the strength of its training")] = 1.0
    """Strength at which it is added; 1 is the strength that it was trained with."""


@dataclass(frozen=True)
class ModelConfig:
    """The model to fine-tune."""

    path: str = "shapes/lcm"
    """A shipped model (shapes/lcm), a diffusers folder, a .safetensors file or a hub id; with base, of a UNet alone."""
    revision: str | None = None
    """The revision of a hub id; null takes the main branch."""
    base: str | None = None
    """The pipeline that receives path's UNet (SDXL for latent-consistency/lcm-sdxl); null: path is a pipeline."""
    lora: str | None = None
    """An LCM-LoRA to fuse into the UNet before training: a folder, a .safetensors file or a hub id."""
    loras: list[LoraSource] = field(default_factory=list)
    """LoRAs to fuse into UNet and text encoders before training, after lora: a list of {path: PATH, scale: 1.0}."""
    vae: str | None = None
    """Another VAE: a .safetensors file, a folder or a hub id, as madebyollin/sdxl-vae-fp16-fix; null: the model's."""
    vae_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the VAE's decoder; auto: fp32 on a CPU; on a GPU fp16 if neither pixels nor rewards see it."""
    variant: str | None = None
    """The variant of the files, as fp16; null takes the plain files, or fp16 where a folder has only those."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What a single file's UNet predicts; auto: as the file says, or epsilon. Needed for Stable Diffusion 2 files."""
    clip_skip: Annotated[int | None, at_least(1, bounds.LAYERS, "1 or more, or null for none")] = None
    """Layers that the text encoders leave out for prompts, as diffusers counts: A1111's "Clip skip" 2 is 1 here."""
    image_size: Annotated[int | list[int], at_least(0, bounds.PIXELS, _SIDES)] = 0
    """Pixels of an image, as 512 or [1216, 832]; 0 takes the size in the UNet's config. An export draws it too."""
    image_sizes: Annotated[list[list[int]], at_least(1, bounds.PIXELS, "[height, width] in pixels")] = field(
        default_factory=list
    )
    """Several sizes, as [[1024, 1024], [1216, 832]]: each prompt draws one; replaces image_size, at most 6."""
    hash_files: bool = False
    """Note the SHA-256 of the model's files in checkpoints, not only sizes, times and headers; reads them all once."""

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Height and width of an image, the first of several; None leaves them to the model."""
        if self.image_sizes:
            return self.sizes[0]
        size = self.image_size
        if isinstance(size, int):
            return (size, size) if size else None
        return (size[0], size[1])

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each of `image_sizes`; empty if the run has one size."""
        return tuple((height, width) for height, width in self.image_sizes)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters to train instead of all weights."""

    rank: Annotated[int, at_least(0, bounds.RANK)] = 0
    """Rank of the adapters B A, float32 beside a frozen UNet; 0 trains all weights of the UNet."""
    alpha: Annotated[float, positive("16", bounds.FACTOR)] = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers of the UNet that get adapters, by the end of their names."""


@dataclass(frozen=True)
class PolicyConfig:
    """The sampler that is trained."""

    kind: Literal["auto", "consistency", "ddim", "euler_ancestral", "tcd"] = "auto"
    """auto: what the model's folder says; consistency: LCM; ddim: diffusion; euler_ancestral: Turbo, Lightning; tcd."""
    num_steps: Annotated[int, at_least(1, bounds.STEPS)] = _LEFT_OUT
    """Denoising steps S, S - 1 of them actions, as the last is deterministic; left out: as many as timesteps, or 4."""
    timesteps: list[int] = field(default_factory=list)
    """The training timestep of each step, as [999, 749, 499, 249] for DMD2; empty takes those of the scheduler."""
    guidance_scale: Annotated[float, at_least(1, bounds.GUIDANCE, "1 (no guidance) or more")] = 4.0
    """Classifier-free guidance; 1 is none. A model with an input for it runs one row per sample, others run two."""
    eta: Annotated[float, within("(0, 1]", "a number in (0, 1]: without noise there is no action")] = 1.0
    """Share of noise in a step: eta of ddim, gamma of tcd (often 0.3); consistency and euler_ancestral ignore it."""
    last_step: Literal["deterministic", "renoise", "sampled"] = "deterministic"
    """renoise: the RLCM paper's last action, which adds noise after the image is drawn; sampled: it draws the image."""
    last_sigma: Annotated[float, positive("0.1; the latent's own deviation is about 1", bounds.DEVIATION)] = 0.1
    """Noise of the last action, in the latent, if last_step=sampled; evaluations draw without it."""

    def __post_init__(self) -> None:
        """Fills in the number of steps if it is left out: as many as `timesteps` names, or 4."""
        if self.num_steps is None:
            object.__setattr__(self, "num_steps", len(self.timesteps) or 4)


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from, and how many an iteration draws."""

    source: Source = "shapes:one"
    """shapes:one, two, neutral, all (also with :held_out), a .txt or .jsonl file, hf:PATH, package.module:function."""
    num_prompts: Images = 16
    """Distinct prompts of an iteration, over all processes."""
    images_per_prompt: Images = 4
    """Images of each prompt in an iteration; the batch has num_prompts * images_per_prompt images."""
    negative: str = ""
    """The negative prompt of every image, which classifier-free guidance leads away from; empty is none."""
    long: Literal["cut", "chunks"] = "cut"
    """Prompts over 75 tokens: cut after them, or encoded in chunks of 75, as A1111 does."""
    max_chunks: Annotated[int, within("[2, 4]", "2, 3 or 4 chunks, or set prompts.long=cut for 1")] = 2
    """Chunks of a prompt that are read if long=chunks; a UNet gets 2, 6 or 12 of them for 2, 3 or 4."""

    @property
    def num_chunks(self) -> int:
        """Most chunks of a prompt that are read."""
        return self.max_chunks if self.long == "chunks" else 1

    @property
    def encoded_chunks(self) -> int:
        """Chunks of every encoding: those of a shorter prompt are repeated, which needs a common multiple."""
        return math.lcm(*range(1, self.num_chunks + 1))


@dataclass(frozen=True)
class RolloutConfig:
    """How images are drawn and scored."""

    micro_batch_size: BatchOrAuto = 64
    """Samples per sampling pass, on each process; auto: up to 64, the most planned to fit engine.memory_gib."""
    reward_workers: Workers = 2
    """Threads per process that compute rewards while the next samples are drawn; all tasks share them."""
    shared_noise: bool = False
    """Start all images of a prompt in an iteration from the same noise; only the noise of their steps differs."""
    decode_batch_size: BatchOrZeroOrAuto = 0
    """Images that the VAE decodes at once, in evaluations too; 0: the whole micro-batch; auto: up to 16 that fit."""
    max_decoded_batches: WorkersOrZero = 0
    """Decoded micro-batches that may wait for their scores, on each process; 0: two more than reward_workers."""
    reward_timeout: Annotated[float, at_least(0, bounds.SECONDS, "seconds, or 0 to wait for ever")] = 600.0
    """Seconds that one call of a reward may take before the run stops; 0 waits for ever."""
    max_skipped: Annotated[float, within("[0, 1]", "a share in [0, 1], as 0.01")] = 0.01
    """Share of an iteration's or evaluation's images that on_failure=skip may leave out, but at least one; 0: none."""

    @property
    def decoded_batches(self) -> int:
        return self.max_decoded_batches or self.reward_workers + 2


@dataclass(frozen=True)
class AdvantagesConfig:
    """How rewards become advantages."""

    kind: Literal["prompt", "batch", "group", "leave_one_out"] = "prompt"
    """prompt: running statistics per prompt; batch: of the batch; group, leave_one_out: the prompt's other images."""
    scale: Literal["batch", "group", "none"] = "batch"
    """Standard deviation that divides (kinds group and leave_one_out): of the batch, of each group, or none."""
    buffer_size: Count = 16
    """Rewards that are kept per prompt (kind prompt)."""
    min_count: Annotated[int, at_least(2, bounds.COUNT)] = 16
    """Rewards that a prompt needs before its statistics replace those of the batch (kind prompt)."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """What an update does with advantages."""

    name: Literal["ppo", "grpo", "reinforce", "rebel", "dpok", "rwr"] = "ppo"
    """ppo: clipped loss of RLCM and DDPO; grpo: ppo within groups; dpok: ppo with KL; rwr: weighted regression."""
    eta: Annotated[float, positive("1", bounds.FACTOR)] = 1.0
    """rebel: how far one unit of advantage should move the log-prob (mean over C, H, W, sum over steps)."""
    temperature: Annotated[float, positive("1", bounds.FACTOR)] = 1.0
    """rwr: weights samples by exp(advantage / temperature)."""


@dataclass(frozen=True)
class UpdateConfig:
    """The optimizer steps on a rollout."""

    clip_range: Annotated[float, within("(0, 1)", "a number in (0, 1), as 1e-4")] = 1e-4
    """PPO's clip of the ratio; it is small because log-probs are means over C, H, W."""
    advantage_clip: Annotated[float, positive("10", bounds.FACTOR)] = 10.0
    """Clamps advantages to plus and minus this number."""
    num_passes: Annotated[int, at_least(1, bounds.PASSES)] = 1
    """Passes over a rollout."""
    num_updates: Updates = 1
    """Optimizer steps of a pass."""
    num_timesteps: Annotated[int, at_least(0, bounds.STEPS)] = 0
    """Trained actions of each sample, drawn anew for each rollout, as 5 of DDPO's 50; 0 trains all."""
    order: Literal["mixed", "by_step"] = "mixed"
    """mixed: an update mixes all steps; by_step: it has as few steps as possible (arXiv 2401.12244: one)."""
    micro_batch_size: BatchOrAuto = 64
    """Transitions per forward and backward pass, on each process; must divide the transitions of an update. auto: the
    most, up to 64, that are planned to fit engine.memory_gib."""
    old_log_probs: Literal["rollout", "recompute"] = "rollout"
    """Old log-probs of the ratio: the rollout's, or recomputed in the update's micro-batches, against rounding noise.
    With one update per rollout neither is needed."""
    step_weights: Literal["equal", "sensitivity"] = "equal"
    """sensitivity: divides each step's loss by B / sigma, the effect of the network's output on the step."""
    max_grad_norm: Annotated[float, at_least(0, bounds.NORM, "0 (off) or more")] = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0 is off."""
    kl_weight: FactorOrZero = 0.0
    """Weight of the KL divergence to the frozen start model, in closed form; 0 is off."""
    kl_reference: Literal["copy", "offload"] = "copy"
    """Where the start model is: a second copy on the device, or in CPU memory and swapped in once per rollout."""
    rollout_lag: Literal[0, 1] = 0
    """1: draw the next rollout before this one's update, so that nothing waits for slow rewards or a person who rates.
    Its images are then one update old, which the ratio of ppo, grpo and dpok corrects. 0: always of present weights."""
    max_skipped_updates: Updates = 3
    """Updates in a row whose gradient is not finite, each skipped, after which the run stops."""

    @property
    def is_on_policy(self) -> bool:
        """Tells whether a rollout has one update and is of present weights: then every ratio is 1."""
        return self.num_passes * self.num_updates == 1 and self.rollout_lag == 0

    @property
    def recomputes_log_probs(self) -> bool:
        return self.old_log_probs == "recompute" and not self.is_on_policy


@dataclass(frozen=True)
class PretrainingConfig:
    """The loss on real images and their captions that keeps images real."""

    data: Source = ""
    """A folder, a .jsonl file, .tar shards, hf:PATH, shapes:all or package.module:function; see pairs/sources.py."""
    weight: FactorOrZero = 0.0
    """Factor of this loss beside the reward's loss (beta of arXiv 2401.12244); 0 is off."""
    batch_size: Images = 64
    """Pairs per update, over all processes."""
    micro_batch_size: Batch = 64
    """Pairs per forward and backward pass, on each process; must divide the pairs of an update."""
    caption_dropout: Annotated[float, within("[0, 1]", "a share in [0, 1], as 0.1")] = 0.1
    """Share of captions that become the empty text, which guidance needs."""
    workers: WorkersOrZero = 0
    """Worker processes that decode images ahead, for each process; 0 decodes in the training process."""
    max_unreadable: Annotated[float, within("[0, 1]", "a share in [0, 1], as 0.01")] = 0.01
    """Share of the pairs, of 1,000 or more, that may be unreadable and are skipped; 0 stops at the first."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adam", "adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit"] = "adamw"
    """adamw, adam: torch; adamw_8bit: our kernel; bnb_...: bitsandbytes; paged: states may move to CPU memory."""
    lr: Annotated[float, positive("1e-4", bounds.LEARNING_RATE)] = 1e-4
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[float, float], within("[0, 1)", "a number in [0, 1)")] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, positive("1e-8", bounds.EPSILON)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: FactorOrZero = 0.0
    """Decoupled weight decay (adamw)."""
    warmup_updates: UpdatesOrZero = 0
    """Updates during which the learning rate rises linearly from 0."""
    final_lr_fraction: Annotated[float, within("[0, 1]", "a number in [0, 1]; 1 is constant")] = 1.0
    """Over the run the learning rate falls linearly to this fraction of lr; 1 keeps it constant."""


@dataclass(frozen=True)
class EngineConfig:
    """Where weights, gradients and states live, and how the network runs."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO partitions: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights."""
    dtype: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    """Precision of the trained network; bf16 has fp32 master weights and needs zero_stage >= 1; pure_bf16 has none."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Computes log-probs, steps and loss with torch or Triton; auto: Triton on a GPU, torch on a CPU."""
    offload_optimizer: bool = False
    """Keep optimizer states and master weights in CPU memory, and step there; needs zero_stage >= 1."""
    optimizer_in_backward: bool = False
    """Step each weight when its gradient is ready, so gradients never all exist; one backward pass per update."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Recompute activations in the backward pass: of whole blocks, or all but convolutions and matrix products."""
    channels_last: bool = False
    """Keep weights and activations in channels_last, which is faster for convolutions on a GPU."""
    group_norm: Literal["torch", "fused"] = "torch"
    """GroupNorms of the UNet: torch's; fused with SiLU by our kernel, which keeps channels_last (a GPU has not timed it
    in training)."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers"] = "auto"
    """sdpa: torch's choice among flash, cudnn and efficient; auto: the fastest on a GPU, timed at the start; xformers
    needs pip install 'rlcm_fast[xformers]'."""
    compile: Literal["auto", "off", "regional", "whole"] = "auto"
    """torch.compile of the whole network, whose gradients are checked, or of its blocks; auto, on a GPU: what works."""
    graphs: Literal["auto", "off", "on"] = "off"
    """Replay sampling, decoding and updates as CUDA graphs; auto: what can and has room; on: all, or an error."""
    deterministic: bool = False
    """Use only deterministic algorithms of torch, which are slower: on a GPU, nothing else is promised to repeat."""
    offload_idle: bool | Literal["auto"] = False
    """Keep text encoders and VAE in CPU memory while they are idle; auto: if they have no room beside micro-batches."""
    memory_gib: Annotated[float, at_least(0, bounds.GIB, "GiB, or 0 for all that the GPU has")] = 0.0
    """Memory of each GPU that sizes of auto are chosen for; 0: what the GPU has."""


@dataclass(frozen=True)
class EmaConfig:
    """A moving average of the weights."""

    decay: Annotated[float, within("[0, 1)", "a number in [0, 1), as 0.99; 0 is off")] = 0.0
    """Evaluations, grids and the export use weights averaged with this decay; 0 is off."""
    device: Literal["model", "cpu"] = "model"
    """Where the float32 average is: beside the network, or in CPU memory."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out images at fixed seeds."""

    every: UpdatesOrZero = 10
    """Iterations between evaluations; 0 is off."""
    num_images: Images = 64
    """Images per evaluation, over all processes."""
    prompts: Source = "shapes:one:held_out"
    """Prompts to evaluate on, like prompts.source."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """Rewards to measure beside the trained ones; with several tasks, also rewards of other tasks."""
    micro_batch_size: Batch = 64
    """Samples per sampling pass, on each process."""
    seed: Seed = 1234
    """Seed of the initial noise."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from."""

    every: UpdatesOrZero = 50
    """Iterations between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Number of checkpoints to keep; older ones are deleted."""
    best: str = ""
    """A metric of the evaluation, as eval/NAME/mean, whose highest value is kept beside them; min:KEY: the lowest."""
    export: Literal["last", "best"] = "last"
    """Weights that the run exports at its end: the last ones, or those of the best checkpoint."""


@dataclass(frozen=True)
class TrackingConfig:
    """What the run writes for people to look at."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the extra: pip install 'rlcm_fast[wandb]')."""
    grid_every: UpdatesOrZero = 20
    """Iterations between image grids from fixed prompts and seeds; 0 is off."""
    grid_images: Annotated[int, at_least(1, bounds.GRID)] = 16
    """Images per grid."""
    evaluation_images: Annotated[int, at_least(0, bounds.GRID)] = 64
    """Evaluation images kept as PNG, of the first and of the latest evaluation, with the scores of all; 0 is off."""
    report: bool = False
    """Renew run_dir/report.html after every evaluation; `rlcm-fast report` writes it at any time."""
    live: bool | Literal["auto"] = "auto"
    """A live view in the terminal; auto: if there is one, and not in CI, with NO_COLOR or TERM=dumb; false: lines."""
    task_gradients_every: UpdatesOrZero = 10
    """Iterations between measurements of each task's gradient, if the engine holds all gradients; 0 is off."""
    reward_gradients_every: UpdatesOrZero = 0
    """Iterations between measurements of each reward's gradient, with several rewards; each costs an update. 0: off."""
    plan: bool = True
    """On a GPU, print at the start whether the run fits, and after an iteration how exact that was."""
