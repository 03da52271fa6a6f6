"""Tells that a reward is being hacked: compares held-out images with the start model's, and acts when they differ.

    evaluation -> measures (guard_measures.py) -> bands around those of the first measurement -> warn | raise_kl | stop

A measure that leaves its band is said once, in one line, with a picture of the same seeds at the start and now. If it
is one of guard.acts_on, raise_kl moves the KL term's weight (kl_weight.py), and stop ends the run with a checkpoint.

All processes hold the same measures, so they decide alike. The state is part of every checkpoint: a resumed run keeps
what the start model measured, the weight and what it has said. The start model's pictures lie in run_dir/guard; without
them a picture shows the present alone.
"""

# B images, N of all processes, F numbers of an embedding

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlcm_fast.config import GuardConfig
from rlcm_fast.config.guard import ALL, DISTANCE, FLOORS, HELD_OUT, KL
from rlcm_fast.rewards.image_statistics import ImageStatistics
from rlcm_fast.run_folder.guard_pictures import GuardPictures
from rlcm_fast.stages.guard_measures import Band, Measured, Seen, distance_to_start, diversity_across, image_measures
from rlcm_fast.stages.kl_weight import KlWeight
from rlcm_fast.trajectory import Prompt

_LEAST_SCALE = {"edge_density": 0.05, "saturation": 0.02, "flat_area": 0.05, "colour_entropy": 0.5}
"""A floor is relative to the start's value, or to this if the value is lower: a share of 0 would have no band."""

Embedding = Callable[[Tensor, Sequence[Prompt]], Tensor]


