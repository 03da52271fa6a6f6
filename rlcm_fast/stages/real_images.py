"""The loss on real images that every update adds to that of the rewards: beta * L_pre (arXiv 2401.12244, section 3.4).

    pairs -> captions encoded, some dropped; images encoded by the VAE -> pretraining_loss -> its share of the gradient

Departure: the paper takes an optimizer step of its own for it after those of the tasks. Adam would take the weight
beta out of such a step, as its length does not depend on the gradient's; in one gradient with the rewards' it counts.
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
from rlcm_fast.policies.real_image_loss import drop_captions, pretraining_loss
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Prompt


def check_pairs(config: PretrainingConfig) -> None:
    """Opens `pretraining.data`, on a network too; raises ValueError for what its first rows lack.

    After check_source, which train.py calls.
    """
    if config.weight > 0:
        check_rows(config.data)


class RealImages:
    """Real pairs of this process, batch by batch, and their loss in micro-batches."""

    def __init__(self, config: PretrainingConfig, images: TextToImage, seed: int) -> None:
        share = config.batch_size // parallel.world_size()
        self.num_micro_batches = share // config.micro_batch_size
        self._pairs = PairStream(config.data, images.backbone.image_size, share, seed, config.workers)
        self._config, self._images, self._seed = config, images, seed
        self._num_updates = 0

    def losses(self) -> Iterator[Tensor]:
        """Of the next batch, num_micro_batches losses () that add up to weight * the mean over the batch."""
        generator = parallel.generator(self._seed, Stream.REAL_IMAGES, parallel.rank(), self._num_updates)
        policy, backbone = self._images.policy, self._images.backbone

        # Read pairs and encode their captions, some of which are dropped for classifier-free guidance.
        images, texts = self._pairs.next_batch()
        self._num_updates += 1
        dropout = self._config.caption_dropout
        encoded = backbone.encode([Prompt(text) for text in texts], with_negative=dropout > 0, remember=False)
        conditioning = drop_captions(encoded, dropout, generator)

        # Each micro-batch adds its share of the mean.
        for rows in torch.arange(len(texts)).split(self._config.micro_batch_size):
            x_0 = backbone.encode_images(images[rows], generator)
            own = conditioning.take(rows.to(conditioning.index.device))
            loss = pretraining_loss(policy, x_0, own, generator).mean()
            yield self._config.weight * loss * len(rows) / len(texts)

    def state_dict(self) -> dict[str, Any]:
        """As JSON, the same on every rank; every rank must ask."""
        return {"pairs": self._pairs.state_dict(), "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; see PairStream for another number of processes."""
        self._pairs.load_state_dict(state["pairs"])
        self._num_updates = state["num_updates"]

    def close(self) -> None:
        """Ends the processes that decode images."""
        self._pairs.close()
