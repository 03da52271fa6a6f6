"""The loss on real images that every update adds to the rewards' loss: beta * L_pre (arXiv 2401.12244, section 3.4).

    pairs -> captions encoded, some dropped; images encoded by the VAE -> real_image_loss -> its share of the gradient

Departure: the paper takes a separate optimizer step on this loss after the steps of the tasks. In a separate step Adam
would cancel the weight beta, because the length of its step does not depend on the length of the gradient. Here both
losses share one gradient, so beta counts.
"""

# B pairs of an update on this process

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import PretrainingConfig
from rlcm_fast.pairs import PairStream, check_rows
from rlcm_fast.parallel import Stream
from rlcm_fast.policies.real_image_loss import drop_captions, real_image_loss
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Prompt


def check_pairs(config: PretrainingConfig) -> None:
    """Opens `pretraining.data`, which may lie on a network; raises ValueError if its first rows lack something.

    Call it after check_source, which train.py calls.
    """
    if config.weight > 0:
        check_rows(config.data)


class RealImages:
    """Reads pairs of real images and captions for this process and yields their loss in micro-batches."""

    def __init__(self, config: PretrainingConfig, images: TextToImage, seed: int) -> None:
        share = config.batch_size // parallel.world_size()
        self.num_micro_batches = share // config.micro_batch_size
        self._pairs = PairStream(config.data, images.backbone.image_size, share, seed, config.workers)
        self._config, self._images, self._seed = config, images, seed
        self._num_updates = 0

    def losses(self) -> Iterator[Tensor]:
        """Yields num_micro_batches losses () of the next batch; they add up to weight * the mean over the batch."""
        generator = parallel.generator(self._seed, Stream.REAL_IMAGES, parallel.rank(), self._num_updates)
        policy, backbone = self._images.policy, self._images.backbone

        # Read pairs and encode their captions; drop some captions for classifier-free guidance.
        images, texts = self._pairs.next_batch()
        self._num_updates += 1
        dropout = self._config.caption_dropout
        encoded = backbone.encode([Prompt(text) for text in texts], with_negative=dropout > 0, remember=False)
        conditioning = drop_captions(encoded, dropout, generator)

        # Encode the images and yield each micro-batch's share of the mean loss.
        for rows in torch.arange(len(texts)).split(self._config.micro_batch_size):
            x_0 = backbone.encode_images(images[rows], generator)
            captions = conditioning.take(rows.to(conditioning.index.device))
            loss = real_image_loss(policy, x_0, captions, generator).mean()
            yield self._config.weight * loss * len(rows) / len(texts)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON, the same on every rank; every rank must call this."""
        return {"pairs": self._pairs.state_dict(), "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; PairStream says how the number of processes may change."""
        self._pairs.load_state_dict(state["pairs"])
        self._num_updates = state["num_updates"]

    def close(self) -> None:
        """Stops the worker processes that decode images."""
        self._pairs.close()
