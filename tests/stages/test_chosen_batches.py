"""Numbers instead of `auto` at a run's start: on a CPU, on a made-up GPU, after a resume, on several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from planners import planner_of
from torch._inductor import compile_fx

from rlcm_fast import build, parallel
from rlcm_fast.config import Config, EngineConfig, parse_config, to_yaml
from rlcm_fast.config.batches import Batches, batches_of, has_auto
from rlcm_fast.faults import SharedMistake
from rlcm_fast.planner import seconds
from rlcm_fast.planner.estimate import GIB
from rlcm_fast.run_folder.failures import WordsOfRun
from rlcm_fast.stages import chosen_batches
from rlcm_fast.stages.chosen_batches import choose_batches
from rlcm_fast.stages.compile_check import NotCompiled
from rlcm_fast.train import main
from rlcm_fast.trainer import Trainer

ALL = ["--update.micro_batch_size=auto", "--rollout.micro_batch_size=auto", "--rollout.decode_batch_size=auto"]
SETTINGS = {"update.micro_batch_size": "auto", "rollout.micro_batch_size": "auto", "rollout.decode_batch_size": "auto"}
EAGER = "--engine.compile=off"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def numbers(config: Config) -> Batches:
    assert not has_auto(config)
    return batches_of(config)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 1.4 GiB, for which the shipped model is planned."""
    state = SimpleNamespace(total_memory=round(1.4 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: state)
    monkeypatch.setattr(seconds, "Planner", lambda architecture, *more: planner_of(architecture.name, *more))
    return state


def chosen(device: torch.device, *options: str) -> tuple[Config, list[str]]:
    said: list[str] = []
    return choose_batches(parse_config([*ALL, EAGER, *options]), device, said.append).config, said


def test_a_config_of_numbers_stays_as_it_is():
    said: list[str] = []
    config = parse_config([EAGER])  # attention is chosen later
    assert choose_batches(config, GPU, said.append).config is config and said == []


def test_a_cpu_has_fixed_numbers_and_plans_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chosen_batches, "planner_of", None)
    config, said = chosen(CPU, f"--run_dir={tmp_path / 'run'}")
    assert numbers(config) == Batches(64, 64, 0)
    sizes = "update.micro_batch_size=64, rollout.micro_batch_size=64, rollout.decode_batch_size=0"
    assert said == [f"auto: {sizes} (fixed numbers on a CPU)"]


def test_a_gpu_gets_the_largest_that_are_planned_to_fit(gpu: SimpleNamespace, tmp_path: Path):
    run_dir = f"--run_dir={tmp_path / 'run'}"
    config, said = chosen(GPU, run_dir)
    small = numbers(config)
    assert said == [f"auto: {small}, the largest planned to fit 1.4 GiB"]
    gpu.total_memory = 24 * GIB
    roomy, _ = chosen(GPU, run_dir)
    assert numbers(roomy) == Batches(64, 64, 16)
    assert small.update < 64
    capped, said = chosen(GPU, run_dir, "--engine.memory_gib=1.4")
    assert numbers(capped) == small
    given, _ = chosen(GPU, run_dir, "--update.micro_batch_size=3")
    assert numbers(given) == Batches(3, 64, 16)


GRAPHS = ("--engine.graphs=auto", EAGER, "--engine.dtype=pure_bf16", "--optimizer.name=adamw_8bit")


def test_a_gpu_with_room_gets_graphs_and_the_others_keep_their_larger_micro_batches(
    gpu: SimpleNamespace, tmp_path: Path
):
    run_dir = f"--run_dir={tmp_path / 'run'}"
    gpu.total_memory = 24 * GIB
    roomy, said = chosen(GPU, run_dir, *GRAPHS)
    assert numbers(roomy) == Batches(64, 64, 16) and roomy.engine.graphs == "auto" and len(said) == 1
    gpu.total_memory = round(1.3 * GIB)
    small, said = chosen(GPU, run_dir, *GRAPHS)
    assert small.engine.graphs == "off"
    assert numbers(small) == numbers(chosen(GPU, run_dir, *GRAPHS[1:])[0])  # without graphs
    assert said[1].startswith("engine.graphs=auto: no graphs, with which these micro-batches would take ")
    assert chosen(GPU, run_dir, "--engine.graphs=off", *GRAPHS[1:])[0].engine.graphs == "off"


