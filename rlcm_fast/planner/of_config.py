"""Makes a planner and a strategy of a config, without weights or a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlcm_fast.backbones.loading import path_of_configs
from rlcm_fast.config.batches import with_numbers
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.planner import seconds
from rlcm_fast.planner.architecture import Size, load_architecture, sides
from rlcm_fast.planner.estimate import GIB, Strategy, strategy_of
from rlcm_fast.planner.workload import Workload
from rlcm_fast.rewards import gpu_load


def planner_of(
    run: ResolvedRun, image_size: int | None = None, reward_gib: float = 0.0
) -> tuple[seconds.Planner, Strategy]:
    """Returns the planner and the strategy of the run's processes; where a size is `auto`, that of a CPU.

    image_size: pixels per side instead of the config's. reward_gib: more memory for rewards.

    Raises:
        ValueError: the model is not known, or its image size does not divide.
    """
    # Read the model's configs; the largest of several image sizes decides on memory.
    config, processes = run.config, run.sizes.num_processes
    architecture = load_architecture(path_of_configs(config.model))
    architecture = architecture.with_vae(config.model.vae) if config.model.vae else architecture
    sizes = [] if image_size else [_size(pixels) for pixels in config.model.sizes]
    largest = image_size or _size(_largest(config.model.sizes) or config.model.pixels)
    for size in sizes or [largest]:
        _check_image_size(size, architecture.pixels_per_latent)

    # Count the rewards.
    rewards = [reward for task in run.tasks for reward in task.rewards]
    load = gpu_load(rewards, config.evaluation.rewards, processes)
    load = replace(load, always=load.always + round(reward_gib * GIB))
    known = [size for size in sizes if size is not None]
    planner = seconds.Planner(architecture, Workload.of(run), load, known)
    numbered = with_numbers(config, processes)
    return planner, strategy_of(numbered, largest or architecture.image_size, architecture.embeds_guidance)


def _size(pixels: tuple[int, int] | None) -> Size | None:
    """Returns one number for a square."""
    return pixels[0] if pixels is not None and pixels[0] == pixels[1] else pixels


def _largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Returns the size of most pixels, which decides on memory; None of no sizes."""
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def _check_image_size(image_size: Size | None, pixels_per_latent: int) -> None:
    step = 8 * pixels_per_latent
    for side in [] if image_size is None else sides(image_size):
        if side % step:
            raise ValueError(f"image-size={side} must divide by {step}; try {max(step, round(side / step) * step)}")
