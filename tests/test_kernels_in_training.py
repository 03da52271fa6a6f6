"""The whole loop on ShapesWorld's model with either implementation of the kernels, Triton's in its interpreter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from rlcm_fast.backbones.loading import resolve_model_path
from rlcm_fast.config import parse_config
from rlcm_fast.kernels import dispatch
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")


def train(run_dir: Path, kernels: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics and weights of 10 iterations of 2 updates on 8 transitions."""
    settings = {
        "model.path": "shapes/lcm", "run_dir": run_dir, "num_iterations": 10, "engine.kernels": kernels,
        "policy.num_steps": 3, "prompts.num_prompts": 2, "prompts.images_per_prompt": 2,
        "rewards": '[{name: "plugin_rewards:Brightness"}]',  # smooth: a JPEG may be a byte larger by rounding alone
        "advantages.kind": "batch", "update.num_updates": 2, "update.micro_batch_size": 4, "update.clip_range": 1e-3,
        "optimizer.lr": 1e-4, "evaluation.every": 0, "tracking.grid_every": 0,
        "tracking.tensorboard": "false", "checkpoint.every": 0,
    }  # fmt: skip
    trainer = Trainer(parse_config([f"--{name}={value}" for name, value in settings.items()]))
    try:
        trainer.run()
    finally:
        dispatch.set_default("auto")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines, trainer.engine.full_weights()


@pytest.mark.slow
@pytest.mark.telling
def test_twenty_updates_are_the_same_in_torch_and_in_triton(tmp_path: Path):
    ours, our_weights = train(tmp_path / "triton", "triton")
    theirs, their_weights = train(tmp_path / "torch", "torch")
    (file,) = (Path(resolve_model_path("shapes/lcm")) / "unet").glob("*.safetensors")
    start = load_file(file)
    assert len(ours) == 10
    assert max(line["clip_fraction"] for line in theirs) > 0.1
    # Some gradients are small because four transitions cancel each other; rounding does not shrink with them.
    usual = max(line["grad_norm"] for line in theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-6)  # seen: 9e-8
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], abs=1e-5 * usual)  # seen: 5e-6 of it
        assert our["ratio/mean"] == pytest.approx(their["ratio/mean"], abs=1e-6)
    moved = math.sqrt(sum((their_weights[name] - value).square().sum() for name, value in start.items()))
    apart = math.sqrt(sum((their_weights[name] - value).square().sum() for name, value in our_weights.items()))
    assert 0 < apart < 1e-4 * moved  # seen: 5e-6
