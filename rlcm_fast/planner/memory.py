"""Adds up the bytes of a training process by stage.

    stage             in memory at its peak, besides weights, master copy, moments, frozen parts, trajectory, overhead
    encoding          the text encoders
    sampling          one UNet pass without gradients
    decoding          one pass of the VAE's decoder, with cuDNN's workspace
    update            gradients (twice if a network compiled whole returns them at once), activations, bucket
    encoding images   one pass of the VAE's encoder on real images, within an update: with its gradients and bucket
    step              gradients and the optimizer's temporaries

Offloaded models of rewards are there while images are encoded, sampled and decoded.
With `moves_idle`, the text encoders and the VAE are in memory only during their stages; without it, always.
CUDA graphs keep activations, copies and gradients over all stages (replay.py).
If an update has a single micro-batch, the estimate is an upper bound: gradients grow while activations are freed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from rlcm_fast.planner.replay import Graphed


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by purpose."""

    weights: int
    gradients: int
    master: int
    moments: int
    vae: int
    text_encoders: int
    start_model: int
    ema: int
    rewards: int
    offloaded_rewards: int
    trajectory: int
    bucket: int
    second_gradients: int  # those that a network compiled whole returns, beside the sums
    graph_copies: int
    activations: int
    sampling: int
    decoding: int
    encoding_images: int
    step_temporaries: int
    overhead: int
    moves_idle: bool
    graphed: Graphed

    @property
    def always(self) -> int:
        """Bytes that are in memory at every stage."""
        resident = 0 if self.moves_idle else self.vae + self.text_encoders
        return resident + sum(
            (self.weights, self.master, self.moments, self.start_model, self.ema, self.rewards,
             self.trajectory, self.graph_copies, self.overhead)
        )  # fmt: skip

    @property
    def held_gradients(self) -> int:
        """Bytes of gradients that stay in their place between updates, for graphs."""
        return self.gradients if self.graphed.updates else 0

    @property
    def graph_pool(self) -> int:
        """Bytes that the graphs keep for their activations once they are recorded; at any time one uses them."""
        return max(self._rollout_pool, self.graphed.updates * (self.activations + self.second_gradients))

    @property
    def _rollout_pool(self) -> int:
        return max(self.graphed.sampling * self.sampling, self.graphed.decoding * self.decoding)

    def _beside_pool(self, size: int, is_graphed: bool, before: int) -> int:
        """Bytes of the pool and of work of that size; a graph's first call is beside the pool of those before it."""
        is_first = is_graphed and self.graphed.num_image_sizes == 1
        return max(self.graph_pool, before + size) if is_first else self.graph_pool + size

    @property
    def stages(self) -> dict[str, int]:
        """Peak of each stage; the VAE's decoder is there for the whole rollout."""
        kept, graphed = self.always + self.held_gradients, self.graphed
        rollout = kept + self.offloaded_rewards + (self.vae if self.moves_idle else 0)
        texts = self.text_encoders if self.moves_idle else 0
        sampling = self._beside_pool(self.sampling, graphed.sampling, 0)
        decoding = self._beside_pool(self.decoding, graphed.decoding, graphed.sampling * self.sampling)
        passes = self._beside_pool(self.activations + self.second_gradients, graphed.updates, self._rollout_pool)
        return {
            "encoding": kept + self.offloaded_rewards + texts + self.graph_pool,
            "sampling": rollout + sampling,
            "decoding": rollout + decoding,
            "update": self.always + self.gradients + self.bucket + passes,
            "step": self.always + self.gradients + self.step_temporaries + self.graph_pool,
            **({"encoding images": self.real_images} if self.encoding_images else {}),
        }

    @property
    def real_images(self) -> int:
        """Peak of an update before its loss on real images; it encodes captions and images one after the other."""
        vae, text_encoders = (self.vae, self.text_encoders) if self.moves_idle else (0, 0)
        passes = max(self.encoding_images + vae, text_encoders)
        return self.always + self.gradients + self.bucket + self.graph_pool + passes

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def parts(self) -> dict[str, int]:
        """Bytes by the name of each purpose, in the order above."""
        hidden = ("moves_idle", "graphed")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in hidden}
