"""Upper bounds of numbers, each with its reason: what lies beyond has no use, never ends, or is a slip of a key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The largest number that is allowed, and why."""

    most: float
    reason: str

    def __str__(self) -> str:
        return f"{self.most:,}" if isinstance(self.most, int) else f"{self.most:g}"


IMAGES = Bound(1_000_000, "a GPU draws a million images in days")
BATCH = Bound(65_536, "no GPU holds so many images at once")
GRID = Bound(1_024, "a picture of more images cannot be looked at")
PIXELS = Bound(16_384, "one image of that size takes 3 GB")
WORKERS = Bound(1_024, "no machine gains by more threads or processes")
PROCESSES = Bound(65_536, "no cluster has more GPUs")
UPDATES = Bound(1_000_000_000, "even at a millisecond each they take 12 days")
PASSES = Bound(10_000, "a rollout has nothing left to teach after a few")
STEPS = Bound(1_000, "models know 1,000 timesteps")
COUNT = Bound(1_000_000, "the memory of a run would go into keeping them")
SEED = Bound(2**32 - 1, "random numbers begin with 32 bits of it, so a larger one would repeat another's")
TOOL_SEED = Bound(2**62, "torch takes 64 bits, and each image adds to it")
RANK = Bound(16_384, "no layer of a UNet is wider")
LAYERS = Bound(64, "no text encoder has more layers")
GUIDANCE = Bound(100, "images are one flat colour long before")
LEARNING_RATE = Bound(1_000, "an update moves each weight by about as much, and weights are around 0.1")
EPSILON = Bound(1, "the second moment of a gradient is smaller, so nothing would be left of the step")
FACTOR = Bound(1_000_000, "float32 has 7 digits, so nothing would be left of the terms beside it")
NORM = Bound(1_000_000_000_000, "no gradient is as large, and 0 turns the clip off")
DEVIATION = Bound(100, "the latent's own deviation is about 1")
SECONDS = Bound(604_800, "that is a week, and 0 waits for ever")
GIB = Bound(1_000_000, "no machine has so much memory")
PORT = Bound(65_535, "ports have 16 bits")
MIB = Bound(4_096, "a request of that size fills a machine's memory")
