"""Draws images of prompts: a policy and the pipeline around its network, which stay the same for the whole run.

prompts -> encode -> conditioning -> sample -> trajectory and x_0 -> decode -> images
"""

# B samples, C H W latent

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.graphs import Graphs, Work
from rlcm_fast.policies import GaussianPolicy, Noise
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory


@dataclass
class TextToImage:
    """Draws images of prompts with the trained network."""

    policy: GaussianPolicy
    backbone: Backbone
    graphs: Graphs | None = None  # replays sampling

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encodes the prompts; the pipeline encodes each distinct text once in the run."""
        with stage("encode"):
            return self.backbone.encode(prompts, with_negative=self.policy.needs_negative)

    def sized(self, conditioning: Conditioning, size: tuple[int, int] | None) -> Conditioning:
        """Returns the conditioning for images of so many pixels, height and width; None leaves them to the model."""
        return conditioning if size is None else self.backbone.sized(conditioning, size)

    def sample(self, conditioning: Conditioning, generator: torch.Generator) -> tuple[Trajectory, Tensor]:
        """Returns a trajectory and x_0 (B, C, H, W) for evaluation: a sampled last step adds no noise to x_0."""
        with stage("sample"):
            return self.policy.sample(conditioning, generator, explores=False, denoise=self._denoise)

    def explore(self, conditioning: Conditioning, noise: Noise) -> tuple[Trajectory, Tensor]:
        """Returns a trajectory to learn from and x_0 (B, C, H, W)."""
        with stage("sample"):
            return self.policy.sample(conditioning, noise, denoise=self._denoise)

    def decoding(self) -> AbstractContextManager[None]:
        """The decoder is on the device inside, however often it decodes."""
        return self.backbone.decoding()

    def decode(self, x_0: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) float32 in [0, 1]."""
        with stage("decode"):
            return self.backbone.decode(x_0)

    def _denoise(self, x_t: Tensor, noise: Noise, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        if self.graphs is None:
            return self.policy.denoise(x_t, noise, conditioning)
        weights, state = self.backbone.unet.parameters, self.backbone.adapters_are_on
        work = Work("sampling", self.policy.denoise, fixed=weights, state=state)
        return self.graphs(work, x_t, noise, conditioning.by_sample())
