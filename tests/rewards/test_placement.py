"""Where rewards run: device, dtype, batch_size and offload, in the config, in the class and beside the rollout."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_rewards
import tiny_runs
import torch
from reward_servers import Mean, Picky, served
from tiny_policies import TinyNetwork, images_of, policy_of, prompts
from torch import Tensor, nn

from rlcm_fast.config import RewardConfig, RolloutConfig
from rlcm_fast.config.reward_checks import check_place
from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.parallel import Turn
from rlcm_fast.rewards import (
    ImagesFailed,
    Offloading,
    Reward,
    RewardBuilder,
    RewardError,
    RewardService,
    Skipping,
    Workers,
    check_reward,
    gpu_load,
    make_placed,
    place,
)
from rlcm_fast.rewards.clip_score import ClipScore
from rlcm_fast.rewards.parts import InParts, in_parts
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.stages.evaluation import Evaluator, HeldOut
from rlcm_fast.stages.rollout import Collector, Rollout
from rlcm_fast.trajectory import Prompt

URL = "http://127.0.0.1:8200"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_rewards.save_clip(tmp_path_factory.mktemp("clip"))


class Placed(Mean):
    """A reward of a user's, that can be placed and moves its model."""

    def __init__(self, device: str = "same", dtype: str = "fp32") -> None:
        super().__init__()
        self.place = device, dtype
        self.moves: list[str] = []

    def to_device(self) -> None:
        self.moves.append("device")

    def to_cpu(self) -> None:
        self.moves.append("cpu")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert self.moves[-1:] != ["cpu"], "it is called while its model is away"
        return super().__call__(images, prompts)


