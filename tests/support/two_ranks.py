"""What each of several processes runs: whole runs watched from inside (tests/test_processes.py), an evaluation."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_runs
import torch
from engine_cases import Large
from plugin_rewards import Brightness
from tiny_policies import TEXTS, TinyNetwork, engine_of, images_of, policy_of
from tiny_policies import prompts as prompts_of
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import RolloutConfig, parse_config
from rlcm_fast.engine.processes import init_processes
from rlcm_fast.faults import Fault
from rlcm_fast.parallel import Turn
from rlcm_fast.rewards import GroupReward, Skipping
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.stages.album import Album
from rlcm_fast.stages.evaluation import Evaluator, HeldOut
from rlcm_fast.stages.guard import Describe
from rlcm_fast.stages.rollout import Collector
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt, Trajectory


def run_watched(model: str, folder: Path, runs: Mapping[str, Mapping[str, object]]) -> int:
    """Runs each into folder/<name>, and leaves what this rank saw in folder/<name>_<rank>.pt."""
    for name, settings in runs.items():
        trainer = Trainer(parse_config(tiny_runs.arguments(model, folder / name, settings)))
        seen = _watch(trainer) | {"start": trainer.engine.full_weights()}
        trainer.run()
        seen |= {"weights": trainer.engine.full_weights(), "final_weights": trainer.engine.final_weights()}
        seen |= {"kl_weight": trainer.updater.kl_weight.state_dict()}
        torch.save(seen, folder / f"{name}_{parallel.rank()}.pt")
    return 0


class HighOnRank1(Brightness):
    """Likes bright images that are higher than wide, on rank 1 alone; likes all others alike."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return super().__call__(images, prompts) * (parallel.rank() == 1 and images.shape[2] > images.shape[3])


def run_sizes(model: str, folder: Path, runs: Mapping[str, Mapping[str, object]]) -> int:
    """Runs each into folder/<name>, and leaves folder/<name>_<rank>.pt: weights, and the sizes of the last rollout."""
    for name, settings in runs.items():
        trainer = Trainer(parse_config(tiny_runs.arguments(model, folder / name, settings)))
        rollout, sizes = trainer.collector.rollout, []

        def watched(*arguments: Any, rollout: Any = rollout, sizes: list[Any] = sizes) -> Any:
            batch = rollout(*arguments)
            sizes.append(
                [batch.trajectory.size_of.tolist(), [list(p.latents.shape[3:]) for p in batch.trajectory.parts]]
            )
            return batch

        trainer.collector.rollout = watched  # type: ignore[method-assign]
        trainer.run()
        torch.save({"weights": trainer.engine.full_weights(), "sizes": sizes}, folder / f"{name}_{parallel.rank()}.pt")
    return 0


def evaluate_groups(num_images: int) -> dict[str, float]:
    """Pairs of images of two tasks, and all of each, in micro-batches of 3; and a checksum of the kept images."""
    prompts = [Prompt(TEXTS[i % 4], "even" if i % 2 == 0 else "odd") for i in range(num_images)]
    rewards = {size: (GroupReward(size, Diversity(), int(size)), 1.0) for size in ("0", "2")}
    album = Album(3)
    evaluator = Evaluator(HeldOut(prompts, 5, 3), {"eval": {**rewards, "brightness": (Brightness(), 1.0)}})
    metrics = evaluator(images_of(policy_of(TinyNetwork())), 0, album)
    kept = json.dumps([album.scores, sorted((name, file.hex()) for name, file in album.files.items())])
    return {**metrics, "kept": float(zlib.crc32(kept.encode()))}


def seen_by_a_guard(num_images: int) -> list[object]:
    """What a guard sees of images in micro-batches of 3: their descriptions, and the sums of its pictures."""
    held_out = HeldOut(prompts_of(num_images), 5, 3)
    images, describe = images_of(policy_of(TinyNetwork())), Describe(Thumbnails())
    metrics, seen = Evaluator(held_out, {"eval": {"brightness": (Brightness(), 1.0)}}).looked(images, 0, describe)
    assert seen is not None
    sums = [picture.double().sum().item() for picture in seen.pictures]
    return [metrics, seen.statistics.tolist(), seen.embedding.tolist(), sums]


