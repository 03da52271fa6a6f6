"""Several image sizes: which are allowed, and how an iteration divides its prompts among them.

The sizes get consecutive blocks of a process's prompts, as equal as whole prompts allow. Which size gets which block is
drawn anew in each iteration (stages/image_sizes.py), the same for all processes: so they run as many passes, of the
same shapes. Prompts come shuffled, so each prompt meets every size sooner or later.
"""

# P prompts of a process, S sizes

from __future__ import annotations

import itertools

from rlcm_fast.config import Config

MAX_SIZES = 6


def prompts_of_blocks(num_prompts: int, num_sizes: int) -> list[int]:
    """Returns how many of the P prompts each of the S blocks has; blocks of no prompt are left out."""
    starts = [-(-block * num_prompts // num_sizes) for block in range(num_sizes + 1)]
    return [end - start for start, end in itertools.pairwise(starts) if end > start]


def check_image_sizes(config: Config) -> None:
    """Raises ValueError "field=value ...; remedy" for sizes that are none, or that do not go with another setting."""
    # One size.
    size, sizes = config.model.image_size, config.model.image_sizes
    if isinstance(size, list) and (len(size) != 2 or 0 in size):
        raise ValueError(f"model.image_size={size} is no [height, width]; give two numbers of pixels, or one for both")
    if not sizes:
        return

    # Several sizes.
    for index, pair in enumerate(sizes):
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"model.image_sizes[{index}]={pair} is no [height, width]; give two numbers of pixels")
        if pair in sizes[:index]:
            raise ValueError(f"model.image_sizes[{index}]={pair} is there twice; sizes are drawn equally often")
    if size != 0:
        raise ValueError(
            f"model.image_size={size} beside model.image_sizes={sizes}; leave one of them out (--model.image_size 0)"
        )
    if len(sizes) > MAX_SIZES:
        raise ValueError(
            f"model.image_sizes={sizes} are {len(sizes)} sizes; give at most {MAX_SIZES}, because each is a graph and "
            "its memory of its own"
        )
    if len(sizes) > 1:
        _check_companions(config)


def _check_companions(config: Config) -> None:
    """Refuses settings that allow one size only."""
    if config.pretraining.weight > 0:
        raise ValueError(
            f"pretraining.weight={config.pretraining.weight} reads real images of one size, and model.image_sizes has "
            "several; give one model.image_size, or set pretraining.weight=0"
        )
    if config.engine.optimizer_in_backward:
        raise ValueError(
            "engine.optimizer_in_backward=true has one micro-batch per update, which holds images of one size, and "
            "model.image_sizes has several; give one model.image_size, or set engine.optimizer_in_backward=false"
        )