class Describe:
    """What a guard needs of an image: its statistics and its embedding."""

    def __init__(self, embedding: Embedding) -> None:
        self._statistics, self._embedding = ImageStatistics(), embedding

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Returns (B, 5 + F) float32 on the CPU for images (B, 3, H, W) in [0, 1]."""
        # Half precision is what a checkpoint keeps, so that a resumed run compares with the same numbers.
        embedding = self._embedding(images, prompts).cpu().half().float()
        return torch.cat([self._statistics(images, prompts), embedding], dim=1)


@dataclass(frozen=True)
class HeldOutReward:
    """A reward that is evaluated and not trained on."""

    name: str  # the key of its metrics without `eval/` and `/mean`
    num_values: int  # that its mean is of: images, or groups of a set reward


@dataclass(frozen=True)
class Start:
    """What the start model measured."""

    measures: Mapping[str, Measured]
    embedding: Tensor  # (N, F)
    diversity: float  # mean distance between two rows of it

    @classmethod
    def of(cls, measures: Mapping[str, Measured], seen: Seen) -> Start:
        """Notes the first measurement."""
        diversity = diversity_across(seen.embedding).value if len(seen.prompts) > 1 else 1.0
        return cls(dict(measures), seen.embedding, diversity)

    def state_dict(self) -> dict[str, Any]:
        """Returns it as JSON, the embedding as text in half precision."""
        data = self.embedding.half().contiguous().numpy().tobytes()
        return {
            "measures": {name: asdict(measured) for name, measured in self.measures.items()},
            "embedding": {"shape": list(self.embedding.shape), "float16": base64.b64encode(data).decode("ascii")},
            "diversity": self.diversity,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Start:
        measures = {name: Measured(**measured) for name, measured in state["measures"].items()}
        packed = state["embedding"]
        data = np.frombuffer(base64.b64decode(packed["float16"]), dtype=np.float16).astype(np.float32)
        return cls(measures, torch.from_numpy(data).reshape(packed["shape"]), state["diversity"])


@dataclass
class Guard:
    """What the start model measured, and what happens when a measure leaves its band."""

    config: GuardConfig
    held_out: Sequence[HeldOutReward]
    kl_weight: KlWeight
    describe: Describe
    pictures: GuardPictures
    num_iterations: int
    start: Start | None = None  # until the first measurement
    outside: list[str] = field(default_factory=list)  # what was outside at the last measurement

    def is_due(self, iteration: int, is_scored: bool) -> bool:
        """Tells whether to measure: with an evaluation, or every `guard.every` iterations and at the end."""
        every = self.config.every
        return is_scored if every == 0 else iteration % every == 0 or iteration == self.num_iterations

    def __call__(
        self, seen: Seen, evaluated: Mapping[str, float], iteration: int, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Compares with the bands and acts; returns guard/... metrics, the same on every process.

        evaluated: the metrics of the evaluation of the same images.
        """
        # Measure; the first time is what later ones are compared with.
        measures = self._measures(seen, evaluated)
        if self.start is None:
            self.start = Start.of(measures, seen)
            self.pictures.keep(seen.pictures)
            if iteration > 0:
                say(f"guard: the bands are around the weights after {iteration} iterations, the first that it measured")
        bands = self._bands()
        excesses = {name: band.excess(measures[name].value) for name, band in bands.items() if name in measures}

        # Move the weight of the KL term, if something that counts is outside or all of it is well inside.
        before = self.kl_weight.value
        acting = [excess for name, excess in excesses.items() if self._acts_on(name)]
        if self.config.raises_kl and acting:
            self.kl_weight.follow(max(acting))

        # Say what is new.
        outside = [name for name, excess in excesses.items() if excess > 0]
        new = [name for name in outside if name not in self.outside]
        back = [name for name in self.outside if name not in outside]
        self.outside = outside
        picture = self.pictures.compare(iteration, seen.pictures, seen.texts) if new else ""
        moved = f"; update.kl_weight {before:.3g} -> {self.kl_weight.value:.3g}" if self.config.raises_kl else ""
        for name in new:
            acts = moved if self._acts_on(name) else ""
            say(f"guard: iteration {iteration}: {name} {bands[name].told(measures[name].value)}{acts}; see {picture}")
        if back:
            say(f"guard: iteration {iteration}: back inside: {', '.join(back)}")
        return self._metrics(measures, bands)

    def stops(self, iteration: int) -> bool:
        """Tells whether the run must end; never with the final weights, which are exported in any case."""
        if self.config.action != "stop" or iteration == self.num_iterations:
            return False
        return any(self._acts_on(name) for name in self.outside)

    def _measures(self, seen: Seen, evaluated: Mapping[str, float]) -> dict[str, Measured]:
        """Returns all measures by name, watched or not."""
        # Held-out rewards, from the evaluation's means and deviations.
        found = {}
        for reward in self.held_out:
            mean, std = (evaluated.get(f"eval/{reward.name}/{part}") for part in ("mean", "std"))
            if mean is not None and std is not None:
                found[reward.name] = Measured(mean, std / math.sqrt(max(1, reward.num_values - 1)))

        # What is seen in the images, and the divergence of the last updates.
        found |= image_measures(seen)
        if self.start is None:
            found[DISTANCE] = Measured(0.0, 0.0)
        elif self.start.embedding.shape == seen.embedding.shape:
            distance = distance_to_start(seen.embedding, self.start.embedding, self.start.diversity)
            found[DISTANCE] = Measured(distance, 0.0)
        if self.kl_weight.divergence is not None:
            found[KL] = Measured(self.kl_weight.divergence, 0.0)
        return found

    def _bands(self) -> dict[str, Band]:
        """Returns the bands of what is watched or acted on."""
        assert self.start is not None
        names = [name for name in self.start.measures if self._is_watched(name)]
        bands = {name: self._band(name, self.start.measures[name]) for name in names}
        if self.config.max_kl > 0 and self._is_watched(KL):
            bands[KL] = Band(0.0, self.config.max_kl, has_low=False)
        return bands

    def _band(self, name: str, measured: Measured) -> Band:
        floor = self.config.floors.get(name, FLOORS.get(name, self.config.floor))
        if name == DISTANCE:
            return Band(0.0, floor, has_low=False)
        scale = max(abs(measured.value), _LEAST_SCALE.get(name, 0.0))
        half_width = max(self.config.z * measured.error, floor * scale)
        return Band(measured.value, half_width, has_high=not self._is_held_out(name))

    def _is_held_out(self, name: str) -> bool:
        return any(reward.name == name for reward in self.held_out)

    def _is_watched(self, name: str) -> bool:
        return self._is_named(name, self.config.watch) or self._acts_on(name)

    def _acts_on(self, name: str) -> bool:
        return self._is_named(name, self.config.acts_on)

    def _is_named(self, name: str, names: Sequence[str]) -> bool:
        return ALL in names or name in names or (HELD_OUT in names and self._is_held_out(name))

    def _metrics(self, measures: Mapping[str, Measured], bands: Mapping[str, Band]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, measured in measures.items():
            if not self._is_watched(name):
                continue
            metrics[f"guard/{name}"] = measured.value
            ends = {"low": bands[name].low, "high": bands[name].high} if name in bands else {}
            metrics |= {f"guard/{name}/{side}": end for side, end in ends.items() if end is not None}
        metrics["guard/outside"] = float(len(self.outside))
        if self.config.raises_kl:
            metrics["guard/kl_weight"] = self.kl_weight.value
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON, the same on every process."""
        start = None if self.start is None else self.start.state_dict()
        return {"start": start, "outside": self.outside, "kl_weight": self.kl_weight.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the place where `state_dict` was taken."""
        self.start = None if state["start"] is None else Start.from_state(state["start"])
        self.outside = list(state["outside"])
        self.kl_weight.load_state_dict(state["kl_weight"])
