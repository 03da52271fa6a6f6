"""Makes every part of a run from its config, in the one order that works; `trainer.py` is what they do together.

    processes -> run folder -> tasks -> pipeline -> start model -> engine -> policy -> stages

It first refuses what it can refuse without weights. It copies the start model before the engine takes the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm, build_algorithm
from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.backbones.assembly import folder_configs
from rlcm_fast.backbones.backends import check_attention, set_backends
from rlcm_fast.backbones.image_size import pixels_before_loading
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, EmaConfig
from rlcm_fast.config.resolved import ResolvedRun, resolve
from rlcm_fast.engine.averaging import AveragingEngine, WeightAverage
from rlcm_fast.engine.base import UpdatePlan
from rlcm_fast.engine.direct import DirectEngine
from rlcm_fast.engine.processes import init_processes, set_deterministic
from rlcm_fast.engine.recomputation import set_recomputation
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.given import NOTHING, Given
from rlcm_fast.kernels import dispatch
from rlcm_fast.planner.report import MemoryReport
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.policies.build import build_schedule
from rlcm_fast.run_folder.agreement import together
from rlcm_fast.run_folder.export import Exporter
from rlcm_fast.run_folder.progress import Progress
from rlcm_fast.run_folder.resume import RunFolder, begin, put_weights, start_weights
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.chosen_batches import Choice, choose_batches
from rlcm_fast.stages.compile_check import CompileCheck
from rlcm_fast.stages.constant_rewards import ConstantRewards
from rlcm_fast.stages.evaluation import Evaluation
from rlcm_fast.stages.evaluation_build import build_evaluation
from rlcm_fast.stages.graphing import check_graphs, use_graphs
from rlcm_fast.stages.guard_build import build_describe, with_guard
from rlcm_fast.stages.image_sizes import ImageSizes
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.kept_rounds import KeptRounds
from rlcm_fast.stages.kl_weight import KlWeight
from rlcm_fast.stages.parts import Parts
from rlcm_fast.stages.real_images import RealImages, check_pairs
from rlcm_fast.stages.reward_gradients import RewardGradients
from rlcm_fast.stages.rollout import Collector, Upcoming
from rlcm_fast.stages.size_trial import settle_sizes
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.task_gradients import TaskGradients
from rlcm_fast.stages.update import Updater
from rlcm_fast.stages.vae_trial import choose_decoder
from rlcm_fast.stages.weight_check import WeightCheck
from rlcm_fast.tasks import Tasks

_SURVEYED = 10_000  # prompts of each task that are looked at for their length; tokenizing them takes a second


def start_processes(config: Config) -> torch.device:
    """Joins the processes of the run and returns the device of this one; refuses settings that it cannot run."""
    if config.engine.deterministic:
        set_deterministic()  # before the GPU is first used
    device = init_processes()
    dispatch.set_default(config.engine.kernels)
    dispatch.is_triton(torch.empty(0, device=device))
    check_graphs(config.engine, device)
    check_attention(config.engine, device)
    return device


def build(config: Config, given: Given = NOTHING) -> Parts:
    """Joins the processes, takes the run's folder and builds the parts.

    Raises:
        ValueError: what the config alone cannot show: the folder, prompts, rewards, pairs, the model.
    """
    device = start_processes(config)
    choice = choose_batches(config, device)
    folder = begin(choice.config)
    try:
        return _build(choice, device, folder, given)
    except BaseException:
        folder.close()  # the next start may have it
        raise


def _build(choice: Choice, device: torch.device, folder: RunFolder, given: Given) -> Parts:
    # Start the memory plan in the background; read prompts, build rewards, open pairs. No weights yet.
    config = choice.config
    run = resolve(config, parallel.world_size())
    memory = MemoryReport(config, device)
    size = pixels_before_loading(config.model)
    tasks = _tasks(run, given, size, device)
    describe = build_describe(run)

    # Load the pipeline, and copy its network before anything is trained.
    backbone = _load_backbone(config, device)
    choice = _set_backends(backbone, choice)
    config = choice.config
    start_network = _start_network(backbone, config)

    # Try the rewards that wait for that: those on models of the pack; all, if the images' size was not known before.
    for on_models in (True,) if size is not None else (False, True):
        _try_rewards(tasks, backbone.image_size, device, on_models)
    prepare(backbone.unet, config)

    def policy_around(unet: Any) -> GaussianPolicy:
        network = Network(unet, dict(backbone.unet.config), backbone.dtype, device)
        return build_policy(config.policy, network, backbone.scheduler_config)

    # Lower sizes that are out of memory, then hand the network to the engine; policies sample and train through it.
    config = settle_sizes(choice, policy_around(backbone.unet), backbone)
    if config != choice.config:
        run, memory = resolve(config, parallel.world_size()), memory.of(config)
    engine = build_engine(backbone.unet, run)
    images = TextToImage(policy_around(engine), backbone)
    say(f"sampling: {images.policy.schedule} (policy.kind={config.policy.kind})")
    start_model = _start_model(start_network, images, policy_around)

    # Bind the stages to what they need.
    kl_weight = KlWeight(config.update.kl_weight, config.has_start_model and config.guard.is_on, config.guard.raises_kl)
    evaluation = with_guard(build_evaluation(run, tasks, images, engine), run, tasks, describe, kl_weight)
    backbone.texts.survey([*tasks.texts(_SURVEYED), *evaluation.texts])
    config = _checked_compilation(choice, config, policy_around(backbone.unet), start_network, (images, evaluation))
    folder.settle(config)
    choose_decoder(images, tasks, evaluation.grid.prompts, config)
    algorithm = build_algorithm(config.algorithm, config.update)
    graphed = use_graphs(config, images, engine, algorithm)
    may_lower = choice.lowers_updates
    real_images = RealImages(config.pretraining, images, config.seed) if config.pretraining.weight > 0 else None
    return Parts(
        config=config,
        tasks=tasks,
        images=images,
        engine=engine,
        collector=_collector(choice, images, tasks, run),
        updater=Updater(
            images.policy, algorithm, engine, config.update, start_model, real_images, graphed, kl_weight, may_lower
        ),
        real_images=real_images,
        task_gradients=_task_gradients(policy_around(backbone.unet), algorithm, run, tasks),
        evaluation=evaluation,
        memory=memory,
        progress=Progress(folder, engine, _weight_check(config, images, evaluation), config.checkpoint.best),
        export=Exporter(backbone, engine, config),
    )


def _checked_compilation(
    choice: Choice, config: Config, policy: GaussianPolicy, start_network: Any, shown: tuple[TextToImage, Evaluation]
) -> Config:
    """Compares a compiled network with its uncompiled self; a copy of it, and compile=auto, follow the verdict."""
    mode, is_auto = config.engine.compile, choice.asked.compile == "auto"
    if mode != "whole" and not (mode == "regional" and is_auto):
        return config
    (images, evaluation), sizes = shown, resolve(config, parallel.world_size()).sizes
    sampled_at_once = min(config.rollout.micro_batch_size, sizes.samples_per_rollout // sizes.num_processes)
    updated, sampled = (
        images.encode(evaluation.grid.prompts[:1] * size) for size in (config.update.micro_batch_size, sampled_at_once)
    )
    check = CompileCheck(policy, mode=mode, is_auto=is_auto)
    copies = _copies(start_network, images.backbone)
    mode = check(updated, config.seed, copies, sampled if is_auto else None)
    return replace(config, engine=replace(config.engine, compile=mode)) if is_auto else config


def _weight_check(config: Config, images: TextToImage, evaluation: Evaluation) -> WeightCheck:
    # With torch.compile or CUDA graphs, another batch size would be another graph.
    is_by_size = config.engine.compile != "off" or images.graphs is not None
    num_checked = config.rollout.micro_batch_size if is_by_size else 1
    return WeightCheck(images, evaluation.engine, evaluation.grid.prompts[:1] * num_checked, config.evaluation.seed)


def _try_rewards(tasks: Tasks, size: tuple[int, int], device: torch.device, on_models: bool) -> None:
    """Tries the rewards on all processes; a mistake that one of them sees ends all."""
    with together(), tasks.offloading.in_use():
        tasks.try_rewards(size, device, on_models)


def _tasks(run: ResolvedRun, given: Given, size: tuple[int, int] | None, device: torch.device) -> Tasks:
    """Builds prompts and rewards, and tries those without models on images of `size`, if it is known.

    It also refuses pairs that cannot be opened and a scheduler that the policy cannot follow.
    """
    tasks = Tasks(run, parallel.rank(), given)
    say(f"rewards built: {', '.join(tasks.reward_names)}")
    check_pairs(run.config.pretraining)
    configs = folder_configs(run.config.model)
    if configs is not None:
        build_schedule(run.config.policy, *configs)
    if size is not None:
        _try_rewards(tasks, size, device, on_models=False)
    return tasks


def _collector(choice: Choice, images: TextToImage, tasks: Tasks, run: ResolvedRun) -> Collector:
    """Builds what makes rollouts; it keeps rounds for which a person or an older update is waited for."""
    config, sizes = run.config, ImageSizes.of(run)
    is_kept = config.update.rollout_lag > 0 or tasks.rewards.asks_a_person
    may_lower = choice.lowers_rollouts and not is_kept  # a kept round is read again by its micro-batches
    collector = Collector(images, tasks.rewards, config.rollout, tasks.offloading, sizes, may_lower)
    collector.constants = ConstantRewards(run)
    if config.update.rollout_lag > 0:
        collector.upcoming = Upcoming(tasks, config.num_iterations)
    if is_kept:
        collector.kept = KeptRounds(config, images.policy.device, len(run.rounds))
    return collector


def _load_backbone(config: Config, device: torch.device) -> Backbone:
    torch.manual_seed(config.seed)
    say(f"loading {config.model.path}")
    backbone = Backbone.load(
        config.model,
        device,
        torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16,
        kind=config.policy.kind,
        offload_idle=config.engine.offload_idle is True,
        decode_batch_size=config.rollout.decode_batch_size,
        prompts=config.prompts,
    )
    backbone.texts.cut.tell = say
    for note in backbone.notes:
        say(note)
    backbone.tell(say)

    # Put in the weights that the run starts from; all weights come before the adapters beside them.
    weights, named = start_weights(config), f"resume_weights_only={config.resume_weights_only}"
    is_adapters = any(".lora_" in name for name in weights)
    if weights and not is_adapters:
        put_weights(weights, backbone.unet, named)
    if config.lora.rank > 0:
        backbone.add_adapters(config.lora)
    if is_adapters:
        put_weights(weights, backbone.unet, named)
    return backbone


def _set_backends(backbone: Backbone, choice: Choice) -> Choice:
    """Returns the choice with the kind of attention that engine.attention=auto has become."""
    config, unet_config = choice.config, dict(backbone.unet.config)
    network = Network(backbone.unet, unet_config, backbone.dtype, backbone.device)
    shape = (config.update.micro_batch_size, *network.latent_shape)
    like = torch.empty(shape, dtype=backbone.dtype, device=backbone.device)
    is_kept = choice.asked.attention == "auto"
    attention, line = set_backends(config.engine, unet_config, like, is_kept)
    if line:
        say(line)
    return replace(choice, config=replace(config, engine=replace(config.engine, attention=attention)))


def _start_network(backbone: Backbone, config: Config) -> Any:
    """Returns the start model's network for the KL term; None without a KL term.

    It is a copy, or the network itself, which gives the start model's output without its adapters or with swapped
    weights.
    """
    if not config.has_start_model:
        return None
    if config.update.kl_reference == "offload":
        return backbone.unet
    start = backbone.frozen_start()
    if config.lora.rank == 0:
        accelerate(start, config.engine)
    return start


def _copies(start_network: Any, backbone: Backbone) -> list[Any]:
    """Returns the networks that are compiled beside the trained one: the start model's, if it is a copy."""
    return [] if start_network in (None, backbone.unet) or backbone.has_adapters else [start_network]