class Pixels(Mean):
    """A set reward."""

    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.batches.append(len(images))
        return images.flatten(1)[:, :2]

    def value(self, described: Tensor) -> Tensor:
        return described.mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "r.device=gpu is unknown; give same, cpu, cuda:N or http://HOST:PORT"),
        ({"device": "cuda"}, "r.device=cuda is unknown"),
        ({"device": "cpu", "arguments": {"device": "same"}}, "r.device=cpu beside arguments={device: same} of a; drop"),
        ({"dtype": "bf16", "arguments": {"dtype": "fp32"}}, "r.dtype=bf16 beside arguments={dtype: fp32} of a; drop"),
        ({"batch_size": 4, "arguments": {"batch_size": 2}}, "r.batch_size=4 beside arguments={batch_size: 2} of a"),
        ({"device": "cpu", "offload": True}, "r.offload=true of a has no use on device=cpu; drop one"),
        ({"device": URL, "offload": True}, f"r.offload=true of a has no use on {URL}; drop it"),
        ({"device": URL, "dtype": "bf16"}, "start the server with --arguments '{dtype: bf16}', and leave it out here"),
        ({"device": URL, "group_size": 4}, "a server does not see groups; give same, cpu or cuda:N"),
        ({"device": URL, "arguments": {"model": "x"}}, f"r.arguments.model of a on {URL}: give it to the server"),
    ],
)
def test_places_that_do_not_go_together_are_one_line(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_place("r", RewardConfig("a", **settings))
    assert "\n" not in str(raised.value)


def test_places_are_checked_for_every_list_of_rewards(mistake_of):
    named = "[{name: jpeg_compressibility, device: gpu}]"
    assert mistake_of("--rewards", named).startswith("rewards[0].device=gpu is unknown")
    tasks = f"[{{name: t, source: 'shapes:one', rewards: {named}}}]"
    message = mistake_of("--tasks", tasks, "--rewards", "[]", "--advantages.kind", "batch")
    assert "rewards[0].device=gpu is unknown" in message and message.startswith("tasks[0]")
    watched = "[{name: diversity, device: gpu}]"
    assert mistake_of("--evaluation.rewards", watched).startswith("evaluation.rewards[0].device=gpu is unknown")


@pytest.fixture
def mistake_of():
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate

    def mistake(*argv: str) -> str:
        with pytest.raises(ValueError) as raised:  # the message is returned
            validate(parse_config(list(argv)), 1)
        return str(raised.value)

    return mistake


@pytest.mark.parametrize(
    ("config", "arguments", "left"),
    [
        (RewardConfig("clip_score", device="cpu", dtype="bf16"), {"device": "cpu", "dtype": "bf16"}, 0),
        (RewardConfig("pickscore", batch_size=4), {"batch_size": 4}, 0),
        (RewardConfig("clip_score", arguments={"device": "cpu"}), {"device": "cpu"}, 0),
        (RewardConfig("vlm_alignment", device="cpu", batch_size=2), {"device": "cpu"}, 2),
        (RewardConfig("jpeg_compressibility", device="cpu", batch_size=2), {}, 2),
        (RewardConfig("shapes_alignment", device="cpu"), {}, 0),
        (RewardConfig("diversity", device="cpu", batch_size=2), {}, 2),
        (
            RewardConfig("diversity", arguments={"embedding": "clip"}, dtype="bf16", batch_size=2),
            {"embedding": "clip", "embedding_arguments": {"dtype": "bf16", "batch_size": 2}},
            0,
        ),
        (
            RewardConfig("distribution_parity", arguments={"classifier": "skin_tone"}, device="cuda:1"),
            {"classifier": "skin_tone", "classifier_arguments": {"device": "cuda:1"}},
            0,
        ),
        (RewardConfig(f"{__name__}:Placed", device="cuda:1", batch_size=3), {"device": "cuda:1"}, 3),
    ],
)
def test_a_place_becomes_arguments_of_the_class_or_of_its_part(config: RewardConfig, arguments: dict, left: int):
    there = place(config, "r")
    assert (there.arguments, there.batch_size, there.device, there.dtype) == (arguments, left, "same", "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("jpeg_compressibility", device="cuda:1"), "r.device=cuda:1 of jpeg_compressibility: it runs no"),
        (RewardConfig("shapes_alignment", dtype="bf16"), "r.dtype=bf16 of shapes_alignment: it runs no model here"),
        (RewardConfig("ocr", device="cuda:0"), "r.device=cuda:0 of ocr: it runs no model here; leave device out"),
        (RewardConfig("diversity", device="cuda:1"), "r.device=cuda:1 of diversity: it runs no model here"),
        (
            RewardConfig("geneval", dtype="bf16"),
            "r.dtype=bf16 of geneval: its models have one dtype only; leave it out",
        ),
        (RewardConfig(f"{__name__}:Mean", device="cpu"), "its __init__ has no argument device; give it one, or leave"),
        (RewardConfig(f"{__name__}:Mean", dtype="bf16"), "its __init__ has no argument dtype; give it one, or leave"),
        (
            RewardConfig(
                "diversity", arguments={"embedding": "clip", "embedding_arguments": {"device": "same"}}, device="cpu"
            ),
            "r.device=cpu of diversity: beside device=same in its arguments; drop one",
        ),
    ],
)
def test_a_class_that_cannot_be_placed_is_refused_before_anything_loads(config: RewardConfig, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_reward(config, "r", must_run=True)
    assert "\n" not in str(raised.value)


def test_a_placed_reward_scores_as_one_with_arguments(clip: str):
    placed = make_placed(
        RewardConfig("clip_score", arguments={"model": clip}, device="cpu", dtype="bf16", batch_size=3)
    )
    plain = ClipScore(clip, dtype="bf16", device="cpu", batch_size=3)
    images = tiny_rewards.images()
    assert isinstance(placed, ClipScore) and placed._images is plain._images
    assert torch.equal(placed(images, tiny_rewards.PROMPTS), plain(images, tiny_rewards.PROMPTS))
    mine = make_placed(RewardConfig(f"{__name__}:Placed", device="cpu", dtype="bf16"))
    assert isinstance(mine, Placed) and mine.place == ("cpu", "bf16")


def test_a_url_asks_the_server_there_for_the_reward_by_its_name():
    images = (torch.rand(5, 3, 8, 8) * 255).round() / 255
    with served(Mean()) as server:
        reward = make_placed(RewardConfig("mean", device=server.url, batch_size=2))
        assert isinstance(reward, Reward)
        scores = reward(images, [Prompt("a")] * 5)
    assert torch.equal(scores, Mean()(images, [Prompt("a")] * 5))
    there = place(RewardConfig("pickscore", arguments={"calls": {"at_once": 2}}, device=URL, batch_size=2), "r")
    expected = {"url": URL, "reward": "pickscore", "calls": {"at_once": 2}, "images_per_call": 2}
    assert (there.name, there.arguments) == ("http", expected)


def scores_of(reward: Any, texts: Sequence[str], skips: bool = False) -> Tensor:
    workers = Workers(1)
    try:
        skipping = Skipping(frozenset(["r"]), 1.0, 100) if skips else None
        service = RewardService({"r": (reward, 1.0)}, workers, skipping)
        images = torch.arange(len(texts)).div(10).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
        service.submit(images, [Prompt(text) for text in texts])
        return service.gather(0).total
    finally:
        workers.shutdown()


def test_parts_come_back_in_order_and_none_is_too_large():
    reward = Mean()
    assert torch.equal(scores_of(in_parts(reward, 3), "abcdefgh"), scores_of(Mean(), "abcdefgh"))
    assert reward.batches == [3, 3, 2]
    assert in_parts(reward, 0) is reward


def test_a_set_reward_describes_in_parts_and_values_whole_groups():
    both = []
    for batch_size in (0, 3):
        config = RewardConfig(f"{__name__}:Pixels", group_size=4, credit="leave_one_out", batch_size=batch_size)
        both.append(scores_of(RewardBuilder().build(config, "r"), "abcdefgh"))
    assert torch.equal(*both)


def test_of_parts_only_the_images_that_failed_have_no_score():
    scores = scores_of(in_parts(Picky(), 2), ["a", "b", "c", "name", "e"], skips=True)
    assert scores.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(scores[[0, 1, 2, 4]], scores_of(Mean(), "abcde")[[0, 1, 2, 4]])
    alone = scores_of(in_parts(Picky(), 2), ["a", "b", "c", "raise", "e"], skips=True)
    assert alone.isnan().tolist() == [False, False, False, True, False]


def test_a_part_that_is_no_score_is_said_of_its_prompt():
    class Text(Mean):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
            return "x" if prompts[0].text == "c" else super().__call__(images, prompts)

    with pytest.raises(RewardError, match=r"prompt 'c', iteration 0: returned str; return a float32 tensor"):
        scores_of(InParts(Text(), 2), "abcde")


def test_a_whole_part_may_fail():
    class Half(Mean):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            if prompts[0].text == "c":
                raise ImagesFailed(None, {0: "no", 1: "no"})
            return super().__call__(images, prompts)

    assert scores_of(InParts(Half(), 2), "abcde", skips=True).isnan().tolist() == [False, False, True, True, False]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, nn.Module]]:
    """Notes where networks go; on a CPU, "device" and "cpu" are one place."""
    moved: list[tuple[str, nn.Module]] = []

    class Noted(FrozenNetwork):
        def to_device(self) -> None:
            moved.append(("device", self.network))
            super().to_device()

        def to_cpu(self) -> None:
            moved.append(("cpu", self.network))
            super().to_cpu()

    monkeypatch.setattr("rlcm_fast.rewards.building.FrozenNetwork", Noted)
    return moved


