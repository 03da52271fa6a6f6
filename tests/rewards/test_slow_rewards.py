"""Slow and stuck rewards: bounded memory, a word while the run waits, a timeout, an end that nothing holds up."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rlcm_fast.config import RolloutConfig
from rlcm_fast.rewards import RewardError, RewardService, Workers, workers
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt("a cat"), Prompt("a dog")]


class Stuck:
    """Answers when `gate` is open."""

    scope = "image"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.begun.release()
        assert self.gate.wait(60)
        return images.mean(dim=(1, 2, 3))


def test_no_more_micro_batches_are_decoded_than_may_wait():
    reward, references = Stuck(), []  # to the arrays below the tensors
    config = RolloutConfig(reward_workers=1, max_decoded_batches=3)
    rewards = TaskRewards({"one": {"stuck": (reward, 1.0)}}, config, lambda prompt: "one")
    most = 0

    def num_alive() -> int:
        return sum(reference() is not None for reference in references)

    def open_gate() -> None:
        """The rollout looks up while it waits for room."""
        if not reward.gate.is_set():
            assert num_alive() == 3
        reward.gate.set()

    for _ in range(6):
        rewards.wait_for_room(open_gate)
        images = np.ones((2, 3, 2, 2), dtype=np.float32)
        references.append(weakref.ref(images))
        most = max(most, num_alive())
        rewards.submit(torch.from_numpy(images), PROMPTS)
        del images
    found = rewards.gather(0)["one"]
    gc.collect()
    assert most == 3 and len(found.total) == 12 and found.wait_seconds > 0
    assert num_alive() == 0, "images are let go once they are scored"
    rewards.shutdown()


def test_the_bound_follows_the_number_of_workers():
    assert RolloutConfig(reward_workers=16).decoded_batches == 18
    assert RolloutConfig(reward_workers=16, max_decoded_batches=2).decoded_batches == 2


def test_a_call_that_does_not_come_back_ends_in_one_line():
    reward, pool = Stuck(), Workers(1, timeout=0.05)
    service = RewardService({"judge": (reward, 1.0)}, pool)
    service.submit(torch.ones(2, 3, 2, 2), PROMPTS)
    service.submit(torch.ones(2, 3, 2, 2), PROMPTS[::-1])
    message = (
        r"^reward 'judge', prompt 'a cat', iteration 4: has not answered for rollout.reward_timeout=0.05 s; raise it, "
    )
    with pytest.raises(RewardError, match=message):
        service.gather(4)
    reward.gate.set()
    pool.shutdown()


def test_the_time_of_a_call_begins_when_it_is_its_turn():
    class Slow(Stuck):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            time.sleep(0.15)
            return images.mean(dim=(1, 2, 3))

    pool = Workers(1, timeout=0.5)
    service = RewardService({"slow": (Slow(), 1.0)}, pool)
    for _ in range(5):
        service.submit(torch.ones(2, 3, 2, 2), PROMPTS)
    assert len(service.gather(0).total) == 10  # 0.75 s in all
    pool.shutdown()


def test_a_line_says_what_the_run_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(workers, "HEARTBEAT_SECONDS", 0.05)
    first, reward, pool = Stuck(), Stuck(), Workers(2)
    first.gate.set()
    service = RewardService({"quick": (first, 1.0), "judge": (reward, 1.0)}, pool)
    service.submit(torch.ones(2, 3, 2, 2), PROMPTS)
    threading.Timer(0.4, reward.gate.set).start()
    service.gather(0)
    pool.shutdown()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "waiting for reward 'judge' for 0 s: 0 of 2 images are scored"
    assert len(lines) <= 8


def test_a_wait_can_be_stopped():
    class Stopped(Exception):
        pass

    def may_stop() -> None:
        raise Stopped

    reward, pool = Stuck(), Workers(1)
    service = RewardService({"judge": (reward, 1.0)}, pool)
    service.submit(torch.ones(2, 3, 2, 2), PROMPTS)
    with pytest.raises(Stopped):
        service.gather(0, may_stop)
    reward.gate.set()
    pool.shutdown()


def test_shutdown_does_not_wait_for_a_stuck_call_and_says_so(capsys: pytest.CaptureFixture[str]):
    reward, pool = Stuck(), Workers(1)
    service = RewardService({"judge": (reward, 1.0)}, pool)
    service.submit(torch.ones(2, 3, 2, 2), PROMPTS)
    assert reward.begun.acquire(timeout=10)
    began = time.monotonic()
    pool.shutdown()
    pool.shutdown()
    assert time.monotonic() - began < 3
    assert capsys.readouterr().err == "reward 'judge' has not answered for 1 s; the run ends without it\n"
    reward.gate.set()


SCRIPT = """
import signal, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits that it is ignored
from rlcm_fast.leaving import leave_at_once_if_computing
from rlcm_fast.rewards import RewardService, Workers
from rlcm_fast.trajectory import Prompt
pool = Workers(2)
service = RewardService({"judge": (lambda images, prompts: time.sleep(600), 1.0)}, pool)
service.submit(torch.ones(1, 3, 2, 2), [Prompt("a")])
try:
    print("waiting", flush=True)
    service.gather(0)
except KeyboardInterrupt:
    pool.shutdown()
    leave_at_once_if_computing(130)
"""


@pytest.mark.slow
@pytest.mark.telling
def test_a_stuck_reward_holds_up_neither_ctrl_c_nor_the_end_of_the_process():
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - began < 20  # the machine may be busy; the reward would take ten minutes
    process.stdout.close()
