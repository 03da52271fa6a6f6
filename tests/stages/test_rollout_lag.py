"""update.rollout_lag=1: the next round is drawn before an update; a restart draws nothing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.engine.tensor_files import read_tensors
from rlcm_fast.run_folder.interruption import Interrupted
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")


def config_of(model: str, run_dir: Path, **settings: object) -> Config:
    return parse_config(tiny_runs.arguments(model, run_dir, {k.replace("__", "."): v for k, v in settings.items()}))


def run(config: Config) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Trains; returns the metrics and the last checkpoint's weights."""
    Trainer(config).run()
    folder = Path(config.run_dir)
    return tiny_runs.metrics(folder), read_tensors(folder / "checkpoints/iteration_000003/unet.safetensors")


def settings(**more: object) -> dict[str, object]:
    return {"update__num_updates": 1, "update__micro_batch_size": 4, "checkpoint__every": 1, **more}


def test_the_first_images_are_the_same_and_later_ones_are_one_update_old(tiny_lcm_folder: str, tmp_path: Path):
    plain, _ = run(config_of(tiny_lcm_folder, tmp_path / "plain", **settings()))
    lagging, _ = run(config_of(tiny_lcm_folder, tmp_path / "lagging", **settings(update__rollout_lag=1)))
    name = f"reward/{tiny_runs.REWARD}/mean"
    assert lagging[0][name] == plain[0][name]
    # Rollout and update round alike on an Intel Xeon (0), and differ by 1.2e-7 on an AMD EPYC.
    assert [line["ratio/max_deviation"] > 1e-6 for line in lagging] == [False, True, True], "as the ratio must correct"
    assert all(line["ratio/max_deviation"] == 0 for line in plain)
    assert lagging[2][name] != plain[2][name]


@pytest.mark.slow
@pytest.mark.telling
def test_an_interrupted_run_equals_one_left_alone(tiny_lcm_folder: str, tmp_path: Path):
    whole = run(config_of(tiny_lcm_folder, tmp_path / "whole", **settings(update__rollout_lag=1)))
    cut = config_of(tiny_lcm_folder, tmp_path / "cut", **settings(update__rollout_lag=1))
    trainer = Trainer(cut)
    update = trainer.updater.update

    def interrupted(trajectory: Any, weights: Any, turn: Any, may_stop: Any) -> Any:
        if turn.iteration == 1:
            raise Interrupted
        return update(trajectory, weights, turn, may_stop)

    trainer.updater.update = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.run() is False
    again = run(config_of(tiny_lcm_folder, tmp_path / "cut", resume="latest", **settings(update__rollout_lag=1)))
    assert again[0] == whole[0]
    assert not list((tmp_path / "cut/rounds").iterdir()), "the last checkpoint has learned from all"
    assert all(torch.equal(again[1][name], tensor) for name, tensor in whole[1].items())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"algorithm.name": "rwr"}, "algorithm.name=rwr has no clipped ratio"),
        ({"algorithm.name": "reinforce"}, "algorithm.name=reinforce has no clipped ratio"),
        ({"update.old_log_probs": "recompute"}, "update.old_log_probs=rollout"),
        ({"rewards": [{"name": "jpeg_compressibility", "offload": True}]}, "rewards[0].offload=true"),
    ],
)
def test_what_cannot_lag_is_refused(settings: dict[str, object], problem: str, tiny_lcm_folder: str, tmp_path: Path):
    lagging = {"update.num_updates": 1, "update.micro_batch_size": 4, "update.rollout_lag": 1}
    config = parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path, {**lagging, **settings}))
    with pytest.raises(ValueError) as caught:
        validate(config, 1)
    assert problem in str(caught.value)
