"""The reward `http` and its server: the same bits come back, a failure costs one image, bad requests nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from loopback import Loopback, Reply
from reward_servers import Mean, Picky, served
from rollout_scores import rollout_scores
from torch import Tensor

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import RewardError, build_reward, check_reward, endpoint, used
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.encoding import png, quantised, to_pictures
from rlcm_fast.rewards.jpeg import JpegIncompressibility
from rlcm_fast.rewards.protocol import read_request, request_of
from rlcm_fast.rewards.remote import RemoteReward
from rlcm_fast.trajectory import Prompt

PLAIN = httpx2.Client(trust_env=False, verify=False)
"""Sends requests that the reward would not send; makes no list of certificates, which takes 0.04 s."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(endpoint, "LONGEST_RETRY_AFTER_S", 0.05)


def images(num_images: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompts(num_images: int) -> list[Prompt]:
    return [Prompt(f"prompt {number}", "my task") for number in range(num_images)]


def remote(url: str, **arguments: Any) -> RemoteReward:
    calls = {"timeout_s": 5.0, "attempts": 2, **arguments.pop("calls", {})}
    return RemoteReward(url, calls=calls, **arguments)


@pytest.fixture(scope="module")
def jpeg_server() -> Iterator[str]:
    with served(JpegIncompressibility(), "jpeg_incompressibility") as server:
        yield server.url


@pytest.fixture(scope="module")
def picky_server() -> Iterator[str]:
    with served(Picky()) as server:
        yield server.url


@pytest.mark.parametrize("images_per_call", [1, 3, 8])
def test_scores_are_bitwise_those_of_the_rounded_images_here(jpeg_server: str, images_per_call: int):
    pictures = images(7, size=16)
    reward = remote(jpeg_server, reward="jpeg_incompressibility", images_per_call=images_per_call)
    scores = reward(pictures, prompts(7))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, JpegIncompressibility()(quantised(pictures), prompts(7)))


def test_every_float32_survives_the_way():
    pictures, reward = images(16), Mean()
    with served(reward) as server:
        scores = remote(server.url)(pictures, prompts(16))
    assert torch.equal(scores, Mean()(quantised(pictures), prompts(16)))
    assert scores.unique().numel() == 16 and set(reward.tasks) == {"my task"}


def test_rounding_moves_a_pixel_by_half_a_step_at_most():
    pictures = images(2)
    assert (quantised(pictures) - pictures).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(quantised(quantised(pictures)), quantised(pictures))


def test_clients_at_once_share_batches_and_get_their_own_scores():
    reward = Mean(seconds=0.02)
    many = [images(6, seed=seed) for seed in range(4)]
    with served(reward) as server:
        clients = [remote(server.url, images_per_call=2) for _ in many]
        with ThreadPoolExecutor(4) as threads:
            scores = list(threads.map(lambda client, pictures: client(pictures, prompts(6)), clients, many))
    for mine, pictures in zip(scores, many, strict=True):
        assert torch.equal(mine, Mean()(quantised(pictures), prompts(6)))
    assert max(reward.batches) == 4 and len(reward.batches) < 12  # requests have 2 images each


def test_images_of_several_sizes_share_no_batch_and_none_is_lost():
    with served(Mean(seconds=0.01)) as server, ThreadPoolExecutor(3) as threads:
        client = remote(server.url)
        scores = list(threads.map(lambda size: client(images(5, size), prompts(5)), [8, 12, 16]))
    for mine, size in zip(scores, [8, 12, 16], strict=True):
        assert torch.equal(mine, Mean()(quantised(images(5, size)), prompts(5)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise", "RuntimeError: this picture kills me"),
        ("name", "I cannot name it"),
        ("nan", "returned nan; scores must be finite"),
    ],
)
def test_an_image_that_cannot_be_scored_fails_alone(picky_server: str, text: str, problem: str):
    texts = [Prompt("a cat"), Prompt("a dog"), Prompt(text), Prompt("a fox")]
    with pytest.raises(ImagesFailed) as caught:
        remote(picky_server)(images(4), texts)
    failed, expected = caught.value, Mean()(quantised(images(4)), texts)
    assert failed.problems == {2: problem} and failed.scores is not None
    assert torch.equal(failed.scores[[0, 1, 3]], expected[[0, 1, 3]]) and failed.scores[2].isnan()


def test_a_server_that_ends_during_a_run_stops_it_with_prompt_and_reward():
    with served(Mean()) as server:
        client = remote(server.url)
        scores = rollout_scores("http", client, images(4), prompts(4)).total
        assert torch.equal(scores, Mean()(quantised(images(4)), prompts(4)))
    problem = r"reward 'http', prompt 'prompt 0', iteration 3: .*http.* broke off.*2 attempts"
    with pytest.raises(RewardError, match=problem):
        rollout_scores("http", client, images(4), prompts(4))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_requests_in_progress_are_answered_when_the_server_shuts_down():
    reward = Mean(seconds=0.2)
    with ThreadPoolExecutor(1) as thread, served(reward) as server:
        scores = thread.submit(remote(server.url), images(6), prompts(6))
        wait_until(lambda: reward.batches)  # four are being scored, two wait
    assert torch.equal(scores.result(), Mean()(quantised(images(6)), prompts(6)))