def test_networks_that_rewards_share_move_once(clip: str, moves: list[tuple[str, nn.Module]]):
    builder, model = RewardBuilder(), {"model": clip}
    clip_score = builder.build(RewardConfig("clip_score", arguments=model, offload=True), "r")
    builder.build(RewardConfig("pickscore", arguments=model, offload=True), "r")
    builder.build(RewardConfig("diversity", arguments={"embedding": "clip", "embedding_arguments": model}), "r")
    offloading = builder.offloading()
    assert isinstance(clip_score, ClipScore)
    networks = {id(clip_score._images.network), id(clip_score._texts.network)}
    assert len(moves) == 2 and {id(network) for _, network in moves} == networks
    with offloading.in_use():
        assert [where for where, _ in moves] == ["cpu"] * 2 + ["device"] * 2
    assert [where for where, _ in moves] == ["cpu"] * 2 + ["device"] * 2 + ["cpu"] * 2


def rollout_of(reward: Reward, offloading: Offloading) -> Rollout:
    config = RolloutConfig(micro_batch_size=2)
    service = TaskRewards({"one": {"r": (reward, 1.0)}}, config, lambda prompt: "one")
    try:
        images = images_of(policy_of(TinyNetwork()))
        return Collector(images, service, config, offloading).rollout(prompts(6), Turn(0))
    finally:
        service.shutdown()


def test_scores_of_rollouts_and_evaluations_are_bitwise_those_without_offload(
    clip: str, moves: list[tuple[str, nn.Module]]
):
    builder = RewardBuilder()
    config = RewardConfig("clip_score", arguments={"model": clip}, offload=True)
    reward = builder.build(config, "r")
    expected = rollout_of(ClipScore(clip), Offloading()).total
    offloading = builder.offloading()
    moves.clear()
    assert torch.equal(rollout_of(reward, offloading).total, expected)
    assert [where for where, _ in moves] == ["device"] * 2 + ["cpu"] * 2
    both = []
    for away in (offloading, Offloading()):
        evaluator = Evaluator(HeldOut(prompts(4), 1, 2), {"eval": {"r": (reward, 1.0)}}, offloading=away)
        both.append(evaluator(images_of(policy_of(TinyNetwork())), 0))
    assert both[0] == both[1] and [where for where, _ in moves] == (["device"] * 2 + ["cpu"] * 2) * 2


