"""HPSv2 against a small transformer in open_clip's layout, written out with torch's own attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_rewards
import torch
from tiny_rewards import PROMPTS, TEXTS
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, normalize

from rlcm_fast.rewards import build_reward, check_scores
from rlcm_fast.rewards.hps import HpsV2, HpsV20, convert, renamed

WIDTH, TEXT_WIDTH, PROJECTION, PATCH, SIZE = 48, 32, 12, 4, 16


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 16, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Blocks(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, PROJECTION))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        states = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(states[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP: names and computation; texts are padded with 0 and end at their largest token."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(num_words, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(tiny_rewards.MAX_TOKENS, TEXT_WIDTH))
        self.transformer = Blocks(TEXT_WIDTH)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, PROJECTION))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        mask = torch.full((tiny_rewards.MAX_TOKENS,) * 2, float("-inf")).triu(1)
        self.register_buffer("attn_mask", mask)

    @torch.no_grad()
    def score(self, pixels: Tensor, ids: Tensor) -> Tensor:
        states = self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask)
        texts = self.ln_final(states)[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection
        return (normalize(self.visual(pixels), dim=1) * normalize(texts, dim=1)).sum(dim=1)


@pytest.fixture(scope="module")
def original() -> OpenClip:
    torch.manual_seed(0)
    model = OpenClip(len(tiny_rewards.clip_words()))
    tiny_rewards.enlarge(model, 1)
    return model


@pytest.fixture(scope="module")
def folder(original: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .pt files of both versions and a tokenizer."""
    folder = tmp_path_factory.mktemp("hps")
    for name in ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"):
        torch.save({"state_dict": original.state_dict()}, folder / name)
    tiny_rewards.clip_words().save_pretrained(folder)
    return folder


def expected(original: OpenClip, images: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    ids = torch.zeros(len(TEXTS), tiny_rewards.MAX_TOKENS, dtype=torch.long)
    for row, text in zip(ids, TEXTS, strict=True):
        tokens = tiny_rewards.clip_words()(text)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    return original.score((images - mean) / std, ids)


def test_the_score_is_the_cosine_of_the_original_layout(original: OpenClip, folder: Path):
    images = tiny_rewards.images()
    shrunk = interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    for kind, model in ((HpsV2, folder), (HpsV20, folder), (HpsV2, folder / "HPS_v2.1_compressed.pt")):
        scores = kind(str(model), str(folder))(images, PROMPTS)
        assert (scores - expected(original, shrunk)).abs().max() <= 1e-5


def test_an_image_that_is_no_square_is_padded_with_black(original: OpenClip, folder: Path):
    images = tiny_rewards.images()[..., :12]  # 24 x 12 pixels
    shrunk = interpolate(images, (SIZE, SIZE // 2), mode="bicubic", antialias=True).clamp(0, 1)
    padded = torch.zeros(len(images), 3, SIZE, SIZE)
    padded[..., SIZE // 4 : 3 * SIZE // 4] = shrunk
    scores = HpsV2(str(folder), str(folder))(images, PROMPTS)
    assert (scores - expected(original, padded)).abs().max() <= 1e-5


def test_converted_weights_are_safetensors_that_score_alike(folder: Path, tmp_path: Path):
    convert(folder / "HPS_v2.1_compressed.pt", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    images = tiny_rewards.images()
    before, after = (HpsV2(str(model), str(folder))(images, PROMPTS) for model in (folder, tmp_path))
    assert torch.equal(before, after)


def test_a_converted_folder_is_a_clip_model_of_transformers(original: OpenClip, folder: Path, tmp_path: Path):
    from transformers import CLIPModel

    convert(folder / "HPS_v2.1_compressed.pt", tmp_path)
    model, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.logit_scale.item() == original.logit_scale.item()
    assert model.config.vision_config.hidden_act == "gelu"  # exact; quick_gelu is off by 3e-3


def test_scores_are_finite_and_batches_do_not_change_them(folder: Path):
    images = tiny_rewards.images()
    reward = build_reward("hps_v2", {"model": str(folder), "tokenizer": str(folder)})
    together = reward(images, PROMPTS)
    one_by_one = torch.cat([reward(images[i : i + 1].clone(), PROMPTS[i : i + 1]) for i in range(4)])
    assert (together - one_by_one).abs().max() <= 1e-6
    for flat in (torch.zeros(4, 3, 20, 33), torch.ones(4, 3, 20, 33)):
        check_scores("hps_v2", reward(flat, PROMPTS), PROMPTS, iteration=0)


def test_a_file_of_another_layout_is_refused(tmp_path: Path, folder: Path):
    torch.save({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"layers\.0\.weight is no tensor of an open_clip model; give HPS_v2\.1_com"):
        HpsV2(str(tmp_path), str(folder))
    torch.save({"logit_scale": torch.ones(())}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match="holds no CLIP model: vision_model.embeddings.patch_embedding.weight is miss"):
        HpsV2(str(tmp_path), str(folder))


class Evil:
    """What a pickle could run when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise AssertionError('code of the file ran')",))


def test_code_in_the_file_never_runs(tmp_path: Path, folder: Path):
    torch.save({"state_dict": Evil()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"HPS_v2\.1_compressed\.pt is no file of tensors"):
        HpsV2(str(tmp_path), str(folder))


def test_every_name_of_the_original_is_taken_over(original: OpenClip):
    names = renamed(original.state_dict())
    # in_proj becomes three: two blocks of two towers, weight and bias; the mask is dropped
    assert len(names) == len(original.state_dict()) + 2 * 2 * 2 * 2 - 1
