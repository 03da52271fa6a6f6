"""ImageReward against a small BLIP with the original's names, written out with torch alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tiny_rewards
import torch
from tiny_rewards import PROMPTS, TEXTS
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from rlcm_fast.rewards import build_reward, check_scores
from rlcm_fast.rewards.image_reward import MEAN, STD, ImageReward
from rlcm_fast.trajectory import Prompt

PATCH, SIZE, HEAD, LAYERS = 4, tiny_rewards.SIZE, 64, (0, 2, 4, 6, 7)


class Original:
    """The original's computation, from its definitions (BLIP, arXiv 2201.12086, its med encoder)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, L, E), k and v (1, M, E); heads of 64."""
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / HEAD**0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def see(self, pixels: Tensor) -> Tensor:
        eye = "blip.visual_encoder"
        kernel, bias = self.tensors[f"{eye}.patch_embed.proj.weight"], self.tensors[f"{eye}.patch_embed.proj.bias"]
        patches = torch.nn.functional.conv2d(pixels, kernel, bias, PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([self.tensors[f"{eye}.cls_token"], patches], dim=1) + self.tensors[f"{eye}.pos_embed"]
        for number in range(2):
            block = f"{eye}.blocks.{number}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attend(*qkv.chunk(3, dim=-1)))
            inner = gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{eye}.norm", x, 1e-6)

    def read(self, ids: Tensor, patches: Tensor) -> Tensor:
        reader = "blip.text_encoder"
        words = self.tensors[f"{reader}.embeddings.word_embeddings.weight"][ids]
        places = self.tensors[f"{reader}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{reader}.embeddings.LayerNorm", words + places, 1e-12)
        for number in range(2):
            layer = f"{reader}.encoder.layer.{number}"
            for kind in ("attention", "crossattention"):
                seen = x if kind == "attention" else patches
                parts = (x, seen, seen)
                names = ("query", "key", "value")
                qkv = [self.linear(f"{layer}.{kind}.self.{n}", part) for n, part in zip(names, parts, strict=True)]
                attended = self.linear(f"{layer}.{kind}.output.dense", self.attend(*qkv))
                x = self.norm(f"{layer}.{kind}.output.LayerNorm", x + attended, 1e-12)
            inner = self.linear(f"{layer}.output.dense", gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + inner, 1e-12)
        return x[:, 0]

    def score(self, pixels: Tensor, ids: Tensor) -> Tensor:
        x = self.read(ids, self.see(pixels))
        for number in LAYERS:
            x = self.linear(f"mlp.layers.{number}", x)
        return (x[0, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_rewards.save_image_reward(tmp_path_factory.mktemp("image_reward"))


def test_scores_are_those_of_the_original_computation(folder: str):
    """In one batch: prompts are padded to the longest, which the original pads to 35."""
    images = tiny_rewards.images()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = (interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1) - mean) / std
    original = Original(tiny_rewards.image_reward_tensors())
    rows = [[2, *(tiny_rewards.VOCABULARY.index(word) for word in text.split()), 3] for text in TEXTS]
    expected = torch.stack(
        [original.score(image[None], torch.tensor([row])) for image, row in zip(pixels, rows, strict=True)]
    )
    scores = ImageReward(folder, folder)(images, PROMPTS)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_batches_and_threads_do_not_change_scores(folder: str):
    images = tiny_rewards.images()
    together = ImageReward(folder, folder)(images, PROMPTS)
    for batch_size in (1, 3):
        scores = ImageReward(folder, folder, batch_size=batch_size)(images, PROMPTS)
        assert (scores - together).abs().max() <= 1e-5 * together.abs().max()
    reward, results = build_reward("image_reward", {"model": folder, "tokenizer": folder}), []
    threads = [threading.Thread(target=lambda: results.append(reward(images, PROMPTS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(scores, together) for scores in results) and len(results) == 2


def test_two_rewards_share_one_model(folder: str):
    assert ImageReward(folder, folder)._blip is ImageReward(folder, folder)._blip


def test_scores_are_finite_on_black_white_and_noise_of_any_shape(folder: str):
    reward = ImageReward(folder, folder)
    noise = tiny_rewards.images(33)[..., :20]
    for images in (torch.zeros_like(noise), torch.ones_like(noise), noise):
        check_scores("image_reward", reward(images, PROMPTS), PROMPTS, iteration=0)


def test_prompts_are_cut_at_35_tokens_and_that_is_said(folder: str):
    images = tiny_rewards.images()[:2]
    reward = ImageReward(folder, folder)
    long, longer = Prompt("cat " * 40), Prompt("cat " * 33 + "car car")
    with pytest.warns(UserWarning, match="ImageReward reads 35 tokens, and a prompt has 42"):
        scores = reward(images[[0, 0]], [long, longer])
    # Both have 33 cats between [CLS] and [SEP]; on an AMD EPYC the two rows of a batch differ in their last bits.
    assert scores[0].item() == pytest.approx(scores[1].item(), rel=1e-6)


def test_another_file_is_refused(tmp_path: Path, folder: str):
    torch.save({"a": torch.ones(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"model: the file is not ImageReward\.pt: embeddings\.patch_embedding"):
        ImageReward(str(tmp_path), folder)
    tensors = tiny_rewards.image_reward_tensors()
    del tensors["blip.visual_encoder.norm.weight"]
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="does not fit BlipVisionModel: post_layernorm.weight is missing"):
        ImageReward(str(tmp_path), folder)


def test_the_constants_are_the_originals():
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