def test_the_waiting_images_of_a_client_that_is_gone_are_not_scored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.rewards.serving._LOOKS_UP_S", 0.01)
    reward = Mean(seconds=0.2)
    with served(reward) as server:
        body = request_of("mean", prompts(12), [png(picture) for picture in to_pictures(images(12))])
        with pytest.raises(httpx2.ReadTimeout):
            PLAIN.post(f"{server.url}/score", json=body, timeout=0.1)
        wait_until(lambda: not server.batcher.num_waiting)
    assert sum(reward.batches) == 4


def test_too_many_images_are_sent_away_and_come_back():
    with served(Mean(seconds=0.05), most_waiting=4) as server, ThreadPoolExecutor(4) as threads:
        client = remote(server.url, images_per_call=4, calls={"attempts": 50})
        scores = list(threads.map(lambda seed: client(images(4, seed=seed), prompts(4)), range(4)))
        metrics = PLAIN.get(f"{server.url}/metrics").text
    for seed, mine in enumerate(scores):
        assert torch.equal(mine, Mean()(quantised(images(4, seed=seed)), prompts(4)))
    assert 'requests_total{status="503"}' in metrics


def test_metrics_count_what_was_done():
    with served(Picky()) as server:
        client = remote(server.url)
        client(images(3), prompts(3))
        with pytest.raises(ImagesFailed):
            client(images(1), [Prompt("raise")])
        PLAIN.post(f"{server.url}/score", content=b"nonsense")
        text = PLAIN.get(f"{server.url}/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    numbers = {name.removeprefix("rlcm_fast_reward_"): float(value) for name, value in numbers.items()}
    assert numbers.pop("scoring_seconds_total") > 0
    assert numbers == {
        "images_total": 4,
        "failed_images_total": 1,
        "batches_total": 2,
        "waiting_images": 0,
        'requests_total{status="200"}': 2,
        'requests_total{status="400"}': 1,
    }


def good() -> dict[str, Any]:
    return request_of("mean", prompts(2), [png(picture) for picture in to_pictures(images(2))])


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in good().items() if key != name}


@pytest.fixture(scope="module")
def small_server() -> Iterator[str]:
    """The URL of a server that takes 10,000 bytes at most."""
    with served(Mean(), most_bytes=10_000) as server:
        yield server.url


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, good()),
        (400, b""),
        (400, b"\x80\x04\x95\x00."),  # a pickle is not even read
        (400, b'{"protocol": 1'),
        (400, []),
        (409, {}),
        (409, {**good(), "reward": "other"}),
        (409, {**good(), "protocol": 2}),
        (400, without("images")),
        (400, without("prompts")),
        (400, without("tasks")),
        (400, {**good(), "metadata": ["{}"]}),
        (400, {**good(), "metadata": ["{}", "[]"]}),
        (400, {**good(), "metadata": ["{}", "{"]}),
        (400, {**good(), "prompts": ["one"]}),
        (400, {**good(), "prompts": [1, 2]}),
        (400, {**good(), "images": []}),
        (400, {**good(), "images": ["no base64!", "x"]}),
        (400, {**good(), "images": ["aGVsbG8=", "aGVsbG8="]}),
        (400, {**good(), "images": [good()["images"][0], good()["images"][1][:100]]}),
        (400, {**good(), "images": [png(to_pictures(images(1))[0].convert("L"))] * 2}),
        (413, {**good(), "more": "x" * 20_000}),
    ],
)
def test_a_bad_request_is_refused_and_harms_nobody(small_server: str, status: int, body: Any):
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = PLAIN.post(f"{small_server}/score", **sent)
    assert answer.status_code == status
    assert status == 200 or isinstance(answer.json()["error"], str)
    assert remote(small_server)(images(1), prompts(1)).numel() == 1


def test_a_body_of_unannounced_length_is_refused_too(small_server: str):
    answer = PLAIN.post(f"{small_server}/score", content=iter([b"x" * 6000] * 3))
    assert answer.status_code == 413


def test_a_client_does_not_send_what_the_server_would_refuse():
    with served(Mean(), most_bytes=1500) as server:
        with pytest.raises(ImagesFailed, match="bytes, and the server takes 1500; lower images_per_call, or raise"):
            remote(server.url)(images(8), prompts(8))
        assert remote(server.url, images_per_call=1)(images(8), prompts(8)).numel() == 8


