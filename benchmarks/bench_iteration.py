"""What an iteration costs beyond the network passes it cannot avoid, in one process and run, alternately.

    python benchmarks/bench_iteration.py --config configs/shapes/compressibility.yaml --pairs 20

 (a) full: an iteration of `Trainer.run` itself, wall clock from the end of one evaluation hook to the next: prompts,
     rollout with rewards, advantages, update under DeepSpeed, metrics, log, state for a checkpoint.
 (b) bare: S network passes a sample, the VAE decode, forward and backward of every transition, one optimizer step an
     update, and the reference's forward where update.kl_weight is above 0; on a copy of the UNet in plain torch, with
     the same batch sizes, guidance and optimizer class, on tensors made beforehand. No rewards, log-probs, clipping.

overhead = a / b of neighbouring measurements, so that a slow minute of the machine counts for both; overhead_cpu is the
same of processor time, which other processes disturb less. The share of a stage is the median over the pairs of its
part of (a), "other" that of what the stages leave. Evaluation, grids and checkpoints are switched off. For each of
--micro-batch-sizes the trainer is built anew, with that rollout.micro_batch_size and update.micro_batch_size.
Writes OUT.csv (pairs), OUT_stages.csv, OUT_micro_batches.csv and OUT.json, which is also the last line on stdout.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import percentile, print_summary, write_csv
from training_runs import add_config_arguments, read_config, temporary_trainer

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

Seconds = dict[str, float]
_STAGES = ("sampling", "decode", "forward_backward", "reference", "optimizer")


def main() -> int:
    arguments = _parser().parse_args()
    from rlcm_fast.train import set_process_environment

    set_process_environment()
    try:
        config = _config(arguments)
        pairs = measure_pairs(config, arguments.pairs, arguments.warm_up)
        sweep = [_throughput(config, size, arguments.sweep_iterations) for size in arguments.micro_batch_sizes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stem = arguments.out.with_suffix("")
    write_csv(stem.with_suffix(".csv"), pairs)
    write_csv(stem.with_name(f"{stem.name}_stages.csv"), stage_shares(pairs))
    if sweep:
        write_csv(stem.with_name(f"{stem.name}_micro_batches.csv"), sweep)
    summary = {**summarise(pairs), "micro_batches": sweep, "config": arguments.config}
    print_summary(summary, stem.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--pairs", type=int, default=20, help="measurements, at least 10 for a claim (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs before, not counted (default 3)")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], metavar="N",
                        help="sizes whose images/s are measured; none: the option without a value")  # fmt: skip
    parser.add_argument("--sweep-iterations", type=int, default=3, help="iterations for each size (default 3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_iteration.csv"))
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    """The config without what is not part of every iteration."""
    if arguments.pairs < 2 or arguments.warm_up < 1:
        raise ValueError(f"pairs={arguments.pairs}, warm_up={arguments.warm_up}: give 2 or more, and 1 or more")
    off = ["--evaluation.every", "0", "--tracking.grid_every", "0", "--checkpoint.every", "0"]
    config = read_config(arguments, *off)
    if config.engine.dtype != "fp32":
        raise ValueError(
            f"engine.dtype={config.engine.dtype} keeps master weights, which the bare passes do not; use fp32"
        )
    return config


def measure_pairs(config: Config, num_pairs: int, num_warm_up: int) -> list[Seconds]:
    """One row a pair: full, bare, overhead and the stages of bare, in seconds."""
    with temporary_trainer(config, num_warm_up + num_pairs + 1) as trainer:
        bare: list[Seconds] = []
        passes = BarePasses.beside(trainer)
        full = run_with_hook(trainer, lambda: bare.append(passes()))
    # The last iteration ends with a checkpoint, those before the first pairs warm up.
    chosen = slice(num_warm_up, num_warm_up + num_pairs)
    return [pair(times, stages) for times, stages in zip(full[chosen], bare[chosen], strict=True)]


def pair(full: Seconds, bare: Seconds) -> Seconds:
    """A row from wall and cpu seconds of an iteration and the seconds of the bare stages, with the bare cpu seconds."""
    total = sum(bare[stage] for stage in _STAGES)
    row = {"full": full["wall"], "bare": total, "overhead": full["wall"] / total}
    cpu = {"full_cpu": full["cpu"], "bare_cpu": bare["cpu"], "overhead_cpu": full["cpu"] / bare["cpu"]}
    return {**row, **cpu, **{stage: bare[stage] for stage in _STAGES}}


def run_with_hook(trainer: Trainer, between: Callable[[], Any]) -> list[Seconds]:
    """Wall and cpu seconds of each iteration of `trainer.run()`; `between` runs where a run would evaluate."""
    seconds: list[Seconds] = []
    start, cpu_start = 0.0, 0.0

    def evaluate(iteration: int) -> dict[str, float]:
        nonlocal start, cpu_start
        finish_device_work()
        if iteration > 0:
            seconds.append({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start})
        if iteration < trainer.config.num_iterations:
            between()
        start, cpu_start = time.perf_counter(), time.process_time()
        return {}

    trainer.evaluate = evaluate
    trainer.run()
    return seconds


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
        """With the shapes, settings and kind of optimizer of `trainer`, whose state is not touched."""
        import torch
        from torch.optim import Adam, AdamW

        from rlcm_fast.config_checks import derived
        from rlcm_fast.prompts import load_prompts

        config, backbone = trainer.config, trainer.backbone
        unet = copy.deepcopy(backbone.unet)
        prompts = load_prompts(config.prompts.source)
        prompts = [prompts[i % len(prompts)] for i in range(config.prompts.num_prompts)]
        prompts = [prompt for prompt in prompts for _ in range(config.prompts.images_per_prompt)]
        optimizer = {"adamw": AdamW, "adam": Adam}[config.optimizer.name]
        policy = _policy_of(trainer, unet)
        return cls(
            policy=policy,
            reference=trainer.reference,
            optimizer=optimizer(
                unet.parameters(), lr=1e-12, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
            ),
            decode=backbone.decode,
            conditioning=trainer.encode(prompts),
            latents=torch.randn(len(prompts), *policy.latent_shape, device=trainer.device),
            config=config,
            micro_batches_per_update=derived(config, 1)["micro_batches_per_update_and_process"],
        )

    def __call__(self) -> Seconds:
        """Seconds of each stage of one iteration, and the processor's of all."""
        cpu_start = time.process_time()
        self.spent = dict.fromkeys(_STAGES, 0.0)
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


