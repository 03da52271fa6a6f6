"""The functions of a script written for TRL, as a run calls them: prompts, rewards, the hook that sees the images."""

# B images of a batch

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.grids import captioned_grid
from rlcm_fast.rewards.functions import as_scores
from rlcm_fast.trajectory import Prompt

RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]


class Samples:
    """Draws prompts with their metadata, scores images with both, and keeps an epoch's batches for the hook."""

    scope = "image"

    def __init__(
        self, prompt_function: Callable[[], tuple[str, Any]], reward_function: RewardFunction, keeps_batches: bool
    ) -> None:
        self._prompt_function, self._reward_function = prompt_function, reward_function
        self._keeps_batches = keeps_batches
        # By id, because equal texts may have other metadata. The prompt is kept too, so that its id stays its own.
        self._drawn: dict[int, tuple[int, Prompt, Any]] = {}
        self._batches: list[tuple[int, list[Any]]] = []

    def draw(self) -> Prompt:
        """Asks the script for the next prompt."""
        answer = self._prompt_function()
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise ValueError(f"prompt_function returned {answer!r}; return (prompt, metadata)")
        prompt = Prompt(str(answer[0]))
        self._drawn[id(prompt)] = (len(self._drawn), prompt, answer[1])
        return prompt

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        """Returns the scores (B,) of images (B, 3, H, W) float32 in [0, 1]."""
        found = [self._drawn[id(prompt)] for prompt in prompts]
        texts, metadata = tuple(prompt.text for prompt in prompts), tuple(details for _, _, details in found)
        answer = self._reward_function(images, texts, metadata)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise ValueError(f"reward_function returned a {type(answer).__name__}; return (scores, information)")
        scores = as_scores(answer[0])
        if isinstance(scores, Tensor):
            scores = scores.reshape(len(scores), -1).squeeze(1) if scores.ndim == 2 else scores
        if self._keeps_batches:
            self._batches.append((found[0][0], [images, texts, metadata, scores, answer[1]]))
        return scores

    def end_of_epoch(self) -> list[list[Any]]:
        """Returns the epoch's batches [images, prompts, metadata, scores, information], in order, and forgets them."""
        batches = [batch for _, batch in sorted(self._batches, key=lambda numbered: numbered[0])]
        self._batches, self._drawn = [], {}
        return batches


class HookTracker:
    """What the hook gets to show images and numbers with, like a tracker of accelerate; writes into the run's folder.

    run_dir/samples/000012.png     captioned images of step 12
    run_dir/samples/log.jsonl      numbers, a line for each call
    """

    name = "rlcm_fast"

    def __init__(self, run_dir: Path, with_tensorboard: bool, with_wandb: bool) -> None:
        self._folder, self._events, self._with_wandb = run_dir / "samples", None, with_wandb
        if with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "events"))

    def log_images(self, values: Mapping[str, Tensor], step: int | None = None, **_: Any) -> None:
        """Saves images, each (3, H, W) or (1, 3, H, W) in [0, 1], under their captions."""
        step = step or 0
        images = torch.cat([image.detach().float().cpu().reshape(-1, *image.shape[-3:]) for image in values.values()])
        counts = [image.numel() // image[..., :, :, :].shape[-3:].numel() for image in values.values()]
        texts = [text for text, count in zip(values, counts, strict=True) for _ in range(count)]
        self._folder.mkdir(parents=True, exist_ok=True)
        captioned_grid(images.clamp(0, 1), texts, columns=4).save(self._folder / f"{step:06d}.png")
        if self._events:
            self._events.add_images("samples", images, step)
        if self._with_wandb:
            import wandb  # pyright: ignore[reportMissingImports]

            wandb.log(
                {"samples": [wandb.Image(image, caption=text) for image, text in zip(images, texts, strict=True)]}
            )

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Adds numbers to log.jsonl and to the curves."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}, default=str) + "\n")
        for key, value in values.items():
            if self._events and isinstance(value, int | float):
                self._events.add_scalar(f"hook/{key}", value, step)

    def close(self) -> None:
        if self._events:
            self._events.close()