def test_graphs_are_left_out_beside_given_numbers_too_and_no_number_is_tried(gpu: SimpleNamespace, tmp_path: Path):
    given = ["--update.micro_batch_size=64", "--rollout.micro_batch_size=64", f"--run_dir={tmp_path / 'run'}", *GRAPHS]
    found = {}
    for gib in (1.4, 24.0):
        said: list[str] = []
        choice = choose_batches(parse_config([*given, f"--engine.memory_gib={gib}"]), GPU, said.append)
        found[choice.config.engine.graphs] = said
        assert choice.plan is None and batches_of(choice.config) == Batches(64, 64, 0)
    assert found["auto"] == [] and len(found["off"]) == 1


IDLE = "--engine.offload_idle=auto"


def test_idle_parts_stay_where_they_cost_no_micro_batch_and_no_graph(gpu: SimpleNamespace, tmp_path: Path):
    moves: dict[float, bool | str] = {}
    for gib in (0.9, 1.1, 1.3, 24.0):
        options = (f"--run_dir={tmp_path / 'run'}", f"--engine.memory_gib={gib}", *GRAPHS)
        moving, _ = chosen(GPU, *options, "--engine.offload_idle=true")
        free, said = chosen(GPU, *options, IDLE)
        assert numbers(free) == numbers(moving) and free.engine.graphs == moving.engine.graphs
        assert sum(line.startswith("engine.offload_idle=auto: ") for line in said) == 1
        moves[gib] = free.engine.offload_idle
    assert moves[0.9] is True and moves[24.0] is False


def test_idle_parts_of_a_run_with_graphs_on_stay_because_the_decoder_has_one(gpu: SimpleNamespace, tmp_path: Path):
    options = (f"--run_dir={tmp_path / 'run'}", "--engine.memory_gib=0.5", *GRAPHS[1:], "--engine.graphs=on", IDLE)
    assert chosen(GPU, *options)[0].engine.offload_idle is False


def test_on_a_cpu_nothing_is_said_to_move(tmp_path: Path):
    config, said = chosen(CPU, f"--run_dir={tmp_path / 'run'}", IDLE)
    assert config.engine.offload_idle is False and len(said) == 1
    numbered = parse_config([IDLE, f"--run_dir={tmp_path / 'run'}"])
    assert choose_batches(numbered, CPU, said.append).config.engine.offload_idle is False and len(said) == 1


def test_without_a_plan_auto_is_what_needs_the_least_memory(gpu: SimpleNamespace, tmp_path: Path):
    said: list[str] = []
    options = [*GRAPHS, IDLE, "--engine.compile=auto", f"--run_dir={tmp_path / 'run'}", "--model.path=some/one"]
    engine = choose_batches(parse_config(options), GPU, said.append).config.engine
    assert (engine.compile, engine.graphs, engine.offload_idle) == ("regional", "off", True)
    start = "engine.compile=auto is regional, engine.graphs=auto is off, engine.offload_idle=auto is true, because "
    assert said[0].startswith(f"{start}nothing can be planned: model.path=some/one is")


def test_a_gpu_compiles_the_network_whole_beside_numbers_too_and_says_so(gpu: SimpleNamespace, tmp_path: Path):
    said: list[str] = []
    numbered = parse_config([f"--run_dir={tmp_path / 'run'}", "--engine.memory_gib=24"])
    choice = choose_batches(numbered, GPU, said.append)
    assert choice.config == replace(numbered, engine=replace(numbered.engine, compile="whole"))
    assert choice.asked.compile == "auto" and choice.plan is None and said == ["engine.compile=auto: whole"]
    free, said = chosen(GPU, f"--run_dir={tmp_path / 'run'}", "--engine.memory_gib=24", "--engine.compile=auto")
    assert free.engine.compile == "whole" and said[1:] == ["engine.compile=auto: whole"]