def _policy_of(trainer: Trainer, unet: Any) -> Any:
    from rlcm_fast.policies import build_policy

    backbone = trainer.backbone
    return build_policy(
        trainer.config.policy, unet, unet.config, backbone.scheduler_config, backbone.dtype, trainer.device
    )


def finish_device_work() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarise(pairs: list[Seconds]) -> dict[str, Any]:
    """Median, 90th percentile and quartiles of full / bare."""
    overheads = [row["overhead"] for row in pairs]
    return {
        "overhead_median": statistics.median(overheads),
        "overhead_p90": percentile(overheads, 0.9),
        "overhead_quartiles": [percentile(overheads, 0.25), percentile(overheads, 0.75)],
        "full_seconds_median": statistics.median(row["full"] for row in pairs),
        "bare_seconds_median": statistics.median(row["bare"] for row in pairs),
        "overhead_cpu_median": statistics.median(row["overhead_cpu"] for row in pairs),
        "pairs": len(pairs),
    }


def stage_shares(pairs: list[Seconds]) -> list[dict[str, Any]]:
    """One row a stage: medians over the pairs of its seconds and its share of the full iteration."""
    rows = []
    for stage in (*_STAGES, "other"):
        seconds = [row["full"] - row["bare"] if stage == "other" else row[stage] for row in pairs]
        shares = [part / row["full"] for part, row in zip(seconds, pairs, strict=True)]
        rows.append({"stage": stage, "seconds": statistics.median(seconds), "share": statistics.median(shares)})
    return rows


def _throughput(config: Config, size: int, num_iterations: int) -> dict[str, Any]:
    """Images/s of full iterations at one micro-batch size, sampling and training alike; the first is a warm-up."""
    from rlcm_fast.config_checks import derived, validate

    sized = replace(
        config,
        rollout=replace(config.rollout, micro_batch_size=size),
        update=replace(config.update, micro_batch_size=size),
    )
    validate(sized, 1)
    with temporary_trainer(sized, num_iterations + 2) as trainer:
        times = run_with_hook(trainer, lambda: None)[1:-1]
    median = statistics.median(row["wall"] for row in times)
    images = derived(sized, 1)["samples_per_iteration"]
    return {"micro_batch_size": size, "images_per_second": images / median, "seconds_per_iteration": median}


if __name__ == "__main__":
    sys.exit(main())
