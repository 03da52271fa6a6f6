"""The seconds of an H200's measured iterations, from the known figures of SD1.5: nothing is traced."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast.config import parse_config
from rlcm_fast.config.resolved import resolve
from rlcm_fast.planner import efficiency, seconds
from rlcm_fast.planner.estimate import Profiles, strategy_of
from rlcm_fast.planner.gpus import GPUS
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.tracing import Curve, Flops, ImageProfile, NetworkProfile, VaeProfile
from rlcm_fast.planner.workload import Workload

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu" / "nvidia_h200"
NONE = Curve(((1, 0), (2, 0)))
UNET = NetworkProfile(
    (859_580_804,), 0, NONE, NONE, NONE, Flops(443.95e9, 359.33e9), Flops(1331.74e9, 1138.06e9), 1781, 5126
)
DECODER = ImageProfile(49_490_199, NONE, Flops(2471.57e9, 42.95e9))


def measured() -> list[tuple[int, int, float]]:
    """Images, micro-batch and seconds of the iterations without torch.compile."""
    found = []
    for name in ("full_size.json", "full_size_64_images.json"):
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        images = result["samples"]
        plain = [mode for mode in result["modes"] if mode["compile"] == "off"]
        found += [(images, mode["micro_batch_size"], mode["full_seconds"]) for mode in plain]
        found += [(images, more["micro_batch_size"], more["seconds_per_iteration"]) for more in result["micro_batches"]]
    return found


def planned(images: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> float:
    options = ["--config=configs/sd15_lcm/full_24gb.yaml", f"--prompts.num_prompts={images // 8}"]
    config = parse_config([*options, f"--update.micro_batch_size={micro_batch}", "--model.vae_dtype=fp32"])
    sizes = {"rollout_micro_batch_size": micro_batch, "micro_batch_size": micro_batch, "decode_batch_size": 4}
    strategy = replace(strategy_of(config), **sizes)
    architecture: Any = None
    planner = Planner(architecture, Workload.of(resolve(config, 1)))
    profiles = Profiles(UNET, VaeProfile(DECODER, DECODER), 123_060_480, 4 * 64 * 64 * 4, 77 * 768 * 2)
    monkeypatch.setattr(seconds, "measure", lambda *_: profiles)
    return planner.seconds(strategy, GPUS["h200"]).iteration


def errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return [math.log(planned(images, size, monkeypatch) / took) for images, size, took in measured()]


def test_every_measured_iteration_is_planned_within_the_stated_error(monkeypatch: pytest.MonkeyPatch):
    assert len(measured()) == 4
    largest = max(abs(math.exp(error) - 1) for error in errors(monkeypatch))
    assert largest == pytest.approx(efficiency.ERROR, abs=0.01)
    assert {(size, images) for images, size, _ in measured()} == {(8, 32), (8, 64), (16, 32), (32, 32)}


@pytest.mark.parametrize("name", ["UNET_SHARE", "CALL_SECONDS"])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_no_other_constant_fits_better(name: str, factor: float, monkeypatch: pytest.MonkeyPatch):
    fitted = sum(error**2 for error in errors(monkeypatch))
    monkeypatch.setattr(seconds, name, factor * getattr(seconds, name))
    assert sum(error**2 for error in errors(monkeypatch)) > fitted


def test_larger_micro_batches_save_the_hosts_part_alone(monkeypatch: pytest.MonkeyPatch):
    few, many = (planned(32, size, monkeypatch) for size in (8, 32))
    calls = 32 * 8 * UNET.forward_calls + 32 * 7 * UNET.training_calls
    assert few - many == pytest.approx(calls * efficiency.CALL_SECONDS * (1 / 8 - 1 / 32))
