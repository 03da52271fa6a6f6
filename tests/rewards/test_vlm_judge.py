"""The judge against a loopback server: answers by closed forms, requests as they must look, failures without scores."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback, Reply
from PIL import Image
from rollout_scores import rollout_scores
from torch import Tensor

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import RewardError, build_reward, check_reward, endpoint
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.endpoint import BadAnswer
from rlcm_fast.rewards.jpeg import to_uint8
from rlcm_fast.rewards.judge_answers import Axes, Number, YesNo, answer_of, tagged_number
from rlcm_fast.rewards.vlm_judge import VlmJudge
from rlcm_fast.trajectory import Prompt

PAGES = {"/v1/models": {"data": [{"id": "judge"}, {"id": "other"}]}}
PROMPTS = [Prompt(text) for text in ("a cat", "a dog", "a {fox}", 'a "bird"')]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)


def images(num_images: int = len(PROMPTS), size: int = 8) -> Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(**probabilities: float) -> dict[str, Any]:
    """The choice of a server whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p), "bytes": []} for token, p in probabilities.items()]
    return {"logprobs": {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": top}]}}


def says(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}


def replying(reply: Callable[[Any, int], Reply]) -> Loopback:
    return Loopback(reply, PAGES)


def judge(server: Loopback, **arguments: Any) -> VlmJudge:
    calls = {"timeout_s": 2.0, "attempts": 2, **arguments.pop("calls", {})}
    return VlmJudge(f"{server.url}/v1", "judge", calls=calls, **arguments)


def question_of(body: Any) -> str:
    return body["messages"][0]["content"][1]["text"]


# What an answer is worth


def test_yes_and_no_are_summed_over_their_spellings():
    choice = tokens(**{"Yes": 0.4, " yes": 0.1, "YES": 0.05, "\u2581yes": 0.05, "\u0120Yes": 0.02, "Yes.": 0.03,
                       "No": 0.1, "NO": 0.05, " no,": 0.05, "The": 0.1, "yesterday": 0.02, "not": 0.03})  # fmt: skip
    assert YesNo().read(choice) == pytest.approx(0.65 / 0.85)
    assert YesNo(value="p_yes").read(choice) == pytest.approx(0.65)


@given(yes=st.floats(0, 1), no=st.floats(0, 1), other=st.floats(0.001, 1))
def test_the_ratio_is_the_closed_form_and_lies_in_the_range(yes: float, no: float, other: float):
    total = yes + no + other
    choice = tokens(**{word: p / total for word, p in (("Yes", yes), ("No", no), ("Maybe", other)) if p > 1e-300})
    if yes + no < 0.0099 * total:
        with pytest.raises(BadAnswer, match="likeliest 'maybe'"):
            YesNo().read(choice)
    elif yes + no > 0.0101 * total:
        assert YesNo().read(choice) == pytest.approx(yes / (yes + no))


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": []}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes"}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": "high"}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": 0.5}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": math.nan}]}]}},
        {"logprobs": {"content": [{"top_logprobs": []}]}},
        says("Yes"),
    ],
)
def test_an_answer_without_probabilities_is_no_score(choice: dict):
    with pytest.raises(BadAnswer):
        YesNo().read(choice)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<Score>4</Score>", 4),
        ("thinking: <Score>2</Score> no, <score> 4.5 </score>", 4.5),
        ("Score: 3", 3),
        ("**Score:** 3", 3),
        ("Score = 3.25.", 3.25),
        ("**Score**: `5`", 5),
        ("I give a Score (1-5): 4", 4),
        ("Score: 4/5", 4),
        ("Score: 4 out of 5", 4),
        ("Score: 1-5, so Score: 2", 2),
        ("Final Score: 4, where Score: 5 is best", 5),
    ],
)
def test_the_last_number_behind_the_tag_counts(text: str, number: float):
    assert tagged_number(text, "Score", 1, 5) == number


@pytest.mark.parametrize(
    "text",
    ["", "4", "Scores: 4", "Score: four", "Score: 4,5", "Score: 1-5", "Score: 8", "Score: 0.5", "Score: 4/10",
     "Score: 4 out of 10", "Score: -3", "Score: 5e9", "Underscore: 4", "<Score></Score>", "Score: 3.4.5"],
)  # fmt: skip
def test_what_is_no_number_on_the_scale_is_no_score(text: str):
    with pytest.raises(BadAnswer):
        tagged_number(text, "Score", 1, 5)


def test_a_tag_of_two_words_is_found():
    assert Number(tag="Final Score").read(says("Score: 1\nFinal  Score: 4")) == 0.8


