"""The command `rlcm-fast reward-server`: what it refuses before it loads anything, and a server that a signal ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcm_fast.cli import reward_server
from rlcm_fast.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["reward-server", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--reward", "aesthtic"], "aesthtic"),
        (["--reward", "jpeg_compressibility", "--arguments", "{quality: 0}"], "quality=0 is no JPEG quality"),
        (["--reward", "jpeg_compressibility", "--arguments", "5"], "arguments=5 is no mapping; write '{key: value}'"),
        (["--reward", "{name: diversity}", "--arguments", "{}"], "write them into it"),
        (["--reward", "diversity"], "reward=diversity scores groups of images"),
        (["--reward", "jpeg_compressibility", "--device", "cuda:99"], "device=cuda:99 cannot be used"),
        (["--reward", "jpeg_compressibility", "--device", "gpu"], "device=gpu cannot be used"),
        (["--reward", "jpeg_compressibility", "--api-key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--reward", "jpeg_compressibility", "--host", "no.such.host.invalid"], "cannot be listened at"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str):
    pytest.importorskip("uvicorn")
    line = said(capsys, "--port", "0", *arguments)
    assert line.startswith("error: ") and line.count("\n") == 1 and problem in line


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = said(capsys, "--reward", "jpeg_compressibility", "--port", port)
    assert f"port={port} cannot be listened at: Address already in use; give another" in line


def test_a_missing_package_names_the_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'rlcm_fast[server]'" in said(capsys, "--reward", "jpeg_compressibility")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_without_an_error(number: signal.Signals):
    """In this process: the application sends the signal as it starts, when uvicorn handles signals already."""
    pytest.importorskip("uvicorn")
    steps = []

    async def application(scope: dict, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for step in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{step}"
            steps.append(step)
            if step == "startup":
                os.kill(os.getpid(), number)
            await send({"type": f"lifespan.{step}.complete"})

    before = signal.getsignal(number)
    reward_server.serve(application, socket.create_server(("127.0.0.1", 0)))
    assert steps == ["startup", "shutdown"]
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.telling
def test_a_process_serves_and_sigterm_ends_it_with_0():
    pytest.importorskip("uvicorn")
    from rlcm_fast.rewards.encoding import quantised
    from rlcm_fast.rewards.jpeg import JpegCompressibility
    from rlcm_fast.rewards.remote import RemoteReward
    from rlcm_fast.trajectory import Prompt

    command = [sys.executable, "-m", "rlcm_fast.cli.main", "reward-server", "--reward", "jpeg_compressibility"]
    arguments = ["--arguments", "{quality: 80}", "--port", "0", "--device", "cpu", "--batch-size", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        url = line.split()[3]
        images, prompts = torch.rand(8, 3, 32, 32), [Prompt("a cat")] * 8
        reward = RemoteReward(url, "jpeg_compressibility", images_per_call=2)
        assert torch.equal(reward(images, prompts), JpegCompressibility(80)(quantised(images), prompts))
        server.send_signal(signal.SIGTERM)
        assert "stopped after 8 images" in server.stdout.read()
        assert server.wait(timeout=30) == 0
