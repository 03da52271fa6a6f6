"""fine_tune: the command line's run from Python, in a process that stays the program's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import rlcm_fast
from rlcm_fast.faults import Fault
from rlcm_fast.train import main
from tests.support import tiny_runs

PROMPTS = list(tiny_runs.PROMPTS)
TINY: dict[str, Any] = {
    **{name.replace(".", "__"): value for name, value in tiny_runs._SETTINGS.items() if name != "rewards"},
    "num_iterations": 2,
}


def redness(images, texts):
    assert set(texts) <= set(PROMPTS)
    return images[:, 0].mean(dim=(1, 2)).tolist()


def broken(images, texts):
    raise OSError("no network")


def tuned(model: Any, run_dir: Path, **more: Any) -> rlcm_fast.Run:
    settings = {"rewards": [redness], "prompts": PROMPTS, "run_dir": str(run_dir), **TINY, **more}
    return rlcm_fast.fine_tune(model, **settings)


def _of_process() -> dict[str, Any]:
    """What a run changes about its process."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "warnings": list(warnings.filters),
        "group": torch.distributed.is_initialized(),
        "exceptions": sys.excepthook,
        "random": torch.random.get_rng_state().tolist(),
    }


def _threads_since(before: set[threading.Thread]) -> list[str]:
    """The threads that have begun since and go on; one that is ending, as a reward's worker, gets 5 s for it."""
    deadline = time.monotonic() + 5
    while True:
        new = [thread.name for thread in threading.enumerate() if thread not in before]
        new = [name for name in new if name != "tqdm_monitor"]
        if not new or time.monotonic() > deadline:
            return new
        time.sleep(0.05)


def _metrics(run: rlcm_fast.Run) -> list[dict[str, Any]]:
    return tiny_runs.metrics(run.run_dir)


def test_the_command_line_and_python_train_alike_and_python_leaves_no_trace(tiny_lcm_folder: str, tmp_path: Path):
    arguments = tiny_runs.arguments(
        tiny_lcm_folder, tmp_path / "line", {"rewards": [{"name": "jpeg_compressibility"}], "num_iterations": 2}
    )
    source = Path(tiny_lcm_folder) / "prompts.txt"
    seen = []
    before, threads = _of_process(), set(threading.enumerate())
    run = tuned(
        tiny_lcm_folder,
        tmp_path / "python",
        rewards=["jpeg_compressibility"],
        prompts=source,
        callback=lambda iteration, metrics: seen.append((iteration, metrics["reward/total/mean"])),
    )
    after = _of_process()
    assert {name for name in before if before[name] != after[name]} == set()
    assert _threads_since(threads) == []
    assert run.is_finished and [iteration for iteration, _ in seen] == [0, 1]
    assert [mean for _, mean in seen] == [metrics["reward/total/mean"] for metrics in run.metrics]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that it is undone
            patch.delenv(name)
        assert main(arguments) == 0
    assert _metrics(run) == tiny_runs.metrics(tmp_path / "line")


def test_a_pipeline_in_memory_resumes_to_the_run_that_was_never_stopped(tiny_lcm_folder: str, tmp_path: Path):
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_lcm_folder)
    start = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    whole = tuned(tiny_lcm_folder, tmp_path / "whole")

    # The callback ends it early; the pipeline in memory stays what it was.
    half = tuned(pipeline, tmp_path / "halves", callback=lambda iteration, metrics: iteration == 0)
    assert half.is_finished and len(half.metrics) == 1
    assert all(torch.equal(weight, start[name]) for name, weight in pipeline.unet.state_dict().items())
    tuned_weights = half.pipeline.unet.state_dict()
    assert any(not torch.equal(tuned_weights[name], start[name]) for name in start)
    card = (tmp_path / "halves" / "export" / "README.md").read_text()
    assert "for 1 iterations" in card

    # Another pipeline is refused; the same one goes on from the same folder.
    with pytest.raises(ValueError, match="is not the pipeline that run_dir=.* was trained from"):
        tuned(half.pipeline, tmp_path / "halves", resume="latest")
    rest = tuned(pipeline, tmp_path / "halves", resume="latest")
    assert _metrics(rest) == _metrics(whole)
    assert len(list((tmp_path / "halves").glob("start_model_*"))) == 1
    assert rest.weights is not None and whole.weights is not None
    assert rest.weights.read_bytes() == whole.weights.read_bytes()


def test_ctrl_c_leaves_a_checkpoint_and_gives_the_program_back(
    tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def press(iteration, metrics):
        os.kill(os.getpid(), signal.SIGINT)

    run = tuned(tiny_lcm_folder, tmp_path / "run", callback=press)
    assert not run.is_finished and len(run.metrics) == 1 and run.lora is None
    assert "stopped after 1 iterations" in capsys.readouterr().err
    assert type(run.pipeline).__name__ == "LatentConsistencyModelPipeline"

    # The command line cannot import the function, and says so.
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "latest"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: rewards[0].name=python:redness was given to the run in Python and cannot be imported"
    )
    assert said.count("\n") == 1