def test_axes_are_averaged_with_their_weights():
    text = "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 2"
    answer = answer_of({"kind": "axes", "axes": {"Alignment": 2, "Coherence": 1, "Style": 1}})
    assert isinstance(answer, Axes)
    assert answer.read(says(text)) == pytest.approx((2 * 4.5 + 3 + 2) / 4 / 5)
    with pytest.raises(BadAnswer, match="behind the tag 'Style'"):
        answer.read(says(text.replace("Style", "Taste")))


@pytest.mark.parametrize("choice", [{}, {"message": None}, says(None), says(["Score: 4"]), says("Score: 4", "length")])
def test_a_choice_without_a_whole_text_is_no_score(choice: dict):
    with pytest.raises(BadAnswer):
        Number().read(choice)


# The requests


def test_a_request_holds_the_question_the_picture_without_loss_and_what_the_answer_needs():
    with replying(lambda body, number: Reply({"choices": [tokens(Yes=0.3, No=0.1)]})) as server:
        scores = judge(server)(images(), PROMPTS)
        assert scores.tolist() == pytest.approx([0.75] * 4) and scores.dtype == torch.float32
        by_question = {question_of(body): body for _, body in server.posts}
    assert {path for path, _ in server.posts} == {"/v1/chat/completions"}
    assert by_question.keys() == {
        f'Does this figure show "{prompt.text}"? Please answer Yes or No.' for prompt in PROMPTS
    }
    for prompt, pixels in zip(PROMPTS, to_uint8(images()).numpy(), strict=True):
        body = by_question[f'Does this figure show "{prompt.text}"? Please answer Yes or No.']
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        kind, data = url.split(",")
        assert kind == "data:image/png;base64"
        assert np.array_equal(np.array(Image.open(BytesIO(base64.b64decode(data)))), pixels)
        rest = {name: body[name] for name in body if name != "messages"}
        assert rest == {"model": "judge", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}


def test_a_large_picture_is_reduced_in_its_shape():
    sizes = []

    def reply(body: Any, number: int) -> Reply:
        data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
        sizes.append(Image.open(BytesIO(base64.b64decode(data))).size)
        return Reply({"choices": [tokens(Yes=1.0)]})

    with replying(reply) as server:
        reward = judge(server, calls={"most_pixels": 32 * 16})
        reward(torch.rand(1, 3, 32, 64), PROMPTS[:1])
        reward(torch.rand(1, 3, 16, 32), PROMPTS[:1])
    assert sizes == [(32, 16), (32, 16)]


def test_scores_keep_the_order_of_the_images_and_few_are_asked_at_once():
    prompts = [Prompt(str(number)) for number in range(12)]

    def reply(body: Any, number: int) -> Reply:
        score = int(question_of(body))
        return Reply({"choices": [says(f"Score: {score}")]}, after_s=0.01 * (12 - score))

    with replying(reply) as server:
        answer = {"kind": "number", "lowest": 0, "highest": 20}
        reward = judge(server, question="{prompt}", answer=answer, calls={"at_once": 4})
        assert reward(images(12), prompts).tolist() == pytest.approx([number / 20 for number in range(12)])
        assert server.most_at_once == 4


# Failures


def failing_for(text: str, bad: Reply) -> Callable[[Any, int], Reply]:
    return lambda body, number: bad if text in question_of(body) else Reply({"choices": [tokens(Yes=0.5, No=0.5)]})


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (Reply("broken", 500), r'answered 500: "broken" \(2 attempts'),
        (Reply("busy", 429, {"Retry-After": "0"}), "answered 429"),
        (Reply({"choices": [tokens(The=0.9, Yes=0.001)]}), "likeliest 'the'; end the question with"),
        (Reply({"choices": []}), "answered JSON without choices"),
        (Reply({"choices": ["Yes"]}), "answered a choice that is no object"),
        (Reply({"error": "out of memory"}), "answered JSON without choices"),
        (Reply(b'{"choices": [{"mess'), "answered what is no JSON"),
        (Reply({"choices": [tokens(Yes=0.5)]}, dies_after=20), "broke off"),
        (Reply({"choices": [tokens(Yes=0.5)]}, after_s=5), "did not answer within 0.2 s"),
    ],
    ids=["500", "429", "nonsense", "no-choice", "text", "error", "half", "dies", "slow"],
)
def test_only_the_image_whose_answer_fails_has_no_score(bad: Reply, problem: str):
    with replying(failing_for("a dog", bad)) as server, pytest.raises(ImagesFailed, match=problem) as caught:
        judge(server, calls={"timeout_s": 0.2})(images(), PROMPTS)
    failed = caught.value
    assert failed.problems.keys() == {1} and failed.scores is not None
    assert failed.scores[[0, 2, 3]].tolist() == pytest.approx([0.5] * 3) and failed.scores[1].isnan()


