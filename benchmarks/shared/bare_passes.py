"""The network passes of an iteration and nothing else: what the trainer's own iterations are held against.

S network passes a sample, the VAE's decode, forward and backward of every transition, one optimizer step an update,
and the reference's forward where update.kl_weight is above 0; on a copy of the UNet in plain torch, with the trainer's
batch sizes, guidance, precision, compilation and kind of optimizer, on tensors made beforehand. No rewards, log-probs,
clipping.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

Seconds = dict[str, float]
STAGES = ("sampling", "decode", "forward_backward", "reference", "optimizer")


@dataclass
class BarePasses:
    """The network passes of an iteration and nothing else; B samples, N transitions of a micro-batch."""

    policy: Any  # around a copy of the UNet, outside of DeepSpeed
    reference: Any  # as the policy; None without a KL term
    optimizer: Any
    decode: Callable[[Any], Any]
    conditioning: Any  # of the B samples
    latents: Any  # (B, C, H, W) float32
    config: Config
    micro_batches_per_update: int
    spent: Seconds = field(default_factory=dict)

    @classmethod
    def beside(cls, trainer: Trainer) -> BarePasses:
        """Makes passes with the shapes, settings and kind of optimizer of `trainer`, whose state is not touched."""
        import torch

        from rlcm_fast.config.resolved import resolve
        from rlcm_fast.engine.optimizers import build_optimizer
        from rlcm_fast.prompts import load_prompts

        config, backbone = trainer.config, trainer.images.backbone
        unet = _copy(backbone.unet, config)

        # As many prompts as an iteration has, neighbours alike.
        known = itertools.cycle(load_prompts(config.prompts.source))
        prompts = []
        for prompt in itertools.islice(known, config.prompts.num_prompts):
            prompts += [prompt] * config.prompts.images_per_prompt

        # What the trainer has, made again; only what is frozen is shared.
        policy = policy_of(trainer, unet)
        return cls(
            policy=policy,
            reference=trainer.updater.start_model and trainer.updater.start_model.policy,
            optimizer=build_optimizer(unet, replace(config.optimizer, lr=1e-12), config.engine, config.seed),
            decode=backbone.decode,
            conditioning=trainer.images.encode(prompts),
            latents=torch.randn(len(prompts), *policy.latent_shape, device=backbone.device),
            config=config,
            micro_batches_per_update=resolve(config, 1).sizes.micro_batches_per_update_and_process,
        )

    def __call__(self) -> Seconds:
        """Seconds of each stage of one iteration, and the processor's of all."""
        cpu_start = time.process_time()
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._sample()
        for _ in range(self.config.update.num_passes * self.config.update.num_updates):
            self._update()
        return {**self.spent, "cpu": time.process_time() - cpu_start}

    def _sample(self) -> None:
        import torch

        with torch.no_grad():
            for rows in torch.arange(len(self.latents)).split(self.config.rollout.micro_batch_size):
                x, conditioning = self.latents[rows], self.conditioning.take(rows.to(self.latents.device))
                with self._timed("sampling"):
                    for k in range(self.policy.num_steps):
                        self.policy.network_output(x, torch.full((len(x),), k, device=x.device), conditioning)
                with self._timed("decode"):
                    self.decode(x)

    def _update(self) -> None:
        """Steps are mixed in a micro-batch as in training."""
        import torch

        size = self.config.update.micro_batch_size
        rows = torch.arange(size, device=self.latents.device) % len(self.latents)
        x, conditioning = self.latents[rows], self.conditioning.take(rows)
        step = torch.arange(size, device=self.latents.device) % self.policy.num_actions
        for _ in range(self.micro_batches_per_update):
            with self._timed("forward_backward"):
                self.policy.network_output(x, step, conditioning).square().mean().backward()
            if self.reference is not None:
                with self._timed("reference"), torch.no_grad():
                    self.reference.network_output(x, step, conditioning)
        with self._timed("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        finish_device_work()
        self.spent[stage] += time.perf_counter() - start


def _copy(unet: Any, config: Config) -> Any:
    """The UNet again, outside of the engine; copying takes weights, recomputation and norms along, not compilation."""
    from rlcm_fast.backbones.acceleration import accelerate

    copied = copy.deepcopy(unet)
    accelerate(copied, replace(config.engine, group_norm="torch"))  # which leaves the norms as they are
    return copied


def policy_of(trainer: Trainer, unet: Any, num_steps: int | None = None) -> Any:
    """The trainer's policy around another network, or with another number of steps."""
    from rlcm_fast.policies import Network, build_policy

    backbone = trainer.images.backbone
    config = replace(trainer.config.policy, num_steps=num_steps or trainer.config.policy.num_steps)
    network = Network(unet, backbone.unet.config, backbone.dtype, backbone.device)
    return build_policy(config, network, backbone.scheduler_config)


def finish_device_work() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of_calls(call: Callable[[], Any], number: int) -> list[float]:
    """Seconds of each of `number` calls, with the work that they leave on the device."""
    seconds = []
    for _ in range(number):
        finish_device_work()
        start = time.perf_counter()
        call()
        finish_device_work()
        seconds.append(time.perf_counter() - start)
    return seconds