def test_a_cpu_compiles_nothing_of_itself_and_does_not_mention_it():
    said: list[str] = []
    assert choose_batches(Config(), CPU, said.append).config.engine.compile == "off"
    assert choose_batches(parse_config(["--engine.compile=whole"]), CPU, said.append).config.engine.compile == "whole"
    assert said == []


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mode", ["off", "regional", "whole"])
def test_a_run_that_resumes_compiles_what_it_did(gpu: SimpleNamespace, tmp_path: Path, mode: str):
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config([f"--engine.compile={mode}"])))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    said: list[str] = []
    again = parse_config([f"--run_dir={tmp_path}", "--resume=latest", "--engine.memory_gib=24"])
    choice = choose_batches(again, GPU, said.append)
    assert (choice.config.engine.compile, choice.asked.compile) == (mode, "auto") and said == []

    # What the config does not allow any more is chosen anew.
    stepping = [*GRAPHS[2:], "--engine.optimizer_in_backward=true", "--update.micro_batch_size=192"]
    other = parse_config([f"--run_dir={tmp_path}", "--resume=latest", "--engine.memory_gib=24", *stepping])
    expected = "regional" if mode == "whole" else mode
    assert choose_batches(other, GPU, said.append).config.engine.compile == expected


@pytest.mark.parametrize("kind", ["sdpa", "flash", "cudnn", "auto"])
def test_a_run_that_resumes_keeps_its_kind_of_attention(gpu: SimpleNamespace, tmp_path: Path, kind: str):
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config([EAGER, f"--engine.attention={kind}"])))
    (tmp_path / "metrics.jsonl").write_text("{}\n")

    def attention(device: torch.device, *options: str) -> str:
        again = parse_config([EAGER, f"--run_dir={tmp_path}", "--resume=latest", *options])
        return choose_batches(again, device).config.engine.attention

    assert attention(GPU) == kind
    assert attention(CPU) == "sdpa"
    assert attention(GPU, "--engine.attention=efficient") == "efficient"
    assert attention(GPU, "--engine.deterministic=true") == ("sdpa" if kind == "sdpa" else "auto")


@pytest.mark.usefixtures("one_process")
def test_a_run_notes_the_kind_of_attention_that_it_chose(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = {"num_iterations": 1, "checkpoint.every": 1}
    monkeypatch.setattr(build, "set_backends", lambda *_: ("efficient", "attention efficient"))
    Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings))).run()
    assert parse_config([f"--config={tmp_path / 'run' / 'config.yaml'}"]).engine.attention == "efficient"

    # Another kind is said; on a CPU it is torch's.
    monkeypatch.undo()
    again = {**settings, "num_iterations": 2, "resume": "latest"}
    Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", again))).run()
    assert "changed since the checkpoint: engine.attention efficient -> sdpa\n" in capsys.readouterr().err


