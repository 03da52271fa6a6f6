"""The loss on real images that every update adds to the rewards' loss: beta * L_pre (arXiv 2401.12244, section 3.4).

    pairs -> captions encoded, some dropped; images encoded by the VAE -> real_image_loss -> its share of the gradient

Departure: the paper takes a separate optimizer step on this loss after the steps of the tasks. In a separate step Adam
would cancel the weight beta, because the length of its step does not depend on the length of the gradient. Here both
losses share one gradient, so beta counts.

A batch is read before its update begins, so data that fail end the run before weights move, on all processes together.
Pairs that cannot be read are left out: the loss is the mean over the others.
"""

# B pairs of an update on this process

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import PretrainingConfig
from rlcm_fast.pairs import PairsFault, PairStream, check_rows
from rlcm_fast.parallel import Stream
from rlcm_fast.policies.real_image_loss import drop_captions, real_image_loss
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Prompt

_NUM_SAID = 10  # unreadable pairs that a line is printed for; the metric counts them all
MIN_COUNTED = 1000  # pairs; pretraining.max_unreadable is a share of the pairs read so far, but at least of so many


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
        self._batch: tuple[Tensor, list[str]] | None = None  # read, and not yet trained on
        self._share = share  # pairs of a batch on this process
        self.num_skipped = 0

    def read(self) -> None:
        """Reads the next batch; raises a Fault on all processes together if it cannot be read on one of them."""
        self._batch = parallel.together(self._next_batch)

    def _next_batch(self) -> tuple[Tensor, list[str]]:
        """Reads pairs, and raises a Fault if too many were unreadable."""
        images, texts = self._pairs.next_batch()
        count, share = self._pairs.count, self._config.max_unreadable
        self.num_skipped = self._share - len(texts)
        if (self.num_skipped and count.num_unreadable > share * max(count.num_pairs, MIN_COUNTED)) or not texts:
            raise PairsFault(
                f"{count.problem}; {count.num_unreadable} of {count.num_pairs} pairs could not be read, more than "
                f"pretraining.max_unreadable={share:g} allows"
            )
        if self.num_skipped and count.num_unreadable <= _NUM_SAID:
            say(f"skipped: {count.problem}")
        return images, texts

    def losses(self) -> Iterator[Tensor]:
        """Yields num_micro_batches losses () of the next batch; they add up to weight * the mean over the batch."""
        generator = parallel.generator(self._seed, Stream.REAL_IMAGES, parallel.rank(), self._num_updates)
        policy, backbone = self._images.policy, self._images.backbone

        # Take the pairs that were read, and encode their captions; drop some for classifier-free guidance.
        assert self._batch is not None, "read() comes first"
        (images, texts), self._batch = self._batch, None
        self._num_updates += 1
        dropout = self._config.caption_dropout
        encoded = backbone.encode([Prompt(text) for text in texts], with_negative=dropout > 0, remember=False)
        conditioning = drop_captions(encoded, dropout, generator)

        # Encode the images and yield each micro-batch's share of the mean loss. Where pairs are missing, copies of the
        # first one fill up the micro-batches and weigh nothing: all processes have as many micro-batches.
        for places in torch.arange(self._share).split(self._config.micro_batch_size):
            is_there = places < len(texts)
            rows = places.where(is_there, 0)
            x_0 = backbone.encode_images(images[rows], generator)
            captions = conditioning.take(rows.to(conditioning.index.device))
            losses = real_image_loss(policy, x_0, captions, generator)  # (B,)
            if is_there.all():
                yield self._config.weight * losses.mean() * len(rows) / len(texts)
            else:
                yield self._config.weight * (losses * is_there.to(losses)).sum() / len(texts)

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
