"""RLCM's alignment on small random models, against plain transcriptions of DeBERTa, BERTScore and LLaVA's reading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_captions
import torch
from loopback import Loopback, Reply
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, softmax

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import build_reward, captions, check_reward, endpoint, gpu_bytes, used
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.bert_score import DEBERTA, BertScore, greedy_recall
from rlcm_fast.rewards.captions import Llava, through_jpeg
from rlcm_fast.rewards.encoding import to_pictures
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.vlm_alignment import VlmAlignment
from rlcm_fast.trajectory import Prompt

CPU = Placement.of("fp32", "cpu", 2)
TEXTS = ["the cat", "a", "the cat is in the hat, the other is not", "riding 2 bikes"]


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_captions.save_deberta(tmp_path_factory.mktemp("deberta"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_captions.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> int:
    """The length of a caption."""
    monkeypatch.setattr(captions, "MAX_TOKENS", 8)
    return 8


def scorer(folder: str, layer: int = 2) -> BertScore:
    return BertScore.of(ModelFiles("scorer", folder, DEBERTA), layer, CPU)


def images(num_images: int = 3) -> Tensor:
    return torch.rand(num_images, 3, 20, 24, generator=torch.Generator().manual_seed(0))


# BERTScore


def plain_deberta(weights: dict[str, Tensor], ids: list[int], num_heads: int, layer: int) -> Tensor:
    """The output (L, E) of a layer of DeBERTa by its paper (arXiv 2006.03654), equation 4, loop by loop."""

    def linear(name: str, values: Tensor) -> Tensor:
        bias = weights.get(f"{name}.bias")
        product = values @ weights[f"{name}.weight"].T
        return product if bias is None else product + bias

    def norm(name: str, values: Tensor) -> Tensor:
        shape = values.shape[-1:]
        return layer_norm(values, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-7)

    states = norm("embeddings.LayerNorm", weights["embeddings.word_embeddings.weight"][ids])
    length, width = states.shape
    size, relative = width // num_heads, weights["encoder.rel_embeddings.weight"]
    span, middle = length, len(relative) // 2
    for number in range(layer):
        name = f"encoder.layer.{number}.attention"
        joined = linear(f"{name}.self.in_proj", states).reshape(length, num_heads, 3 * size)
        key_positions = linear(f"{name}.self.pos_proj", relative).reshape(-1, num_heads, size)
        query_positions = linear(f"{name}.self.pos_q_proj", relative).reshape(-1, num_heads, size)
        mixed = torch.zeros(length, num_heads, size)
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            query = joined[:, head, :size] + weights[f"{name}.self.q_bias"][part]
            key = joined[:, head, size : 2 * size]
            value = joined[:, head, 2 * size :] + weights[f"{name}.self.v_bias"][part]
            scores = torch.zeros(length, length)
            for i in range(length):
                for j in range(length):
                    at = middle + min(max(i - j, -span), span - 1)
                    to_place, from_place = query[i] @ key_positions[at, head], key[j] @ query_positions[at, head]
                    scores[i, j] = query[i] @ key[j] + to_place + from_place
            mixed[:, head] = softmax(scores / math.sqrt(3 * size), dim=-1) @ value
        attended = norm(
            f"{name}.output.LayerNorm", linear(f"{name}.output.dense", mixed.reshape(length, width)) + states
        )
        name = f"encoder.layer.{number}"
        inner = gelu(linear(f"{name}.intermediate.dense", attended))
        states = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", inner) + attended)
    return states


def plain_recall(reference: Tensor, answer: Tensor) -> float:
    """The recall of token vectors (L, E) in (M, E), loop by loop."""
    found = []
    for token in reference[1:-1]:
        cosines = [torch.dot(token, other) / (token.norm() * other.norm()) for other in answer]
        found.append(max(float(cosine) for cosine in cosines))
    return sum(found) / len(found)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_recall_is_that_of_plain_transcriptions(deberta: str, layer: int):
    one = scorer(deberta, layer)
    weights = dict(one.network.state_dict())
    vectors = [plain_deberta(weights, one.tokens(text), 4, layer) for text in TEXTS]
    pairs = [(i, j) for i in range(len(TEXTS)) for j in range(len(TEXTS))]
    recalls = one.recall([TEXTS[i] for i, _ in pairs], [TEXTS[j] for _, j in pairs])
    for (i, j), recall in zip(pairs, recalls, strict=True):
        assert recall == pytest.approx(plain_recall(vectors[i], vectors[j]), abs=1e-5)
        assert i != j or recall == pytest.approx(1, abs=1e-5)
    assert len({round(recall, 4) for recall in recalls}) > 8


def padded_recall(one: BertScore, references: list[str], answers: list[str]) -> Tensor:
    """The rule of the package bert_score: padded batches, masks that multiply, weights of 0 for [CLS] and [SEP]."""

    def encoded(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = [one.tokens(text) for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([[*row, *[3] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        counts = mask.float() * (padded != 1) * (padded != 2)
        with torch.no_grad():
            vectors = one.network(input_ids=padded, attention_mask=mask).last_hidden_state
        return vectors / vectors.norm(dim=-1, keepdim=True), mask, counts

    reference, reference_mask, counts = encoded(references)
    answer, answer_mask, _ = encoded(answers)
    cosines = (answer @ reference.transpose(1, 2)) * answer_mask[:, :, None] * reference_mask[:, None, :]
    recalls = (cosines.max(dim=1).values * counts / counts.sum(dim=1, keepdim=True)).sum(dim=1)
    return recalls.masked_fill(answer_mask.sum(dim=1) == 2, 0.0)


def test_recall_is_that_of_the_padded_batches_of_bert_score(deberta: str):
    one = scorer(deberta)
    references, answers = [*TEXTS, TEXTS[0]], [*TEXTS[1:], "hat", ""]
    expected = padded_recall(one, references, answers)
    assert one.recall(references, answers) == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_answer_without_words_has_recall_0(deberta: str):
    assert scorer(deberta).recall(["the cat"] * 2, ["", " \n"]) == [0.0, 0.0]


def test_the_layers_behind_are_not_loaded_and_change_nothing(deberta: str):
    whole, cut = scorer(deberta, 3), scorer(deberta, 2)
    assert sum(p.numel() for p in cut.network.parameters()) < sum(p.numel() for p in whole.network.parameters())
    ids = torch.tensor([cut.tokens(TEXTS[2])])
    with torch.no_grad():
        inside = whole.network(input_ids=ids, output_hidden_states=True).hidden_states[2]
        assert torch.equal(cut.network(input_ids=ids).last_hidden_state, inside)


def test_weights_may_be_a_file_of_torch(deberta: str, tmp_path: Path):
    """microsoft/deberta-xlarge-mnli has no safetensors; its file is read with weights_only, by transformers."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(deberta) / name).read_bytes())
    weights = scorer(deberta, 3).network.state_dict()
    torch.save({f"deberta.{name}": weight for name, weight in weights.items()}, tmp_path / "pytorch_model.bin")
    assert scorer(str(tmp_path)).recall(TEXTS[:1], TEXTS[1:2]) == scorer(deberta).recall(TEXTS[:1], TEXTS[1:2])