def _start_model(
    network: Any, images: TextToImage, policy_around: Callable[[Any], GaussianPolicy]
) -> StartModel | None:
    """Wraps the result of `_start_network`; parks the start weights if that is the trained network itself."""
    if network is None:
        return None
    if network is not images.backbone.unet:
        return StartModel(policy_around(network))
    parked = WeightAverage(network, EmaConfig(device="cpu"))  # the average of one set of weights is that set
    return StartModel(images.policy, parked.applied)


def prepare(unet: Any, config: Config) -> None:
    """Changes the trained UNet in place: memory format, attention, compilation, recomputation."""
    accelerate(unet, config.engine)
    set_recomputation(unet, config.engine.recompute)


def build_engine(unet: Any, run: ResolvedRun) -> AveragingEngine:
    """Builds the engine around a UNet that is prepared."""
    config, sizes = run.config, run.sizes
    # DeepSpeed would cast adapters too; with fp32 it keeps the dtype of every weight.
    settings = replace(config.engine, dtype="fp32") if config.lora.rank > 0 else config.engine
    is_direct = settings.dtype == "pure_bf16" or settings.optimizer_in_backward
    plan = UpdatePlan(
        num_micro_batches=sizes.micro_batches_per_update_and_process + sizes.real_image_micro_batches,
        num_updates=sizes.total_updates,
        max_grad_norm=config.update.max_grad_norm,
        micro_batch_size=config.update.micro_batch_size,
    )
    kind = DirectEngine if is_direct else ZeroEngine
    return AveragingEngine(kind(unet, settings, config.optimizer, plan, config.seed), unet, config.ema)


def _task_gradients(policy: GaussianPolicy, algorithm: Algorithm, run: ResolvedRun, tasks: Tasks) -> RewardGradients:
    """Builds the measurements; they are off with one task or reward, and with engines that never hold all gradients."""
    config, tracking = run.config, run.config.tracking
    is_possible = config.engine.zero_stage < 2 and not config.engine.optimizer_in_backward
    every = tracking.task_gradients_every if is_possible and run.has_tasks else 0
    of_tasks = TaskGradients(policy, algorithm, config.update, every, len(run.tasks))
    return RewardGradients(of_tasks, tasks.advantages.parts, tracking.reward_gradients_every if is_possible else 0)