def test_a_picture_of_too_many_pixels_is_refused(small_server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.rewards.encoding.MOST_PIXELS", 63)
    answer = PLAIN.post(f"{small_server}/score", json=good())
    assert answer.status_code == 400 and "8 x 8 pixels; at most 63" in answer.json()["error"]


def test_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REWARD_KEY", "secret")
    with served(Mean(), key="secret") as server:
        assert remote(server.url, calls={"api_key_variable": "REWARD_KEY"})(images(2), prompts(2)).numel() == 2
        assert PLAIN.post(f"{server.url}/score", json=good()).status_code == 401
        assert PLAIN.get(f"{server.url}/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
        with pytest.raises(ValueError, match="answered 401"):
            remote(server.url)


def test_what_is_served_is_in_the_record_of_the_run():
    with served(Mean()) as server:
        record = used({"http": (remote(server.url), 1.0)})["http"]
    assert record["url"] == server.url and record["reward"] == "mean" and record["device"] == "cpu"


# What a client says to servers of other kinds


def health(**changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "reward": "mean", "most_bytes": 10_000, **changes}


def saying(answer: Any, page: Any = None) -> Loopback:
    return Loopback(lambda body, number: Reply(answer), {"/health": page or health()})


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (Reply("no", 404), "answered 404: .*; start rlcm-fast reward-server there, or correct url"),
        (Reply(b"<html>"), "is no rlcm-fast reward-server; give its address without a path"),
        ([1], "is no rlcm-fast reward-server"),
        (health(protocol=2), "speaks protocol 2, and this version 1; install one version"),
        (health(reward="other"), "reward=mean is not served at .*, but other; correct reward or url"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_when_the_reward_is_made(page: Any, problem: str):
    with saying({}, page) as server, pytest.raises(ValueError, match=f"name=http.*{problem}"):
        build_reward("http", {"url": server.url, "reward": "mean"})


def test_a_server_that_is_not_there_is_refused_when_the_reward_is_made():
    with saying({}) as server:
        pass
    with pytest.raises(ValueError, match="broke off: .*; start rlcm-fast reward-server there, or correct url"):
        build_reward("http", {"url": server.url})


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"scores": [1.0, 2.0]},
        {"scores": [1.0], "problems": [None]},
        {"scores": [1.0, 2.0, 3.0], "problems": [None] * 3},
        {"scores": [1.0, 2.0], "problems": [None]},
        {"scores": [1.0, None], "problems": [None, None]},
        {"scores": [1.0, 2.0], "problems": [None, "bad"]},
        {"scores": [1.0, "2"], "problems": [None, None]},
        {"scores": [1.0, True], "problems": [None, None]},
        {"scores": [1.0, float("nan")], "problems": [None, None]},
        {"scores": [1.0, float("inf")], "problems": [None, None]},
        b'{"scores": [1.0, 2.0], "prob',
    ],
)
def test_an_answer_that_is_no_list_of_scores_or_problems_is_a_failure_not_a_score(answer: Any):
    with saying(answer) as server:
        client = remote(server.url)
        with pytest.raises(ImagesFailed, match=r"answered .*2 attempts") as caught:
            client(images(2), prompts(2))
    assert caught.value.scores is None and caught.value.problems.keys() == {0, 1}


def test_a_request_that_fails_costs_its_own_images_only():
    def reply(body: Mapping[str, Any], number: int) -> Reply:
        if "prompt 2" in body["prompts"]:
            return Reply("broken", 500)
        return Reply(
            {"scores": [float(text[-1]) for text in body["prompts"]], "problems": [None] * len(body["prompts"])}
        )

    replying: Callable[..., Reply] = reply
    with Loopback(replying, {"/health": health()}) as server, pytest.raises(ImagesFailed) as caught:
        remote(server.url, images_per_call=2)(images(7), prompts(7))
    assert caught.value.problems.keys() == {2, 3} and caught.value.scores is not None
    assert caught.value.scores[[0, 1, 4, 5, 6]].tolist() == [0, 1, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [({"images_per_call": 0}, "images_per_call=0 is not allowed"), ({"calls": {"wait": 1}}, "calls.wait is unknown")],
)
def test_a_wrong_setting_is_refused_before_anything_is_asked(arguments: dict, problem: str):
    config = RewardConfig("http", arguments={"url": "http://127.0.0.1:9", **arguments})
    with pytest.raises(ValueError, match=f"name=http: {problem}"):
        check_reward(config, "rewards[0]", must_run=True)


def test_metadata_arrives_and_may_be_left_out():
    """Without it, geneval on a server would not know what to look for."""
    asked = [Prompt("a", "x", '{"objects": ["cat"]}'), Prompt("b")]
    body = request_of("mean", asked, [png(picture) for picture in to_pictures(images(2))])
    assert read_request(json.dumps(body).encode(), "mean").prompts == asked
    del body["metadata"]
    assert read_request(json.dumps(body).encode(), "mean").prompts == [Prompt("a", "x"), Prompt("b")]
