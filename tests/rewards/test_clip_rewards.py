"""The rewards on CLIP, SigLIP and DINOv2 against their formulas, written out on the whole models of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_rewards
import torch
from tiny_rewards import PROMPTS, TEXTS
from torch import Tensor
from torch.nn.functional import interpolate, linear
from transformers import AutoModel, CLIPModel, SiglipVisionModel

from rlcm_fast.rewards import Reward, build_reward, check_scores
from rlcm_fast.rewards.aesthetic import Aesthetic, AestheticV25
from rlcm_fast.rewards.clip_score import FACTORS, ClipScore
from rlcm_fast.rewards.embeddings import ClipEmbedding, DinoEmbedding
from rlcm_fast.rewards.heads import multiply_out
from rlcm_fast.rewards.pickscore import PickScore

LAYERS, LAYERS_2_5 = (0, 2, 4, 6, 7), (0, 2, 4, 6, 8)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("rewards")
    return {
        "clip": tiny_rewards.save_clip(root / "clip"),
        "siglip": tiny_rewards.save_siglip(root / "siglip"),
        "dino": tiny_rewards.save_dino(root / "dino"),
        "head": tiny_rewards.save_head(root / "head.pth", tiny_rewards.WIDTH, "layers", LAYERS),
        "head_2_5": tiny_rewards.save_head(root / "head_2_5.pth", 24, "scoring_head", LAYERS_2_5),
    }


def shrunk(images: Tensor, size: int = tiny_rewards.SIZE) -> Tensor:
    return interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def clip_features(folder: str, images: Tensor, texts: tuple[str, ...] = TEXTS) -> tuple[Tensor, Tensor]:
    """What the whole CLIPModel makes of images and of padded texts: unit vectors (B, E)."""
    model = CLIPModel.from_pretrained(folder)
    words = tiny_rewards.clip_words()(list(texts), padding=True, return_tensors="pt")
    output = model(pixel_values=(shrunk(images) - CLIP_MEAN) / CLIP_STD, **words)
    return output.image_embeds, output.text_embeds


def through(layers: Mapping[str, Tensor], prefix: str, numbers: tuple[int, ...], embedded: Tensor) -> Tensor:
    for number in numbers:
        embedded = linear(embedded, layers[f"{prefix}.{number}.weight"], layers[f"{prefix}.{number}.bias"])
    return embedded[:, 0]


def test_aesthetic_is_its_layers_on_the_unit_clip_embedding(folders: dict[str, str]):
    images = tiny_rewards.images()
    layers = tiny_rewards.head(tiny_rewards.WIDTH, "layers", LAYERS)
    expected = through(layers, "layers", LAYERS, clip_features(folders["clip"], images)[0])
    scores = Aesthetic(folders["clip"], folders["head"])(images, PROMPTS)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_aesthetic_2_5_is_its_layers_on_the_unit_siglip_embedding_of_a_squashed_image(folders: dict[str, str]):
    images = tiny_rewards.images()[..., :20]
    model = SiglipVisionModel.from_pretrained(folders["siglip"])
    pooled = model(pixel_values=shrunk(images) * 2 - 1).pooler_output
    layers = tiny_rewards.head(24, "scoring_head", LAYERS_2_5)
    expected = through(layers, "scoring_head", LAYERS_2_5, pooled / pooled.norm(dim=1, keepdim=True))
    scores = AestheticV25(folders["head_2_5"], folders["siglip"])(images, PROMPTS)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_clip_score_is_a_multiple_of_the_cosine(folders: dict[str, str]):
    images = tiny_rewards.images()
    image, text = clip_features(folders["clip"], images)
    cosines = (image * text).sum(dim=1)
    captions = tuple(f"A photo depicts {prompt}" for prompt in TEXTS)
    image, text = clip_features(folders["clip"], images, captions)
    expected = {
        "cosine": cosines,
        "flow_grpo": 100 * cosines / 30,
        "torchmetrics": 100 * cosines.clamp(min=0),
        "paper": 2.5 * (image * text).sum(dim=1).clamp(min=0),
    }
    assert expected.keys() == FACTORS.keys()
    assert (cosines < 0).any()  # so that clamping shows
    for variant, scores in expected.items():
        ours = ClipScore(folders["clip"], variant)(images, PROMPTS)  # type: ignore[arg-type]
        assert torch.allclose(ours, scores, rtol=1e-5, atol=2e-5), variant


def test_pickscore_is_the_scaled_cosine(folders: dict[str, str]):
    images = tiny_rewards.images()
    image, text = clip_features(folders["clip"], images)
    scores = PickScore(folders["clip"])(images, PROMPTS)
    assert torch.allclose(scores, 50 * (image * text).sum(dim=1), rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_embeddings_are_unit_vectors_of_clip_and_dino(folders: dict[str, str]):
    images = tiny_rewards.images()
    embedded = ClipEmbedding(folders["clip"])(images, PROMPTS)
    assert torch.allclose(embedded, clip_features(folders["clip"], images)[0], atol=1e-5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (shrunk(images, 256)[..., 16:240, 16:240] - mean[:, None, None]) / std[:, None, None]
    state = AutoModel.from_pretrained(folders["dino"])(pixel_values=pixels).last_hidden_state[:, 0]
    embedded = DinoEmbedding(folders["dino"])(images, PROMPTS)
    assert torch.allclose(embedded, state / state.norm(dim=1, keepdim=True), atol=1e-5)


def rewards_of(folders: dict[str, str]) -> dict[str, Reward]:
    clip = {"model": folders["clip"]}
    return {
        "aesthetic": build_reward("aesthetic", {**clip, "head": folders["head"]}),
        "aesthetic_v2_5": build_reward("aesthetic_v2_5", {"model": folders["siglip"], "head": folders["head_2_5"]}),
        "clip_score": build_reward("clip_score", clip),
        "pickscore": build_reward("pickscore", clip),
        "diversity on clip": build_reward("diversity", {"embedding": "clip", "embedding_arguments": clip}),
        "diversity on dinov2": build_reward(
            "diversity", {"embedding": "dinov2", "embedding_arguments": {"model": folders["dino"]}}
        ),
    }


def test_scores_are_finite_on_black_white_and_noise_of_any_shape(folders: dict[str, str]):
    noise = tiny_rewards.images(33)[..., :20]
    for name, reward in rewards_of(folders).items():
        for images in (torch.zeros_like(noise), torch.ones_like(noise), noise):
            check_scores(name, reward(images, PROMPTS), PROMPTS, iteration=0)


def test_batches_and_threads_do_not_change_scores(folders: dict[str, str]):
    """One image at a time, four at a time, and in two threads at once: equal to 1e-5 of the largest score."""
    images = tiny_rewards.images()
    for name, reward in rewards_of(folders).items():
        if reward.scope == "set":
            continue
        together = reward(images, PROMPTS)
        for batch_size in (1, 3):
            one_by_one = torch.cat(
                [
                    reward(images[start : start + batch_size].clone(), PROMPTS[start : start + batch_size])
                    for start in range(0, len(images), batch_size)
                ]
            )
            assert (together - one_by_one).abs().max() <= 1e-5 * together.abs().max(), name
        for scores in in_two_threads(lambda reward=reward: reward(images.clone(), PROMPTS)):
            assert torch.equal(scores, together), name


def in_two_threads(call: Callable[[], Tensor]) -> list[Tensor]:
    barrier, results = threading.Barrier(2), []

    def run() -> None:
        barrier.wait()
        results.append(call())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    return results


def test_what_was_used_names_models_and_variant(folders: dict[str, str]):
    used = ClipScore(folders["clip"], "cosine").used
    assert used["variant"] == "cosine"
    assert used["model"]["model"] == folders["clip"] and "model.safetensors" in used["model"]["files"]
    diversity = build_reward("diversity", {"embedding": "clip", "embedding_arguments": {"model": folders["clip"]}})
    assert diversity.reward.used["model"]["model"] == folders["clip"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clip_score", {"variant": "clipscore"}, "variant=clipscore is unknown; give flow_grpo, torchmetrics, paper"),
        ("aesthetic", {"model": "no/such/folder"}, "model=no/such/folder does not exist; give a folder, or a hub id"),
        ("aesthetic_v2_5", {"head": ""}, "head= is empty; give the file: it comes from github.com/discus0434"),
    ],
)
def test_a_wrong_argument_is_one_line(name: str, arguments: Mapping[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_reward(name, arguments)


def test_a_head_of_another_layout_or_width_is_refused(folders: dict[str, str]):
    with pytest.raises(ValueError, match=r"lacks layers\.0\.weight .*; give sac\+logos"):
        Aesthetic(folders["clip"], folders["head_2_5"])
    other = tiny_rewards.head(7, "layers", LAYERS)
    with pytest.raises(ValueError, match=r"has layers\.0\.weight for 7 numbers, not for 12"):
        multiply_out(other, "layers", LAYERS, 12)


def test_a_model_in_an_old_file_scores_alike(folders: dict[str, str], tmp_path: Path):
    model = CLIPModel.from_pretrained(folders["clip"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    tiny_rewards.clip_words().save_pretrained(tmp_path)
    scores = [PickScore(folder)(tiny_rewards.images(), PROMPTS) for folder in (folders["clip"], str(tmp_path))]
    assert torch.allclose(*scores, rtol=1e-6)


def test_weights_that_are_missing_are_an_error_not_random(folders: dict[str, str], tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{folders['clip']}/model.safetensors")
    del tensors["vision_model.post_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes(Path(folders["clip"], "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"CLIPVisionModelWithProjection: vision_model.post_layernorm.weight is miss"):
        ClipEmbedding(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"could not be loaded as CLIPVisionModelWithProjection"):
        ClipEmbedding(str(tmp_path))


def test_the_published_head_is_known_by_its_score_of_a_zero_vector(folders: dict[str, str], tmp_path: Path):
    """rlcm-fast doctor asks for it; nothing is known of a head with another name."""
    assert Aesthetic(folders["clip"], folders["head"]).self_test() is None
    tensors = tiny_rewards.head(tiny_rewards.WIDTH, "layers", LAYERS)
    for number in LAYERS:
        tensors[f"layers.{number}.bias"].zero_()
    tensors["layers.7.bias"].fill_(5.2366)
    torch.save(tensors, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    test = Aesthetic(folders["clip"], str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")).self_test()
    assert test is not None and test.has_passed
    tensors["layers.7.bias"].fill_(1.9390)
    torch.save(tensors, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    test = Aesthetic(folders["clip"], str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")).self_test()
    assert test is not None and not test.has_passed