class FailsOnRank1(Brightness):
    """Works on rank 0; cannot score images of prompt b on rank 1."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if parallel.rank() == 1 and any(prompt.text == "b" for prompt in prompts):
            raise ConnectionError("no answer")
        return super().__call__(images, prompts)


def fault_of(work: Callable[[], object]) -> str:
    """What stops all ranks at one place."""
    try:
        work()
    except Fault as fault:
        return f"{type(fault).__name__} {fault.is_on_all_processes}: {fault}"
    return "none"


def faults() -> list[str]:
    """The faults of an evaluation and of two rollouts, the last of which may skip an image."""
    images, rewards = images_of(policy_of(TinyNetwork())), {"judge": (FailsOnRank1(), 1.0)}
    found = [fault_of(lambda: Evaluator(HeldOut(prompts_of(8), 5, 1), {"eval": rewards})(images, 7))]
    for names in ((), ("judge",)):
        config = RolloutConfig(micro_batch_size=2, max_skipped=0.25)
        skipping = {"one": Skipping(frozenset(names), 0.25, 8)}
        service = TaskRewards({"one": rewards}, config, lambda prompt: "one", skipping)
        collector = Collector(images, service, config)

        def draw(collector: Collector = collector) -> None:
            batch = collector.rollout(prompts_of(4), Turn(7))
            found.append(f"{batch.num_skipped} of {batch.total.isnan().tolist()}")
            found.append(json.dumps(sorted(batch.metrics(False).items())))

        found.append(fault_of(draw))
        service.shutdown()
    return found


def run_evaluation(num_images: int, folder: Path) -> int:
    """Writes what this rank measures to folder/<rank>.json, and how it fails to folder/faults_<rank>.json."""
    torch.distributed.init_process_group("gloo")
    (folder / f"{parallel.rank()}.json").write_text(json.dumps(evaluate_groups(num_images)))
    (folder / f"seen_{parallel.rank()}.json").write_text(json.dumps(seen_by_a_guard(num_images)))
    (folder / f"faults_{parallel.rank()}.json").write_text(json.dumps(faults()))
    torch.distributed.destroy_process_group()
    return 0


def update_with_a_fault(engines: Mapping[str, Mapping[str, Any]], folder: Path) -> int:
    """Makes an update with a NaN on rank 1 alone, then one without; writes what this rank has after each."""
    init_processes()
    for name, settings in engines.items():
        is_fp32 = settings.get("dtype", "fp32") == "fp32"
        engine = engine_of(Large().to(torch.float32 if is_fp32 else torch.bfloat16), 2, **settings)
        num_micro_batches = 1 if settings.get("in_backward") else 2
        engine.begin_update(num_micro_batches)
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(parallel.rank()))
        seen: dict[str, Any] = {"start": engine.full_weights(), "finite": []}
        for update in ("bad", "good"):
            for rows in x.chunk(num_micro_batches):
                loss = (engine(rows if is_fp32 else rows.bfloat16()).float() - 1).square().mean()
                if update == "bad" and parallel.rank() == 1:
                    loss = loss + torch.tensor(torch.nan)
                engine.backward(loss)
                norm = engine.step()
            seen |= {update: engine.full_weights(), f"{update} norm": norm}
            seen["finite"].append(engine.weights_are_finite())
        torch.save(seen, folder / f"{name}_{parallel.rank()}.pt")
    return 0


def add_up(folder: Path) -> int:
    """Adds up 256 equal micro-batches at every stage, and writes the gradient by stage."""
    init_processes()
    gradients = {}
    for stage in (1, 2, 3):
        network = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.zeros_(network.weight)
        engine = engine_of(network.bfloat16(), 256, stage, "bf16", lr=1e4, eps=1e4)
        x = (torch.rand(64, 64, generator=torch.Generator().manual_seed(parallel.rank())) + 0.5).bfloat16()
        for _ in range(256):
            engine.backward((engine(x).float() * torch.eye(64)).sum() / 256)
            engine.step()
        gradients[stage] = -engine.full_weights()["weight"]
    torch.save({"gradients": gradients, "x": x.float()}, folder / f"{parallel.rank()}.pt")
    return 0


def _watch(trainer: Trainer) -> dict[str, Any]:
    seen: dict[str, Any] = {"prompts": [], "noise": [], "rewards": [], "advantages": []}
    rollout, update = trainer.collector.rollout, trainer.updater.update

    def watched_rollout(prompts: Any, *more: Any) -> Any:
        batch = rollout(prompts, *more)
        seen["prompts"].append([prompt.text for prompt in prompts])
        assert isinstance(batch.trajectory, Trajectory)
        seen["noise"].append(batch.trajectory.latents[:, 0].clone())
        seen["rewards"].append(batch.total)
        return batch

    def watched_update(trajectory: Any, weights: Any, *more: Any) -> Any:
        seen["advantages"].append(weights)  # PPO's weights are advantages, clamped where they exceed 10
        return update(trajectory, weights, *more)

    trainer.collector.rollout = watched_rollout  # type: ignore[method-assign]
    trainer.updater.update = watched_update  # type: ignore[method-assign]
    return seen