def test_matching_is_greedy_and_takes_each_token_of_the_reference_once():
    reference = torch.eye(4)  # [CLS], two tokens, [SEP]
    answer = torch.stack([torch.eye(4)[1], torch.eye(4)[1], torch.tensor([0, 0.6, 0.8, 0])])
    assert greedy_recall(reference, answer).item() == pytest.approx((1 + 0.8) / 2)


# Captions


def plain_captions(one: Llava, pictures: list[Any], num_tokens: int) -> list[str]:
    """Greedy captions without a cache: vectors of the picture between those of the words, one whole pass a token."""
    model: Any = one._network.model
    head, tokenizer = one._network.lm_head, one._tokenizer
    question = tokenizer(f"USER: <image>\n{captions.QUESTION} ASSISTANT:")["input_ids"]
    place = question.index(3)
    texts = []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(through_jpeg(picture))).permute(2, 0, 1)[None] / 255
        seen = model.vision_tower(one._prepare(pixels), output_hidden_states=True).hidden_states[-2][0, 1:]
        projected = model.multi_modal_projector
        vectors = projected.linear_2(gelu(projected.linear_1(seen)))
        words, answer = model.language_model.embed_tokens, []
        for _ in range(num_tokens):
            parts = [
                words(torch.tensor(question[:place])),
                vectors,
                words(torch.tensor(question[place + 1 :] + answer)),
            ]
            states = model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
            answer.append(int(head(states[0, -1]).argmax()))
            if answer[-1] in tiny_captions.ENDS:
                break
        texts.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return texts


