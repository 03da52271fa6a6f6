"""Every part of a run, made from its config in the one order that works; `trainer.py` is what they do together.

    processes -> tasks -> pipeline -> start model -> engine -> policy -> stages

What can be refused without weights is refused first. The start model is copied before the engine takes the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm, build_algorithm
from rlcm_fast.backbones.acceleration import accelerate, check_device
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, EmaConfig
from rlcm_fast.config.resolved import ResolvedRun, resolve
from rlcm_fast.engine.averaging import AveragingEngine, WeightAverage
from rlcm_fast.engine.base import UpdatePlan
from rlcm_fast.engine.direct import DirectEngine
from rlcm_fast.engine.processes import init_processes
from rlcm_fast.engine.recomputation import set_recomputation
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.kernels import dispatch
from rlcm_fast.planner.report import MemoryReport
from rlcm_fast.policies import GaussianPolicy, build_policy
from rlcm_fast.run_folder.export import Exporter
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.evaluation import Evaluation, build_evaluation
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.real_images import RealImages, check_pairs
from rlcm_fast.stages.rollout import Collector
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.task_gradients import TaskGradients
from rlcm_fast.stages.update import Updater
from rlcm_fast.tasks import Tasks


@dataclass(frozen=True)
class Parts:
    """What a run is made of; each part holds what never changes and is given what does."""

    tasks: Tasks
    images: TextToImage
    engine: AveragingEngine
    collector: Collector
    updater: Updater
    real_images: RealImages | None
    task_gradients: TaskGradients
    evaluation: Evaluation
    memory: MemoryReport
    export: Exporter

    def state_dict(self) -> dict[str, Any]:
        """What the parts besides the engine remember, as JSON; the same on every rank, and every rank must ask."""
        real_images = self.real_images.state_dict() if self.real_images else None
        return {"tasks": self.tasks.state_dict(), "pretraining": real_images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.tasks.load_state_dict(state["tasks"])
        if self.real_images and state["pretraining"]:
            self.real_images.load_state_dict(state["pretraining"])

    def close(self) -> None:
        """Ends the threads and processes that compute rewards and decode images."""
        self.tasks.rewards.shutdown()
        if self.real_images:
            self.real_images.close()


def start_processes(config: Config) -> torch.device:
    """Joins the run's processes and returns this one's device; refuses what cannot run on it, before weights load."""
    device = init_processes()
    dispatch.set_default(config.engine.kernels)
    dispatch.is_triton(torch.empty(0, device=device))
    check_device(config.engine, device)
    return device


def build(config: Config, device: torch.device) -> Parts:
    """Raises ValueError for what no check of the config could know: prompts, rewards, pairs, the model's kind."""
    # Without weights: the plan of the memory (it is made in the background), prompts, rewards, pairs.
    run = resolve(config, parallel.world_size())
    memory = MemoryReport(config, device)
    tasks = Tasks(run, parallel.rank())
    say(f"rewards built: {', '.join(tasks.reward_names)}")
    check_pairs(config.pretraining)

    # The pipeline, and a copy of its network before anything is trained.
    torch.manual_seed(config.seed)
    say(f"loading {config.model.path}")
    backbone = _load_backbone(config, device)
    start_network = _start_network(backbone, config)

    # The engine takes the network; policies sample and train through it.
    engine = build_engine(backbone.unet, run)

    def policy_around(network: Any) -> GaussianPolicy:
        unet_config, scheduler_config = backbone.unet.config, backbone.scheduler_config
        return build_policy(config.policy, network, unet_config, scheduler_config, backbone.dtype, device)

    images = TextToImage(policy_around(engine), backbone)
    start_model = _start_model(start_network, images, policy_around)

    # The stages.
    algorithm = build_algorithm(config.algorithm, config.update)
    real_images = RealImages(config.pretraining, images, config.seed) if config.pretraining.weight > 0 else None
    return Parts(
        tasks=tasks,
        images=images,
        engine=engine,
        collector=Collector(images, tasks.rewards, config.rollout),
        updater=Updater(images.policy, algorithm, engine, config.update, start_model, real_images),
        real_images=real_images,
        task_gradients=_task_gradients(policy_around(backbone.unet), algorithm, run),
        evaluation=build_evaluation(run, tasks, images, engine),
        memory=memory,
        export=Exporter(backbone, engine),
    )


def _load_backbone(config: Config, device: torch.device) -> Backbone:
    backbone = Backbone.load(
        config.model,
        device,
        torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16,
        is_consistency=config.policy.kind == "consistency",
        offload_idle=config.engine.offload_idle,
        decode_batch_size=config.rollout.decode_batch_size,
    )
    if config.lora.rank > 0:
        backbone.add_adapters(config.lora)
    return backbone


def _start_network(backbone: Backbone, config: Config) -> Any:
    """What the KL term takes for the start model's network; None without a KL term.

    A copy, or the network itself: it has the start's output without its adapters, or with weights swapped in.
    """
    if config.update.kl_weight == 0:
        return None
    if config.update.kl_reference == "offload":
        return backbone.unet
    start = backbone.frozen_start()
    if config.lora.rank == 0:
        accelerate(start, config.engine)
    return start


def _start_model(
    network: Any, images: TextToImage, policy_around: Callable[[Any], GaussianPolicy]
) -> StartModel | None:
    """Around what `_start_network` made; where that is the trained network itself, its start weights are parked."""
    if network is None:
        return None
    if network is not images.backbone.unet:
        return StartModel(policy_around(network))
    parked = WeightAverage(network, EmaConfig(device="cpu"))  # an average of one set of weights: themselves
    return StartModel(images.policy, parked.applied)


def build_engine(unet: Any, run: ResolvedRun) -> AveragingEngine:
    """Changes the UNet in place: memory format, attention, compilation, recomputation."""
    config, sizes = run.config, run.sizes
    accelerate(unet, config.engine)
    set_recomputation(unet, config.engine.recompute)
    # DeepSpeed would cast adapters too; as fp32 it leaves every weight in the dtype that it has.
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


def _task_gradients(policy: GaussianPolicy, algorithm: Algorithm, run: ResolvedRun) -> TaskGradients:
    """Off with one task, and with engines that are there so that gradients never all exist."""
    config = run.config
    is_possible = run.has_tasks and config.engine.zero_stage < 2 and not config.engine.optimizer_in_backward
    every = config.tracking.task_gradients_every if is_possible else 0
    return TaskGradients(policy, algorithm, config.update, every, len(run.tasks))
