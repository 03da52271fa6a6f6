"""Runs with long prompts: what is cut is said once, before training, and chunks train, resume and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from rlcm_fast import build
from rlcm_fast.config import parse_config
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"  # a token each: the tiny models read 30 and see 36 and 72
PROMPTS = ["a red circle", " ".join(LETTERS), "a star", " ".join(LETTERS * 2), "two cats"]


def run(folder: str, run_dir: Path, **settings: Any) -> Trainer:
    """Runs two iterations on PROMPTS; settings with __ for the dots."""
    source = run_dir.parent / "long.txt"
    source.write_text("\n".join(PROMPTS))
    named = {name.replace("__", "."): value for name, value in settings.items()}
    more = {"prompts.source": source, "evaluation.prompts": source, "num_iterations": 2, **named}
    trainer = Trainer(parse_config(tiny_runs.arguments(folder, run_dir, more)))
    trainer.run()
    return trainer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(build, "say", lines.append)
    return lines


def test_a_run_says_once_how_many_prompts_are_cut(tiny_lcm_folder: str, tmp_path: Path, said: list[str]):
    run(tiny_lcm_folder, tmp_path / "run")
    (line,) = [line for line in said if "distinct prompts" in line]
    head = "2 of 5 distinct prompts are too long for the 30 tokens of a text encoder, and are cut; the longest has 72: "
    assert line == f"{head}'{PROMPTS[3][:40]}...'; prompts.long=chunks reads more"


@pytest.mark.parametrize("kind", ["lcm", "sdxl"])
def test_chunks_train_with_one_shape_and_export(
    kind: str, tmp_path: Path, said: list[str], request: pytest.FixtureRequest
):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    shapes: set[Any] = set()
    settings = {"prompts__long": "chunks", "prompts__max_chunks": 3, "evaluation__every": 1}
    more = {} if kind == "lcm" else {"policy__kind": "ddim", "prompts__negative": "blurry"}
    original = build.build_engine

    def watched(unet: Any, resolved: Any) -> Any:
        unet.register_forward_pre_hook(
            lambda _, args, named: shapes.add(named["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        return original(unet, resolved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_engine", watched)
        run(folder, tmp_path / "run", **settings, **more)
    assert shapes == {6 * 32}
    assert not any("distinct prompts" in line for line in said)
    assert len(tiny_runs.metrics(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| long prompts | 3 chunks of 75 tokens |" in card
    assert ("| negative prompt | blurry |" in card) == (kind == "sdxl")