def test_captions_are_those_of_a_plain_transcription(llava: str, few_tokens: int):
    one = Llava.of(ModelFiles("captioner", llava, captions.LLAVA), CPU)
    pictures = to_pictures(images(5))
    with torch.no_grad():
        expected = plain_captions(one, pictures, few_tokens)
    assert one(pictures) == expected and len(set(expected)) > 1


def test_a_tokenizer_without_a_place_for_the_picture_is_refused(llava: str, tmp_path: Path):
    for file in Path(llava).iterdir():
        data = file.read_bytes()
        is_words = file.name.startswith("tokenizer")
        (tmp_path / file.name).write_bytes(data.replace(b"<image>", b"<other>") if is_words else data)
    with pytest.raises(ValueError, match="does not know <image>"):
        Llava.of(ModelFiles("captioner", str(tmp_path), captions.LLAVA), CPU)


# The reward


def test_the_reward_is_the_recall_of_the_prompt_in_the_caption(deberta: str, llava: str, few_tokens: int):
    reward = build_reward(
        "vlm_alignment", {"captioner": llava, "scorer": deberta, "layer": 2, "dtype": "fp32", "device": "cpu"}
    )
    prompts = [Prompt("the cat"), Prompt("the cat"), Prompt("a hat")]
    scores = reward(images(), prompts)
    answers = Llava.of(ModelFiles("captioner", llava, captions.LLAVA), CPU)(to_pictures(images()))
    expected = scorer(deberta).recall([f"The image contains {prompt.text}" for prompt in prompts], answers)
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(expected)
    assert used({"x": (reward, 1.0)})["x"].keys() == {"captioner", "scorer"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """Says what it was told to about the first picture, and fails for the second."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    first = captions.jpeg_url(to_pictures(images())[0], 80)
    second = captions.jpeg_url(to_pictures(images())[1], 80)

    def reply(body: Any, number: int) -> Reply:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        if url == second:
            return Reply("broken", 500)
        text = " The image contains the cat\n" if url == first else ""
        return Reply({"choices": [{"message": {"content": text}, "finish_reason": "length"}]})

    with Loopback(reply, {"/v1/models": {"data": [{"id": "llava"}]}}) as loopback:
        yield loopback


def remote(server: Loopback, deberta: str) -> VlmAlignment:
    captioner = {"url": f"{server.url}/v1", "model": "llava", "calls": {"attempts": 2}}
    return VlmAlignment(captioner, deberta, 2, device="cpu")


def test_a_server_may_write_the_captions_and_one_that_fails_has_no_score(server: Loopback, deberta: str):
    reward = remote(server, deberta)
    with pytest.raises(ImagesFailed, match="answered 500") as caught:
        reward(images(), [Prompt("the cat")] * 3)
    assert caught.value.problems.keys() == {1} and caught.value.scores is not None
    assert caught.value.scores[[0, 2]].tolist() == pytest.approx([1.0, 0.0], abs=1e-5)  # an empty caption is a score
    _, body = server.posts[0]
    assert body["messages"][0]["content"][1]["text"] == "Answer concisely: what is going on in this image?"
    assert (body["max_tokens"], body["temperature"]) == (64, 0)
    assert reward.used["captioner"] == {"url": f"{server.url}/v1", "model": "llava"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"layer": 0}, "layer=0 is not allowed"),
        ({"captioner": {"url": "http://x"}}, "captioner has no model; give {url: http://HOST:PORT/v1, model: NAME}"),
        ({"captioner": {"url": "http://x", "model": "m", "port": 3}}, "captioner.port is unknown"),
        ({"captioner": {"url": "http://x", "model": "m", "calls": {"attempts": 0}}}, "calls.attempts=0"),
        ({"captioner": "no/such/folder"}, "captioner=no/such/folder does not exist"),
    ],
)
def test_a_wrong_setting_is_refused_before_weights_load(deberta: str, arguments: dict, problem: str):
    config = RewardConfig("vlm_alignment", arguments={"scorer": deberta, **arguments})
    with pytest.raises(ValueError, match=f"rewards\\[0\\].name=vlm_alignment: {problem}"):
        check_reward(config, "rewards[0]", must_run=True)


def test_a_layer_that_the_scorer_does_not_have_is_named(deberta: str):
    with pytest.raises(ValueError, match="layer=4 is not there: .* has 3"):
        scorer(deberta, 4)


def test_the_plan_counts_both_models_or_the_scorer_alone():
    server = {"captioner": {"url": "http://x/v1", "model": "m"}}
    assert gpu_bytes([RewardConfig("vlm_alignment")]) == 2 * 7_063_400_000 + 4 * 640_300_000
    assert gpu_bytes([RewardConfig("vlm_alignment", arguments=server)]) == 4 * 640_300_000
    assert gpu_bytes([RewardConfig("vlm_alignment", arguments={"device": "cpu", **server})]) == 0


@pytest.mark.slow
def test_the_facts_state_the_sizes_and_flops_of_the_real_architectures():
    """LLaVA on meta tensors; of DeBERTa, whose code reads numbers, the FLOPs of one layer as it is."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    attention = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    of_deberta = {**sizes, **attention, "type_vocab_size": 0}
    one_layer = transformers.DebertaModel(transformers.DebertaConfig(**of_deberta, num_hidden_layers=1, vocab_size=9))
    ids = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as of_layer, torch.no_grad():
        one_layer(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.device("meta"):
        deberta = transformers.DebertaModel(
            transformers.DebertaConfig(**of_deberta, num_hidden_layers=40, vocab_size=50265)
        )
        seen = {**sizes, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14, "projection_dim": 768}
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**seen), text_config=transformers.LlamaConfig(vocab_size=32064)
        )
        llava: Any = transformers.LlavaForConditionalGeneration(config)
        with FlopCounterMode(display=False) as of_llava, torch.no_grad():
            llava.get_image_features(pixel_values=torch.zeros(1, 3, 336, 336))
            llava.model.language_model(inputs_embeds=torch.zeros(1, 576 + 25 + 64, 4096))
            llava.lm_head(torch.zeros(1, 64, 4096))
    cases = (
        (DEBERTA.parts[0], deberta, 40 * of_layer.get_total_flops()),
        (captions.LLAVA.parts[0], llava, of_llava.get_total_flops()),
    )
    for part, network, flops in cases:
        millions = sum(weight.numel() for weight in network.parameters()) / 1e6
        assert part.million_parameters == pytest.approx(millions, abs=0.06)
        assert part.gflops == pytest.approx(flops / 1e9, abs=0.06)