def test_a_run_stops_with_prompt_reward_and_reason():
    problem = r"reward 'vlm_judge', prompt 'a dog', iteration 3: .*http.* answered 500"
    with replying(failing_for("a dog", Reply("broken", 500))) as server, pytest.raises(RewardError, match=problem):
        rollout_scores("vlm_judge", judge(server), images(), PROMPTS)


def test_a_run_may_go_on_without_the_image():
    with replying(failing_for("a dog", Reply("broken", 500))) as server:
        rewards = rollout_scores("vlm_judge", judge(server), images(), PROMPTS, skips=0.25)
    assert rewards.total.isnan().tolist() == [False, True, False, False]
    assert len(rewards.problems) == 1 and "a dog" in rewards.problems[0] and "answered 500" in rewards.problems[0]


def test_a_failure_that_passes_costs_nothing():
    def reply(body: Any, number: int) -> Reply:
        return Reply("busy", 503) if number < 2 else Reply({"choices": [tokens(Yes=0.5, No=0.5)]})

    with replying(reply) as server:
        assert judge(server, calls={"attempts": 3})(images(), PROMPTS).tolist() == [0.5] * 4


def test_a_server_that_ends_during_the_run_fails_all_its_images_quickly():
    with replying(failing_for("nobody", Reply())) as server:
        reward = judge(server)
        reward(images(), PROMPTS)
        server.stop()
        start = time.monotonic()
        with pytest.raises(ImagesFailed, match="broke off") as caught:
            reward(images(), PROMPTS)
    assert caught.value.scores is None and len(caught.value.problems) == 4
    assert time.monotonic() - start < 2


# Mistakes of the user


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"answer": "maybe"}, r"answer={'kind': 'maybe'} has no known kind; give yes_no, number, axes"),
        ({"answer": {"kind": "number", "tga": "x"}}, "answer.tga is unknown; answer takes kind, tag, lowest, highest"),
        ({"answer": {"kind": "number", "lowest": 5}}, "answer.lowest=5 is not below answer.highest=5.0"),
        ({"answer": {"kind": "number", "tag": " "}}, "answer.tag=' ' is empty"),
        ({"answer": {"kind": "axes"}}, "answer.axes={} names no axis"),
        ({"answer": {"kind": "axes", "axes": {"Style": 0}}}, "answer.axes.Style=0 is not allowed"),
        ({"answer": {"kind": "yes_no", "value": "p_no"}}, "answer.value=p_no is unknown; give ratio or p_yes"),
        ({"question": " "}, "question=' ' is empty"),
        ({"calls": {"attempts": -1}}, "calls.attempts=-1 is not allowed"),
        ({"calls": {"most_pixels": 0}}, "calls.most_pixels=0 is not allowed"),
        ({"calls": 3}, "calls=3 is not allowed; give a mapping"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_asked(arguments: dict, problem: str):
    config = RewardConfig("vlm_judge", arguments={"url": "http://127.0.0.1:9/v1", "model": "judge", **arguments})
    with pytest.raises(ValueError, match=f"name=vlm_judge.*{problem}"):
        check_reward(config, "rewards[0]", must_run=True)
    with pytest.raises(ValueError, match=problem):
        build_reward(config.name, config.arguments)


def built(url: str, model: str = "judge") -> Any:
    return build_reward("vlm_judge", {"url": url, "model": model})


def test_a_server_that_is_not_there_is_refused_at_once():
    with replying(lambda body, number: Reply()) as server:
        pass
    with pytest.raises(ValueError, match=r"url=http.*/v1 .*broke off: .*; start the server first, or correct url"):
        built(f"{server.url}/v1")


def test_a_model_that_is_not_served_is_refused_with_those_that_are():
    problem = r"model=jugde is not served at http.*; it serves judge, other"
    with replying(lambda body, number: Reply()) as server, pytest.raises(ValueError, match=problem):
        built(f"{server.url}/v1", "jugde")


def serving(models: Any) -> Loopback:
    return Loopback(lambda body, number: Reply(), {"/v1/models": models})


@pytest.mark.parametrize("models", [Reply(b"<html>"), [], {"data": 3}, {"data": [1]}])
def test_a_server_of_another_kind_is_refused(models: Any):
    with serving(models) as server, pytest.raises(ValueError, match="is no OpenAI-compatible endpoint; give its base"):
        built(f"{server.url}/v1")


def test_a_server_that_lists_no_models_is_taken_at_its_word():
    with serving(Reply("no", 404)) as server:
        assert built(f"{server.url}/v1").used["model"] == "judge"


def test_a_key_that_the_server_refuses_is_said():
    with serving(Reply("no key", 401)) as server, pytest.raises(ValueError, match="answered 401"):
        built(f"{server.url}/v1")
