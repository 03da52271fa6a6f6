"""rlcm-fast doctor: what it finds on a machine and in a config, right and wrong; no network is used."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from planners import planner_of
from safetensors.torch import save_file
from torch import Tensor

from rlcm_fast.cli.diagnoses import State, machine, model, room
from rlcm_fast.cli.diagnoses.rewards import test_picture as picture_of
from rlcm_fast.cli.main import main
from rlcm_fast.config import ModelConfig, parse_config
from rlcm_fast.planner import seconds
from rlcm_fast.rewards.facts import Facts, Weights
from rlcm_fast.rewards.models import ModelFiles, OnModels
from rlcm_fast.rewards.self_tests import SelfTest
from rlcm_fast.trajectory import Prompt

GIB = 2**30
PLAN = {
    "peak_bytes": {"sampling": GIB, "update": 2 * GIB},
    "bytes": {"weights": GIB, "master": GIB, "moments": 2 * GIB},
}
CONFIG = ["--config", "shapes/compressibility"]


@pytest.fixture(autouse=True)
def _plan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of seconds of tracing."""
    monkeypatch.setattr(room, "planned_bytes", lambda options: PLAN)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main(["doctor", "--offline", "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def row_of(report: dict, what: str) -> dict:
    (row,) = [row for row in report["rows"] if row["what"] == what]
    return row


def with_rewards(*rewards: str) -> list[str]:
    return [*CONFIG, "--rewards", f"[{', '.join(rewards)}]", "--evaluation.rewards", "[]"]


def test_a_person_is_not_asked_but_the_page_needs_its_port(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = with_rewards(f"{{name: human, arguments: {{port: {port}}}}}")
        row = row_of(examined(capsys, *config, code=1), "reward human")
        assert (row["state"], f"port={port}" in row["words"]) == ("WRONG", True)
    row = row_of(examined(capsys, *config), "reward human")
    assert row["words"] == f"asks a person on http://127.0.0.1:{port}; nobody was asked"


def test_the_machine_alone_is_ready(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok     python")
    assert any("pip install 'rlcm_fast[wandb]' if you need it" in line for line in lines)
    assert lines[-1] == "ready"


def test_the_shipped_config_is_ready(capsys: pytest.CaptureFixture[str]):
    report = examined(capsys, *CONFIG)
    assert report["verdict"] == "ready"
    assert row_of(report, "model")["gb"] == pytest.approx(0.01, rel=0.1)
    assert row_of(report, "reward jpeg_compressibility")["answer"] < 0
    assert row_of(report, "memory of a run")["planned_gib"] == 2
    assert row_of(report, "disk of the run")["needed_gb"] == pytest.approx((3 * 4 + 1) * GIB / 1e9)


def test_bytes_are_those_of_plan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(seconds, "Planner", lambda architecture, *more: planner_of(architecture.name, *more))
    planned = room.planned_bytes([*CONFIG, "--processes", "1", "--update.micro_batch_size", "32"])
    assert planned["bytes"]["weights"] == pytest.approx(4 * 4.0e6, rel=0.05)


def test_a_mistake_in_the_config_is_the_verdict(capsys: pytest.CaptureFixture[str]):
    report = examined(capsys, *CONFIG, "--optimizer.lr", "-1", code=1)
    assert report["verdict"] == "not ready: config"
    assert "optimizer.lr=-1" in row_of(report, "config")["words"]


def test_a_run_that_does_not_fit_is_wrong_on_the_card_that_is_named(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(room, "planned_bytes", lambda options: {**PLAN, "peak_bytes": {"update": 20 * GIB}})
    assert examined(capsys, *CONFIG, "--gpu", "rtx4090")["verdict"] == "ready"
    report = examined(capsys, *CONFIG, "--gpu", "rtx3060", code=1)
    assert report["verdict"] == "not ready: memory of a run"
    assert row_of(report, "memory of a run")["words"].endswith("12.0 of a rtx3060; rlcm-fast plan says what to change")


def test_a_full_disk_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e9))
    report = examined(capsys, *CONFIG, code=1)
    assert row_of(report, "disk of the run")["words"].endswith("of 1 GB free; free some, or lower checkpoint.keep")


def test_zero_divides_the_states_of_a_checkpoint_and_every_process_writes_its_share():
    config = parse_config([])
    zero = parse_config(["--engine.zero_stage", "1"])
    assert room.written_gb(zero, PLAN["bytes"], 4) > 3.5 * room.written_gb(config, PLAN["bytes"], 1)


class OnFile(OnModels):
    """Scores with the number that its file holds."""

    scope = "image"
    FACTS = Facts("n", "nothing", (Weights("nobody/nothing", ("number.txt",), 1.5, "MIT"),))

    def __init__(self, model: str = "nobody/nothing") -> None:
        (files,) = self.files({"model": model})
        self._files = [files]
        self._number = float(files.file().read_text())

    @classmethod
    def files(cls, arguments) -> list[ModelFiles]:
        assert cls.FACTS is not None
        return [ModelFiles("model", arguments["model"], cls.FACTS.weights[0])]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.new_full((len(images),), self._number)

    def self_test(self) -> SelfTest:
        return SelfTest("the file", self._number, 7.0, 0.1)


@pytest.fixture
def on_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The folder of a model whose number is the expected one, for the reward plugin_rewards:OnFile."""
    import plugin_rewards

    monkeypatch.setattr(plugin_rewards, "OnFile", OnFile, raising=False)
    (tmp_path / "number.txt").write_text("7.04")
    return str(tmp_path)


def on_file_rows(capsys, folder: str | None, code: int = 0, more: Sequence[str] = ()) -> tuple[dict, list[dict]]:
    arguments = "" if folder is None else f", arguments: {{model: {folder}}}"
    report = examined(capsys, *with_rewards(f"{{name: 'plugin_rewards:OnFile'{arguments}}}"), *more, code=code)
    return report, [row for row in report["rows"] if row["what"] == "reward plugin_rewards:OnFile"]


def test_a_reward_says_where_its_files_are_what_it_answers_and_what_it_should(on_file: str, capsys):
    _, (files, answer, test) = on_file_rows(capsys, on_file)
    assert f"model: {on_file}, licence MIT" in files["words"]
    assert answer["answer"] == pytest.approx(7.04)
    assert test["words"] == "self-test: the file gives 7.04, expected 7 +- 0.1"


def test_a_self_test_that_fails_is_wrong(on_file: str, capsys):
    (Path(on_file) / "number.txt").write_text("6.5")
    report, rows = on_file_rows(capsys, on_file, code=1)
    assert rows[-1]["state"] == State.WRONG.value
    assert report["verdict"] == "not ready: reward plugin_rewards:OnFile"


def test_files_that_are_missing_are_wrong_without_a_network(on_file: str, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", on_file)
    _, rows = on_file_rows(capsys, None, code=1)
    assert "is not in the hub's cache, and HF_HUB_OFFLINE is set" in rows[0]["words"]
    assert "1.5 GB, licence MIT" in rows[0]["words"]
    assert len(rows) == 1  # nothing is built on files that are missing


def test_files_that_are_missing_are_downloads_with_a_network(on_file: str, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", on_file)
    rewards = with_rewards("{name: 'plugin_rewards:OnFile'}")
    assert main(["doctor", *rewards]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model: nobody/nothing, 1.5 GB to download, licence MIT" in "\n".join(lines)
    assert lines[-1] == "ready, after downloads of about 1.5 GB"


def test_files_only_builds_nothing(on_file: str, capsys):
    _, rows = on_file_rows(capsys, on_file, more=["--files-only"])
    assert [row["state"] for row in rows] == ["ok", "note"]


class Remote:
    """Asks a server for the score."""

    scope = "image"

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        with urllib.request.urlopen(self._url, timeout=5) as answer:
            return torch.tensor([float(answer.read())] * len(images))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that answers 0.25."""
    import plugin_rewards

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"0.25")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(plugin_rewards, "Remote", Remote, raising=False)
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def remote(url: str) -> list[str]:
    return with_rewards(f"{{name: 'plugin_rewards:Remote', arguments: {{url: '{url}'}}}}")


def test_an_endpoint_says_what_it_answers_to_one_picture(endpoint: str, capsys):
    assert main(["doctor", *remote(endpoint)]) == 0
    assert "answers 0.25 to one picture in" in capsys.readouterr().out


def test_an_endpoint_that_does_not_answer_is_wrong(capsys, endpoint: str):
    assert main(["doctor", *remote("http://127.0.0.1:9/score")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ready: reward plugin_rewards:Remote"


def test_an_endpoint_is_not_asked_offline(capsys, endpoint: str):
    row = row_of(examined(capsys, *remote(endpoint)), "reward plugin_rewards:Remote")
    assert (row["state"], row["words"]) == ("note", "was not asked to score a picture")


def test_offline_mode_ends_with_the_command(capsys: pytest.CaptureFixture[str]):
    before = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    examined(capsys)
    assert (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")) == before


def hub_answers(monkeypatch: pytest.MonkeyPatch, names: dict[str, int]) -> None:
    """In the place of the hub: a repository with files of these sizes."""
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in names.items()]
    info = SimpleNamespace(siblings=siblings, card_data={"license": "openrail"}, sha="0123456789abcdef")
    monkeypatch.setattr(HfApi, "model_info", lambda self, *_, **__: info)


def test_a_model_of_the_hub_is_a_download_of_what_diffusers_loads(monkeypatch: pytest.MonkeyPatch):
    names = {
        "unet/diffusion_pytorch_model.safetensors": 3_000_000_000,
        "unet/diffusion_pytorch_model.fp16.safetensors": 1_500_000_000,
        "vae/diffusion_pytorch_model.safetensors": 300_000_000,
        "safety_checker/model.safetensors": 1_200_000_000,
        "v1-5-pruned.safetensors": 7_000_000_000,
    }
    hub_answers(monkeypatch, names)
    (row,) = model.model_files(ModelConfig("nobody/nothing"))
    assert row.state is State.DOWNLOAD
    assert row.words == "nobody/nothing, 3.3 GB to download, licence openrail, revision 0123456789ab"


def test_a_separate_unet_and_a_lora_have_their_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub_answers(monkeypatch, {"diffusion_pytorch_model.safetensors": 10**9, "unet/model.safetensors": 10**9})
    save_file({"unet.weight": torch.zeros(4)}, tmp_path / "a.safetensors")
    rows = model.model_files(ModelConfig("nobody/unet", base="nobody/base", lora=str(tmp_path / "a.safetensors")))
    assert [(row.what, row.state) for row in rows] == [
        ("model", State.DOWNLOAD),
        ("model: UNet", State.DOWNLOAD),
        ("model: LoRA", State.OK),
    ]
    assert [row.numbers.get("download_gb") for row in rows[:2]] == [0, 1]  # the base's UNet is not loaded


def test_a_hub_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch):
    def fail(self, *_, **__):
        raise model.httpx.ConnectError("no route to the hub")

    monkeypatch.setattr(HfApi, "model_info", fail)
    (row,) = model.model_files(ModelConfig("nobody/nothing"))
    assert (row.state, row.words) == (
        State.WRONG,
        "nobody/nothing is not in the hub's cache, and the hub cannot be asked (no route to the hub); give a folder",
    )


def test_a_folder_without_weights_is_wrong(tiny_lcm_folder: str, tmp_path: Path):
    (tmp_path / "model_index.json").write_text((Path(tiny_lcm_folder) / "model_index.json").read_text())
    (row,) = model.model_files(ModelConfig(str(tmp_path)))
    assert row.words == f"{tmp_path} has no weights of unet, vae, text_encoder; copy it anew"
    (row,) = model.model_files(ModelConfig(tiny_lcm_folder))
    assert row.state is State.OK


def test_a_package_that_does_not_fit_is_wrong(monkeypatch: pytest.MonkeyPatch):
    listed = ["torch<2", "numpy", "nowhere>=1; extra == 'far'", "numpy; extra == 'test'"]
    monkeypatch.setattr(machine, "requires", lambda name: listed)
    monkeypatch.setattr(machine, "metadata", lambda name: SimpleNamespace(get_all=lambda key: ["far", "test"]))
    needed, far = machine.packages()
    assert (needed.state, far.state) == (State.WRONG, State.NOTE)
    assert needed.words == f"torch {torch.__version__} is not <2: pip install -e ."
    assert far.words == "nowhere is not installed: pip install 'rlcm_fast[far]' if you need it"


@pytest.mark.gpu
def test_the_kernels_agree_on_a_gpu():
    assert machine.kernels().state is State.OK


def test_the_picture_is_one():
    picture = picture_of((33, 33))
    assert picture.shape == (1, 3, 33, 33)
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "gtx1080"], "gpu=gtx1080 is not in the table"),
        (["--seed", "1"], "--seed changes a config; name one with --config"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_auto_is_planned_for_the_gpu_of_the_run():
    for option in ("--update.micro_batch_size=auto", "--engine.graphs=auto", "--engine.offload_idle=auto"):
        left_open = parse_config([option, "--engine.compile=off"])
        assert room.options_for_auto(left_open, "4090") == ["--engine.memory_gib", "24"]
    assert room.options_for_auto(parse_config([]), "4090") == ["--engine.memory_gib", "24"]  # engine.compile
    assert room.options_for_auto(parse_config(["--engine.compile=off"]), "4090") == []
    own = parse_config(["--update.micro_batch_size=auto", "--engine.memory_gib=10"])
    assert room.options_for_auto(own, "4090") == []
