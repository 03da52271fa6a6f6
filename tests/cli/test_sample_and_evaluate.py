"""rlcm-fast sample and evaluate, on pipelines with random weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rlcm_fast.cli import pipelines
from rlcm_fast.cli.evaluate import statistics
from rlcm_fast.cli.main import main
from rlcm_fast.cli.pipelines import draw, load_pipeline


@pytest.fixture(params=["lcm", "sd", "sdxl"])
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def evaluate(folder: str, tmp_path: Path, *more: str) -> dict:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na star\n")
    arguments = ["--model", folder, "--prompts", str(prompts), "--rewards", "jpeg_compressibility"]
    out = tmp_path / "report.json"
    assert main(["evaluate", *arguments, "--num-images", "5", "--seed", "3", *more, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_sample_writes_a_grid_with_a_row_for_each_prompt(folder: str, tmp_path: Path):
    sizes = []
    for prompts in (["a red circle"], ["a red circle", "a star"]):
        out = tmp_path / "new" / f"{len(prompts)}.png"
        arguments = ["--model", folder, "--num-steps", "2", "--num-images", "3", "--out", str(out)]
        assert main(["sample", *arguments, "--prompt", *prompts]) == 0
        sizes.append(Image.open(out).size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.5 * sizes[0][1]


def test_an_image_depends_on_its_seed_and_not_on_the_batch_it_is_drawn_in(folder: str):
    pipeline = load_pipeline(folder, device="cpu")
    texts = ["a red circle", "a star", "a blue square"]
    whole, _ = draw(pipeline, texts, num_steps=2, guidance_scale=3.0, seed=5, batch_size=3)
    parts, _ = draw(pipeline, texts, num_steps=2, guidance_scale=3.0, seed=5, batch_size=2)
    other, _ = draw(pipeline, texts, num_steps=2, guidance_scale=3.0, seed=6, batch_size=3)
    assert whole.shape == (3, 3, 16, 16)
    assert 0 <= whole.min() < whole.max() <= 1
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert not torch.allclose(other, whole, atol=1e-2)


def test_evaluate_reports_each_number_of_steps_and_reward(folder: str, tmp_path: Path):
    more = ["--rewards", "jpeg_compressibility", "jpeg_incompressibility", "--num-steps", "1", "2"]
    report = evaluate(folder, tmp_path, *more)
    assert [result["num_steps"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        assert result["seconds_per_image"] > 0
        compressibility, size = (result["rewards"][f"jpeg_{name}"] for name in ("compressibility", "incompressibility"))
        assert compressibility["mean"] == -size["mean"] < 0
        assert size["standard_error"] == pytest.approx(size["std"] / 5**0.5)


def test_evaluate_takes_a_reward_as_a_config_does_and_has_a_value_for_each_group(tiny_lcm_folder: str, tmp_path: Path):
    pairs = "{name: diversity, group_size: 2}"
    more = ["--rewards", pairs, "jpeg_compressibility", "--num-images", "6"]
    rewards = evaluate(tiny_lcm_folder, tmp_path, *more)["results"][0]["rewards"]
    assert rewards["diversity"]["mean"] > 0
    assert rewards["diversity"]["standard_error"] == pytest.approx(rewards["diversity"]["std"] / 3**0.5)
    assert rewards["jpeg_compressibility"]["standard_error"] == pytest.approx(
        rewards["jpeg_compressibility"]["std"] / 6**0.5
    )


def test_evaluate_gives_the_same_numbers_for_the_same_seed(tiny_lcm_folder: str, tmp_path: Path):
    first, second = (evaluate(tiny_lcm_folder, tmp_path)["results"][0]["rewards"] for _ in range(2))
    assert first == second
    assert evaluate(tiny_lcm_folder, tmp_path, "--seed", "4")["results"][0]["rewards"] != first


def test_evaluate_prints_nothing_but_json_to_stdout(tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", tiny_lcm_folder, "--rewards", "jpeg_compressibility", "--num-images", "2"]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == "shapes:one:held_out"


def test_statistics_are_those_of_a_sample():
    assert statistics(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        {"mean": 3.0, "std": (14 / 3) ** 0.5, "standard_error": (14 / 3) ** 0.5 / 2}
    )
    assert statistics(torch.tensor([2.0])) == {"mean": 2.0, "std": 0.0, "standard_error": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "/no/where", "--prompt", "x"], "model=/no/where does not exist; give"),
        (["sample", "--model", ".", "--prompt", "x"], "not a diffusers folder: it has no model_index.json; give"),
        (
            ["sample", "--model", "shapes/lcm", "--prompt", "x", "--out", "grid.txt"],
            "out=grid.txt has no known ending",
        ),
        (
            ["sample", "--model", "shapes/lcm", "--prompt", "x", "--out", "a.png/b.png"],
            "b.png cannot be written (",
        ),
        (["sample", "--model", "shapes/lcm", "--prompt", "x", "--out", "runs.png"], "out=runs.png is a folder;"),
        (
            ["sample", "--model", "shapes/lcm", "--prompt", "x", "--device", "gpu"],
            "device=gpu cannot be used (",
        ),
        (
            ["evaluate", "--model", ".", "--rewards", "diversity", "--out", "runs"],
            "out=runs is a folder",
        ),
        (
            ["evaluate", "--model", ".", "--rewards", "{name: diversity, group_size: 3}"],
            "does not divide the 64",
        ),
        (["evaluate", "--model", ".", "--rewards", "jpeg_size"], "=jpeg_size is not known; "),
        (
            ["evaluate", "--model", ".", "--rewards", "{name: aesthetic_v2_5, arguments: {head: no.pth}}"],
            "head=no.pth do",
        ),
        (["evaluate", "--model", ".", "--rewards", "{name: diversity, groups: 2}"], "rewards[0].groups is no field of"),
        (["sample", "--model", "shapes/lcm", "--lora", "/no", "--prompt", "x"], "lora=/no is not a LoRA; give a"),
        (["sample", "--model", "runs/typo", "--prompt", "x"], "model=runs/typo does not exist; give"),
        (["evaluate", "--model", ".", "--rewards", "jpeg_compressibility", "--prompts", "no.txt"], "prompts=no.txt"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "runs.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.png").touch()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_what_was_drawn_is_not_lost_when_the_disk_fills_meanwhile(
    tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    save = Image.Image.save

    def save_elsewhere(image: Image.Image, path: Path, **settings: object) -> None:
        if path == tmp_path / "grid.png":
            raise OSError(28, "No space left on device")
        save(image, path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", save_elsewhere)
    arguments = ["--model", tiny_lcm_folder, "--num-steps", "1", "--num-images", "1", "--prompt", "a star"]
    assert main(["sample", *arguments, "--out", str(tmp_path / "grid.png")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: out={tmp_path}/grid.png could not be written (No space left on device); the result")
    assert Image.open(said.rpartition(" ")[2]).size[0] > 0


def test_a_reward_that_fails_does_so_before_all_images_are_drawn(
    tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]
):
    faulty = "{name: plugin_rewards:Faulty, arguments: {fault: exception, good_calls: 0}}"
    start = time.perf_counter()
    assert main(["evaluate", "--model", tiny_lcm_folder, "--rewards", faulty, "--num-images", "1000000"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "error: rewards[0].name=plugin_rewards:Faulty, tried on two random images: it raised OSError"
    )
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "arguments", [[], ["sampel"], ["sample"], ["sample", "--model", "x", "--prompt", "y", "--num-steps", "0"]]
)
def test_a_wrong_argument_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_reward_that_may_fail_is_for_runs():
    from rlcm_fast.cli.evaluate import reward_configs

    with pytest.raises(ValueError, match="name=diversity on_failure=skip works in a run only, .*; leave it out"):
        reward_configs(["{name: diversity, on_failure: skip}"])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_text_settings_draw_as_the_pipeline_does_with_them(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    drawn: list[torch.Tensor] = []
    original = pipelines.draw

    def noted(*settings: Any) -> tuple[torch.Tensor, float]:
        images, seconds = original(*settings)
        drawn.append(images)
        return images, seconds

    monkeypatch.setattr(pipelines, "draw", noted)
    common = ["sample", "--model", folder, "--num-steps", "2", "--num-images", "1", "--out", str(tmp_path / "a.png")]
    assert main([*common, "--prompt", "a star", "--negative", "blurry"]) == 0
    assert main([*common, "--prompt", "a star", "--long", "chunks"]) == 0
    assert main([*common, "--prompt", "a star"]) == 0
    pipeline: Any = load_pipeline(folder, device="cpu")
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    expected = pipeline("a star", negative_prompt="blurry", generator=generator, **settings).images
    torch.testing.assert_close(drawn[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn[1], drawn[2], atol=1e-5, rtol=0)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_sample_skips_layers_and_says_what_it_cuts(
    tiny_sd_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["sample", "--model", tiny_sd_folder, "--num-steps", "2", "--num-images", "1"]
    long = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
    for name, more in {"a": [], "b": ["--clip-skip", "1"], "c": ["--long", "chunks"]}.items():
        assert main([*common, "--prompt", long, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
        said = capsys.readouterr().err
        assert ("1 of 1 distinct prompts are too long for the 30 tokens" in said) == (name != "c")
        assert "truncated" not in said
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert len(set(pictures)) == 3


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "sd",
            ["--negative", "x", "--guidance-scale", "1"],
            "negative=x has no use with guidance-scale=1, which is no",
        ),
        ("sd", ["--max-chunks", "3"], "max-chunks=3 has no use with long=cut; give --long chunks, too"),
        ("sd", ["--clip-skip", "2"], "clip-skip=2 leaves no layer of this model's text encoder; give 1 to 1"),
        ("lcm", ["--negative", "x"], "negative=x has no use: the guidance scale is an input of this model's UNet"),
    ],
)
def test_text_settings_without_a_use_end_in_one_line(
    kind: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
):
    arguments = ["--model", request.getfixturevalue(f"tiny_{kind}_folder"), "--out", str(tmp_path / "a.png")]
    assert main(["sample", "--prompt", "a star", *arguments, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: {message}"), "nothing is loaded before"
    assert "\n" not in line