def test_a_failure_does_not_poison_the_next_call(tiny_lcm_folder: str, tmp_path: Path):
    calls = []

    def later(images, texts):
        calls.append(len(images))
        return redness(images, texts) if len(calls) == 1 else broken(images, texts)  # the first is at the start

    with pytest.raises(Fault, match="reward 'python:later', .*: raised OSError: no network; repair the reward"):
        tuned(tiny_lcm_folder, tmp_path / "run", rewards=[later])
    with pytest.raises(ValueError, match=r"rewards\[0\].name=python:broken, tried on two random images: it raised OSE"):
        tuned(tiny_lcm_folder, tmp_path / "run", rewards=[broken])
    assert tuned(tiny_lcm_folder, tmp_path / "run", num_iterations=1).is_finished  # nothing was finished there


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"update__clip_rage": 1}, "update__clip_rage is no field of the config; did you mean update__clip_range? "),
        ({"update": {"clip_range": 1}}, "update is a section; write its fields as update__FIELD=VALUE"),
        ({"optimizer__lr": "fast"}, "optimizer.lr=fast is not allowed; give a number"),
        ({"optimizer__lr": -1.0}, "optimizer.lr=-1.0 is out of range; give a positive number"),
        ({"prompts__source": "x.txt"}, "prompts__source is given as prompts; write it there"),
        ({"rewards": ["jpeg_compresibility"]}, "rewards[0].name=jpeg_compresibility is not known; did you mean"),
        ({"rewards": redness}, "rewards=<function redness at "),
        ({"rewards": [(redness, 1.0), 3]}, "rewards[1]=3 is no reward; give a name, a function or object"),
        ({"rewards": [redness, redness]}, "rewards[1] is called python:redness, as another reward; give each"),
        ({"rewards": [{"name": redness, "dtype": "bf16"}]}, "rewards[0].dtype=bf16 of python:redness: its models are"),
        ({"prompts": ["a cat", " "]}, "prompts[1]=' ' is no prompt; give a text that is not empty"),
        ({"prompts": list}, "prompts=[] holds no prompts; give at least one"),
        ({"prompts": ["a cat"]}, "holds 1 prompts, fewer than the prompts.num_prompts=2"),
        ({"resume": "latest"}, "resume=latest finds no run in run_dir="),
        ({"dry_run": True}, "dry_run=true trains nothing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: dict[str, Any], message: str, tiny_lcm_folder: str, tmp_path: Path
):
    with pytest.raises(ValueError) as error:
        tuned(tiny_lcm_folder, tmp_path / "run", **mistake)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if "fewer than" not in message:  # what the prompts are counted against is known only with the rest
        assert not (tmp_path / "run").exists()


def test_a_pipeline_that_no_folder_can_hold_is_refused(tiny_sd_folder: str, tmp_path: Path):
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd_folder)
    with pytest.raises(ValueError, match="is a VaeImageProcessor; give a Stable Diffusion, SDXL or LCM pipeline"):
        tuned(pipeline.image_processor, tmp_path / "run")
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"with LoRAs beside its UNet; call its fuse_lora\(\)"):
        tuned(pipeline, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_for_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: fine_tune trains in one process; for several"):
        tuned("shapes/lcm", tmp_path / "run")


def test_the_readmes_first_call_and_lists_of_any_length_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr("rlcm_fast.api.run_here", lambda config, *_: seen.append(config.prompts))
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (call,) = [line.strip() for line in readme.splitlines() if "rlcm_fast.fine_tune(" in line]
    exec(call, {"rlcm_fast": rlcm_fast, "redness": redness})  # noqa: S102
    for count in (1, 3, 15, 16, 20):
        rlcm_fast.fine_tune("shapes/lcm", [redness], [f"text {n}" for n in range(count)], run_dir="run")
    chosen = [(prompts.num_prompts, prompts.images_per_prompt) for prompts in seen]
    assert chosen == [(2, 32), (1, 64), (2, 32), (8, 8), (16, 4), (16, 4)]
    rlcm_fast.fine_tune("shapes/lcm", [redness], ["a", "b"], prompts__num_prompts=16, run_dir="run")
    assert seen[-1].num_prompts == 16, "which the run will refuse"


def test_a_run_shows_where_it_is(tiny_lcm_folder: str, tmp_path: Path):
    run = tuned(tiny_lcm_folder, tmp_path / "run", lora__rank=2, num_iterations=1)
    assert repr(run) == f"Run(run_dir='{tmp_path}/run', is_finished=True)"
    assert run.lora == tmp_path / "run" / "lora"
    assert (tmp_path / "run" / "lora" / "kohya.safetensors").is_file()
    assert run.weights is not None and run.weights.name == "adapters.safetensors"


def test_the_package_and_a_wrong_field_import_no_torch():
    code = """
import sys, rlcm_fast
assert "fine_tune" in dir(rlcm_fast) and "jsonargparse" not in sys.modules
try:
    rlcm_fast.fine_tune("shapes/lcm", update__clip_rage=1)
except ValueError as error:
    assert "did you mean" in str(error)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
