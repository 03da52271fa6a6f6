"""Says what `auto` may become: the micro-batches of rollout, decoding and update, and what runs beside them.

    config with `auto` -> candidates -> planner/batches.py chooses on a GPU, `with_numbers` takes the largest on a CPU
    -> a config of numbers, which all else gets

engine.compile, engine.graphs and engine.offload_idle are auto, too; the planner decides about them beside the numbers.

Larger than 64, a micro-batch of a UNet gains nothing: on an H200 an image took 40 % less time in micro-batches of 32
than of 8, and half of that was left to gain (planner/efficiency.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlcm_fast.config import Config, EngineConfig
from rlcm_fast.config.engine_checks import compile_problem
from rlcm_fast.config.resolved import resolve

AUTO = "auto"
MOST = 64
"""The largest micro-batch that `auto` becomes, except where an update must be one."""
MOST_DECODED = 16


@dataclass(frozen=True)
class Batches:
    """The three sizes of a run."""

    update: int
    rollout: int
    decode: int

    def __str__(self) -> str:
        """Returns the fields and their values, as a message or a command line has them."""
        return (
            f"update.micro_batch_size={self.update}, rollout.micro_batch_size={self.rollout}, "
            f"rollout.decode_batch_size={self.decode}"
        )


@dataclass(frozen=True)
class Candidates:
    """What each size may be, from large to small; the config's own number, if it has one. And engine.compile."""

    update: tuple[int, ...]
    rollout: tuple[int, ...]
    decode: tuple[int, ...]
    compile: tuple[str, ...] = ("off",)  # from the fastest on

    @classmethod
    def of(cls, config: Config, world_size: int) -> Candidates:
        """Finds them; updates and rollouts divide evenly, over all rounds."""
        rows, samples = _to_divide(config, world_size)
        update, rollout = config.update.micro_batch_size, config.rollout.micro_batch_size
        decode, whole = config.rollout.decode_batch_size, config.engine.optimizer_in_backward
        return cls(
            update=((rows,) if whole else divisors(rows, MOST)) if update == AUTO else (update,),
            rollout=divisors(samples, MOST) if rollout == AUTO else (rollout,),
            decode=tuple(2**n for n in range(MOST_DECODED.bit_length() - 1, -1, -1)) if decode == AUTO else (decode,),
            compile=compile_modes(config.engine),
        )


def compile_modes(engine: EngineConfig) -> tuple[str, ...]:
    """Returns what engine.compile may be on a GPU, from the fastest on; the config's own value, if it has one."""
    if engine.compile != AUTO:
        return (engine.compile,)
    return tuple(mode for mode in ("whole", "regional") if not compile_problem(engine, mode)) or ("off",)


def has_auto(config: Config) -> bool:
    """Tells whether a size is left to the planner."""
    sizes = batches_of(config)
    return AUTO in (sizes.update, sizes.rollout, sizes.decode)


def is_open(config: Config) -> bool:
    """Tells whether the planner has something to choose on a GPU: a size, or what runs beside the sizes."""
    engine = config.engine
    return has_auto(config) or AUTO in (engine.compile, engine.graphs, engine.offload_idle)


def for_cpu(config: Config) -> Config:
    """Returns the config with what `auto` is on a CPU, besides numbers: nothing is compiled, timed or moved."""
    engine = config.engine
    compile_ = "off" if engine.compile == AUTO else engine.compile
    attention = "sdpa" if engine.attention == AUTO else engine.attention
    moves = engine.offload_idle is True
    return replace(config, engine=replace(engine, compile=compile_, attention=attention, offload_idle=moves))


def batches_of(config: Config) -> Batches:
    """Returns the sizes of a config, among them `auto` perhaps."""
    rollout = config.rollout
    return Batches(config.update.micro_batch_size, rollout.micro_batch_size, rollout.decode_batch_size)


def with_batches(config: Config, batches: Batches) -> Config:
    """Returns the config with these numbers in all three places."""
    rollout = replace(config.rollout, micro_batch_size=batches.rollout, decode_batch_size=batches.decode)
    return replace(config, rollout=rollout, update=replace(config.update, micro_batch_size=batches.update))


def with_numbers(config: Config, world_size: int) -> Config:
    """Returns the config with the numbers that `auto` is on a CPU: the largest; decoding takes a whole micro-batch."""
    if not has_auto(config):
        return config
    found = Candidates.of(config, world_size)
    decode = 0 if config.rollout.decode_batch_size == AUTO else found.decode[0]
    return with_batches(config, Batches(found.update[0], found.rollout[0], decode))


def next_smaller(config: Config, world_size: int) -> tuple[int | None, int | None]:
    """Returns the next smaller update.micro_batch_size and rollout.micro_batch_size; None where there is none."""
    rows, samples = _to_divide(config, world_size)
    update, rollout = config.update.micro_batch_size, min(config.rollout.micro_batch_size, samples)
    return next(iter(divisors(rows, update - 1)), None), next(iter(divisors(samples, rollout - 1)), None)


def divisors(number: int, most: int) -> tuple[int, ...]:
    """Returns the divisors of a number up to `most`, from large to small; it looks up to the root of the number."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({n for n in (*small, *(number // n for n in small)) if n <= most}, reverse=True))


def _to_divide(config: Config, world_size: int) -> tuple[int, int]:
    """Returns the transitions of an update and the samples of a rollout on each process, or what divides all rounds'.

    Where the config's numbers do not divide, checks.validate refuses them later.
    """
    run = resolve(with_batches(config, Batches(1, 1, 1)), world_size)
    trained, updates = run.sizes.trained_actions_per_sample, config.update.num_updates
    samples = [max(1, sum(task.num_samples for task in tasks) // world_size) for tasks in run.rounds]
    return math.gcd(*(max(1, count * trained // updates) for count in samples)), math.gcd(*samples)