@pytest.mark.usefixtures("one_process")
def test_a_run_whose_compiler_raises_goes_on_uncompiled_with_the_same_bits(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def train(name: str, **more: str) -> Trainer:
        arguments = tiny_runs.arguments(tiny_lcm_folder, tmp_path / name, {"num_iterations": 1, **more})
        trainer = Trainer(parse_config(arguments))
        trainer.run()
        return trainer

    eager = train("eager")
    monkeypatch.setattr(chosen_batches, "for_cpu", lambda config: replace(config, engine=as_on_a_gpu(config)))
    monkeypatch.setattr(compile_fx, "compile_fx", raise_without_a_compiler)
    compiled = train("compiled")
    said = capsys.readouterr().err
    for mode, less in (("whole", "regional"), ("regional", "off")):
        assert (
            said.count(f"engine.compile={mode} does not work (BackendCompilerFailed: backend='inductor' raised: ") == 1
        )
        assert said.count(f"): going on with engine.compile={less}\n") == 1
    assert "compiled in" not in said and "Traceback" not in said
    assert compiled.config.engine.compile == "off"
    assert parse_config([f"--config={tmp_path / 'compiled' / 'config.yaml'}"]).engine.compile == "off"
    one, other = eager.engine.full_weights(), compiled.engine.full_weights()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(NotCompiled, match="engine.compile=whole does not work"):
        train("by_name", **{"engine.compile": "whole"})


def as_on_a_gpu(config: Config) -> EngineConfig:
    return replace(config.engine, compile="whole" if config.engine.compile == "auto" else config.engine.compile)


def raise_without_a_compiler(*_: object, **__: object) -> None:
    raise RuntimeError("Failed to find a C compiler")


def test_where_nothing_fits_the_smallest_are_taken_and_it_is_said(gpu: SimpleNamespace, tmp_path: Path):
    config, said = chosen(GPU, f"--run_dir={tmp_path / 'run'}", "--engine.memory_gib=0.5")
    assert numbers(config) == Batches(1, 1, 1)
    assert said[0].endswith("the smallest, and the plan is that they do not fit 0.5 GiB")


def test_a_model_that_the_planner_does_not_know_needs_numbers(gpu: SimpleNamespace, tmp_path: Path):
    with pytest.raises(SharedMistake, match=r"auto needs a plan, and model.path=some/one is not known .*; or give num"):
        chosen(GPU, f"--run_dir={tmp_path / 'run'}", "--model.path=some/one")


def test_the_gpu_with_the_least_memory_decides(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = numbers(chosen(GPU, f"--run_dir={tmp_path / 'run'}")[0])
    gpu.total_memory = 24 * GIB
    monkeypatch.setattr(parallel, "all_gather_list", lambda items: [*items, 1.4] if items == [24.0] else items)
    assert numbers(chosen(GPU, f"--run_dir={tmp_path / 'run'}")[0]) == alone


@pytest.mark.usefixtures("one_process")
def test_a_run_notes_its_numbers_and_keeps_them_when_it_resumes(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir = tmp_path / "run"
    options = {**SETTINGS, "num_iterations": 1, "checkpoint.every": 1}
    trainer = Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, run_dir, options)))
    trainer.run()
    noted = parse_config([f"--config={run_dir / 'config.yaml'}"])
    assert numbers(noted) == numbers(trainer.config)

    # As if the first run had chosen others: they stay, and the fingerprint is the same.
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("decode_batch_size: 0", "decode_batch_size: 1"))
    said: list[str] = []
    for resume in ("latest", str(run_dir / "checkpoints" / "iteration_000001")):
        again = parse_config(tiny_runs.arguments(tiny_lcm_folder, run_dir, {**options, "resume": resume}))
        assert numbers(choose_batches(again, CPU, said.append).config) == replace(numbers(noted), decode=1)
    assert said[0] == f"auto: as before, {replace(numbers(noted), decode=1)}"

    # Numbers that no longer divide are chosen anew.
    more = parse_config(
        tiny_runs.arguments(tiny_lcm_folder, run_dir, {**options, "resume": "latest", "prompts.num_prompts": 7})
    )
    assert numbers(choose_batches(more, CPU, said.append).config).update % 7 == 0


@pytest.mark.usefixtures("one_process")
def test_a_run_that_resumes_on_a_gpu_keeps_its_numbers_and_plans_the_rest_beside_them(
    gpu: SimpleNamespace, tmp_path: Path
):
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config(["--update.micro_batch_size=32", *GRAPHS])))
    (tmp_path / "checkpoints" / "iteration_000001").mkdir(parents=True)
    said: list[str] = []
    for gib, graphs, moves in ((24.0, "auto", False), (1.2, "off", True)):
        options = ["--update.micro_batch_size=auto", *GRAPHS, IDLE, f"--run_dir={tmp_path}"]
        options += [f"--engine.memory_gib={gib}"]
        again = parse_config([*options, f"--resume={tmp_path / 'checkpoints' / 'iteration_000001'}"])
        choice = choose_batches(again, GPU, said.append)
        assert numbers(choice.config).update == 32 and choice.config.engine.graphs == graphs
        assert choice.config.engine.offload_idle is moves
        assert choice.plan is None and said[0].startswith("auto: as before, update.micro_batch_size=32")


def test_out_of_memory_names_the_next_sizes_of_the_run(tmp_path: Path):
    config = parse_config([*ALL, f"--run_dir={tmp_path}"])
    numbered = parse_config([f"--run_dir={tmp_path}", "--update.micro_batch_size=16", "--rollout.micro_batch_size=32"])
    (tmp_path / "config.yaml").write_text(to_yaml(numbered))
    line = WordsOfRun(config).foreseen(torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    expected = "lower update.micro_batch_size=16 to 12 or rollout.micro_batch_size=32 to 16; rlcm-fast plan says what"
    assert line is not None and expected in line


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]):
    assert main([*ALL, "--dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("batch_size: auto") == 3
    assert "# micro_batches_per_update_and_process: 3" in printed
