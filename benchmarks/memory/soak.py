"""Does a long run's memory grow? Trains a tiny random pipeline for thousands of iterations and fits a line to it.

python benchmarks/memory/soak.py --iterations 2000 --out benchmarks/results/soak.json

The run evaluates, draws grids, writes checkpoints and TensorBoard events, reads real images and averages weights. The
resident memory of the process is measured after each iteration. The slope comes from the means of 20 blocks after the
warm-up, so its standard error allows for neighbouring iterations that resemble each other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.shared import tiny_pipelines
from benchmarks.shared.reporting import print_summary
from rlcm_fast.config import parse_config
from rlcm_fast.train import set_process_environment
from rlcm_fast.trainer import Trainer

NUM_BLOCKS = 20
WARM_UP = 0.1  # share of the iterations
SETTINGS = {
    "policy.num_steps": 2,
    "prompts.num_prompts": 2,
    "prompts.images_per_prompt": 2,
    "rollout.micro_batch_size": 2,
    "update.micro_batch_size": 2,
    "optimizer.lr": 1e-5,
    "ema.decay": 0.99,
    "pretraining.data": "shapes:all",
    "pretraining.weight": 0.1,
    "pretraining.batch_size": 2,
    "pretraining.micro_batch_size": 2,
    "evaluation.every": 20,
    "evaluation.num_images": 4,
    "evaluation.micro_batch_size": 2,
    "checkpoint.every": 20,
    "tracking.grid_every": 50,
    "tracking.grid_images": 4,
}


class SoakingTrainer(Trainer):
    """Notes the memory, the open files and the threads of this process after each iteration."""

    def watch(self) -> list[tuple[int, int, int]]:
        """Runs and returns (bytes, open files, threads) of each iteration."""
        process, seen = psutil.Process(), []
        train = self.train

        def train_and_look(iteration: int) -> dict[str, float]:
            metrics = train(iteration)
            seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
            return metrics

        self.train = train_and_look
        self.run()
        return seen


def means_of(values: Sequence[float]) -> list[float]:
    """Returns the means of `NUM_BLOCKS` blocks of neighbours."""
    size = len(values) // NUM_BLOCKS
    return [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(NUM_BLOCKS)]


def slope_of(values: Sequence[float]) -> tuple[float, float]:
    """Returns the slope of a line through the means of the blocks, per value, and its standard error."""
    means = means_of(values)
    places = [float(i * (len(values) // NUM_BLOCKS)) for i in range(NUM_BLOCKS)]
    slope, intercept = statistics.linear_regression(places, means)
    squares = sum((mean - intercept - slope * place) ** 2 for place, mean in zip(places, means, strict=True))
    spread = sum((place - statistics.fmean(places)) ** 2 for place in places)
    return slope, (squares / (NUM_BLOCKS - 2) / spread) ** 0.5


def main() -> None:
    """Runs, fits and writes the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=2000, help="iterations of the run, at least 40")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    set_process_environment()

    # Train in a folder that is removed afterwards.
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_pipelines.save_lcm(Path(folder) / "model")
        settings = {"model.path": model, "run_dir": f"{folder}/run", "num_iterations": arguments.iterations, **SETTINGS}
        trainer = SoakingTrainer(parse_config([f"--{name}={value}" for name, value in settings.items()]))
        seen = trainer.watch()

    # Fit a line to what was seen after the warm-up.
    steady = seen[round(WARM_UP * len(seen)) :]
    mib = [rss / 2**20 for rss, _, _ in steady]
    slope, error = slope_of(mib)
    print_summary(
        {
            "iterations": len(seen),
            "mib_of_blocks": [round(mean, 2) for mean in means_of(mib)],
            "mib_per_1000_iterations": 1000 * slope,
            "standard_error": 1000 * error,
            "open_files": [steady[0][1], steady[-1][1]],
            "threads_of_the_process": [steady[0][2], steady[-1][2]],
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