@pytest.mark.hub
def test_recalls_are_those_that_bert_score_publishes():
    """RoBERTa large, layer 17, the three pairs of the package's own tests; it puts a space before a text."""
    from transformers import AutoTokenizer, RobertaModel

    answers = [
        "28-year-old chef found dead in San Francisco mall",
        "A 28-year-old chef who recently moved to San Francisco was found dead in the staircase of a local shopping "
        "center.",
        "The victim's brother said he cannot imagine anyone who would want to harm him,\"Finally, it went uphill again "
        'at him."',
    ]
    references = [
        "28-Year-Old Chef Found Dead at San Francisco Mall",
        "A 28-year-old chef who had recently moved to San Francisco was found dead in the stairwell of a local mall "
        "this week.",
        "But the victim's brother says he can't think of anyone who would want to hurt him, saying, \"Things were "
        'finally going well for him."',
    ]
    try:
        tokenizer = AutoTokenizer.from_pretrained("roberta-large", local_files_only=True)
        loaded = RobertaModel.from_pretrained("roberta-large", local_files_only=True, num_hidden_layers=17)
    except OSError:
        pytest.skip("not on this machine: roberta-large; hf download roberta-large")
    network = loaded.eval()

    def vectors(text: str) -> Tensor:
        with torch.no_grad():
            states = network(torch.tensor([tokenizer(f" {text}")["input_ids"]])).last_hidden_state[0]
        return torch.nn.functional.normalize(states, dim=-1)

    recalls = [greedy_recall(vectors(r), vectors(a)).item() for r, a in zip(references, answers, strict=True)]
    assert recalls == pytest.approx([0.98238, 0.97329, 0.92043], abs=1e-4)