def test_a_reward_of_yours_moves_its_own_models():
    builder = RewardBuilder()
    reward = builder.build(RewardConfig(f"{__name__}:Placed", offload=True, batch_size=1), "r")
    mine = reward.reward  # type: ignore[attr-defined]  # in parts
    offloading = builder.offloading()
    for _ in range(2):
        rollout_of(reward, offloading)
    assert mine.moves == ["cpu"] + ["device", "cpu"] * 2


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("jpeg_compressibility", "leave it out"), (f"{__name__}:Mean", "give it the methods to_device() and to_cpu()")],
)
def test_what_cannot_move_is_refused(name: str, way_out: str):
    message = re.escape(f"r.offload=true of {name}, which has no model that could move: {way_out}")
    with pytest.raises(ValueError, match=message):
        RewardBuilder().build(RewardConfig(name, offload=True), "r")


def test_a_network_that_left_has_its_own_weights_again():
    network = nn.BatchNorm1d(2).requires_grad_(False).eval()
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    frozen = FrozenNetwork(network)
    for move in (frozen.to_cpu, frozen.to_cpu, frozen.to_device, frozen.to_device):
        move()
        assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())


INSIDE_OF_ZERO = """
import gc
import sys
import deepspeed
from rlcm_fast.engine.processes import init_processes
from rlcm_fast.rewards import build_reward
from rlcm_fast.train import set_process_environment

set_process_environment()
init_processes()
build_reward("clip_score", {"model": sys.argv[1]})  # what is imported later does not stand DeepSpeed's patches
gc.collect()
settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=settings, remote_device="cpu"):
    build_reward("clip_score", {"model": sys.argv[1]})
"""


@pytest.mark.slow
def test_a_reward_inside_of_zero_init_is_refused_with_the_way_out(clip: str):
    """In a process of its own, because DeepSpeed leaves its patches of torch behind an exception."""
    command = [sys.executable, "-c", INSIDE_OF_ZERO, clip]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=tiny_runs.clean_environment())
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "build rewards outside of deepspeed.zero.Init" in ended.stderr, last


@pytest.mark.parametrize(
    ("rewards", "num_processes", "always", "offloaded"),
    [
        ([RewardConfig("aesthetic", offload=True)], 1, 0, 4 * 304_000_000),
        ([RewardConfig("aesthetic", offload=True, dtype="bf16")], 1, 0, 2 * 304_000_000),
        ([RewardConfig("aesthetic", offload=True), RewardConfig("clip_score")], 1, 4 * 123_700_000, 4 * 304_000_000),
        ([RewardConfig("aesthetic", device="cpu")], 1, 0, 0),
        ([RewardConfig("aesthetic", device=URL)], 1, 0, 0),
        ([RewardConfig("aesthetic", device="cuda:1")], 1, 0, 0),  # on a GPU that trains nothing
        ([RewardConfig("aesthetic", device="cuda:1")], 2, 2 * 4 * 304_000_000, 0),  # a copy for each process
        ([RewardConfig("aesthetic", device="cuda:0"), RewardConfig("aesthetic_v2_5")], 1, None, 0),
        ([RewardConfig("aesthetic"), RewardConfig("clip_score", device="cuda:0")], 1, 4 * 427_700_000, 0),
    ],
)
def test_the_plan_knows_where_a_reward_is(
    rewards: list[RewardConfig], num_processes: int, always: int | None, offloaded: int
):
    load = gpu_load(rewards, (), num_processes)
    assert load.offloaded == offloaded and always in (None, load.always)


def test_the_plan_counts_the_flops_of_what_scores_a_rollout():
    trained = [RewardConfig("aesthetic"), RewardConfig("pickscore", dtype="bf16")]
    load = gpu_load(trained, [RewardConfig("image_reward")])
    alone = gpu_load(trained[:1])
    assert load.fp32_gflops == alone.fp32_gflops > 0 and load.half_gflops > 0
    assert load.always > gpu_load(trained).always
