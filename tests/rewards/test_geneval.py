"""geneval on small random models: pixels, detections and colours against transcriptions of their formulas."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import tiny_rewards
import torch
from torch.nn.functional import interpolate, pad
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

from rlcm_fast.rewards import build_reward, mask2former
from rlcm_fast.rewards.geneval import GenEval
from rlcm_fast.rewards.geneval_rules import COLOURS
from rlcm_fast.rewards.mask2former import MASK2FORMER, Instance, box_of, prepare, resize, segmenter
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.trajectory import Prompt

TEXTS = (
    "a photo of a person",
    "a photo of two dogs",
    "a photo of a red car and a blue bicycle",
    "a photo of a computer mouse",
)
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "model": tiny_detectors.save_mask2former(tmp_path_factory.mktemp("mask2former")),
        "clip_model": tiny_rewards.save_clip(tmp_path_factory.mktemp("clip")),
    }


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of 800 pixels."""
    monkeypatch.setattr(mask2former, "_SHORTEST", 48)
    monkeypatch.setattr(mask2former, "_LONGEST", 80)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(seed))


def detections(folder: str, image: torch.Tensor, threshold: float) -> list[tuple[str, float, list[int], np.ndarray]]:
    """mmdetection's post-processing, transcribed for one image (1, 3, H, W), all classes, instance by instance."""
    network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    pixels = interpolate(image, (48, 67), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        output = network(pixel_values=pad((pixels - mean) / std, (0, 29, 0, 16)))
    probabilities = output.class_queries_logits[0].softmax(dim=-1)[:, :-1]
    flat = [(p.item(), q, c) for q, row in enumerate(probabilities) for c, p in enumerate(row)]
    found = []
    for probability, query, label in sorted(flat, reverse=True)[:100]:
        logits = interpolate(output.masks_queries_logits[:, query : query + 1], (64, 96), mode="bilinear")
        logits = interpolate(logits[..., :48, :67], (40, 56), mode="bilinear")[0, 0].numpy()
        inside = logits > 0
        score = probability * (1 / (1 + np.exp(-logits[inside]))).sum() / (inside.sum() + 1e-6)
        if score > threshold:
            rows, columns = np.nonzero(inside)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.append((tiny_detectors.CLASSES[label], float(score), box, inside))
    return sorted(found, key=lambda instance: -instance[1])


def test_detections_are_those_of_the_transcription(folders: dict[str, str]):
    threshold = 0.05
    place = Placement.of("fp32", "cpu", 3)
    found = segmenter(ModelFiles("model", folders["model"], MASK2FORMER), place)(
        images(), [tiny_detectors.CLASSES] * 4, threshold
    )
    for row in range(4):
        expected = detections(folders["model"], images()[row : row + 1], threshold)
        assert len(found[row]) == len(expected) > 0
        for ours, (name, score, box, mask) in zip(found[row], expected, strict=True):
            assert ours.name == name
            assert ours.score == pytest.approx(score, abs=1e-5)
            assert list(ours.box) == box
            np.testing.assert_array_equal(ours.mask.numpy(), mask)


def test_only_wanted_classes_are_found(folders: dict[str, str]):
    model = segmenter(ModelFiles("model", folders["model"], MASK2FORMER), Placement.of("fp32", "cpu", 4))
    everything = model(images(), [tiny_detectors.CLASSES] * 4, 0.05)
    dogs = model(images(), [["dog"]] * 4, 0.05)
    for all_, only in zip(everything, dogs, strict=True):
        of_dogs = [instance.score for instance in all_ if instance.name == "dog"]
        assert of_dogs == pytest.approx([instance.score for instance in only], abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((300, 900), (444, 1333), (448, 1344)),
    ],
)
def test_pixels_have_the_original_sizes(shape: tuple, resized: tuple, padded: tuple, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mask2former, "_SHORTEST", 800)
    monkeypatch.setattr(mask2former, "_LONGEST", 1333)
    image = resize(torch.full((1, 3, *shape), 0.5))
    pixels = prepare(image)
    assert image.shape[2:] == resized
    assert pixels.shape[2:] == padded
    assert pixels[0, 0, 0, 0] == pytest.approx((0.5 - 0.485) / 0.229)
    assert (pixels[..., resized[0] :, :] == 0).all()


def test_a_box_holds_its_mask():
    mask = torch.zeros(8, 9, dtype=torch.bool)
    assert box_of(mask) == (0, 0, 0, 0)
    mask[2:5, 3:9] = True
    assert box_of(mask) == (3, 2, 9, 5)


def test_a_colour_is_the_nearest_of_the_texts(folders: dict[str, str]):
    """Against a transcription on the whole CLIP model, from PIL-like crops."""
    reward = GenEval(**folders, device="cpu")
    model: Any = CLIPModel.from_pretrained(folders["clip_model"]).eval()
    tokenizer = tiny_rewards.clip_words()
    image = images(3)[0]
    mask = torch.zeros(40, 56, dtype=torch.bool)
    mask[4:30, 10:36] = True
    mask[10:14, 12:20] = False
    instance = Instance("car", 0.9, (10, 4, 36, 30), mask)

    def text(colour: str) -> torch.Tensor:
        templates = (
            f"a photo of a {colour} car",
            f"a photo of a {colour}-colored car",
            f"a photo of a {colour} object",
        )
        rows = []
        for words in templates:
            ids = torch.tensor([tokenizer(words)["input_ids"]])
            row = model.get_text_features(ids[:, : tiny_rewards.MAX_TOKENS]).pooler_output[0]
            rows.append(row / row.norm())
        mean = torch.stack(rows).mean(dim=0)
        return mean / mean.norm()

    with torch.no_grad():
        grey = torch.where(mask, image, torch.tensor(0.6))[:, 4:30, 10:36]
        pixels = reward._images.prepare(grey[None])
        embedded = model.get_image_features(pixels).pooler_output[0]
        scores = [float(text(colour) @ embedded / embedded.norm()) for colour in COLOURS]
    ours = reward._classifier("car") @ embedded / embedded.norm()
    np.testing.assert_allclose(ours.tolist(), scores, atol=1e-5)
    assert reward.colour(image, instance, "car") == COLOURS[int(np.argmax(scores))]


def test_scores_are_finite_and_do_not_depend_on_the_batch_or_on_threads(folders: dict[str, str]):
    reward = build_reward("geneval", {**folders, "device": "cpu", "batch_size": 3})
    whole = reward(images(), PROMPTS)
    assert whole.dtype == torch.float32
    assert ((whole >= 0) & (whole <= 1)).all()
    parts = torch.cat([reward(images()[row : row + 1], PROMPTS[row : row + 1]) for row in range(4)])
    assert torch.equal(parts, whole)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(reward(images(), PROMPTS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, whole) for result in results)
    for value in (0.0, 1.0):
        assert torch.isfinite(reward(torch.full((4, 3, 40, 40), value), PROMPTS)).all()


def seen(monkeypatch: pytest.MonkeyPatch, reward: GenEval, of_image: list[Instance]) -> list[float]:
    """Replaces what the segmenter finds; the list fills with the thresholds that it is asked for."""
    thresholds: list[float] = []

    def find(images, wanted, threshold):
        thresholds.extend([threshold] * len(images))
        return [of_image for _ in images]

    find.names = tiny_detectors.CLASSES  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(reward, "_segmenter", find)
    return thresholds


def instances(name: str, count: int) -> list[Instance]:
    return [Instance(name, 0.95, (0, 0, 10, 10), torch.ones(40, 56, dtype=torch.bool)) for _ in range(count)]


@pytest.mark.parametrize(("rule", "expected"), [("graded", 0.5), ("strict", 0.0), ("benchmark", 0.0)])
def test_the_rule_is_the_one_that_is_named(rule: str, expected: float, folders: dict[str, str], monkeypatch):
    reward = GenEval(**folders, rule=rule, device="cpu")  # pyright: ignore[reportArgumentType]
    seen(monkeypatch, reward, instances("dog", 3))
    assert reward(images()[:1], [Prompt("a photo of two dogs")]).item() == expected


def test_prompts_that_count_have_the_higher_threshold(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    reward = GenEval(**folders, device="cpu")
    thresholds = seen(monkeypatch, reward, [])
    reward(images(), PROMPTS)
    assert thresholds == [0.3, 0.3, 0.3, 0.9]


def test_at_most_sixteen_of_a_class_count(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    reward = GenEval(**folders, device="cpu")
    metadata = '{"include": [{"class": "dog", "count": 20}]}'
    seen(monkeypatch, reward, instances("dog", 30))
    assert reward(images()[:1], [Prompt("x", metadata=metadata)]).item() == pytest.approx(1 - 4 / 20)


def test_a_class_has_the_name_of_the_prompt_or_of_the_model(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    reward = GenEval(**folders, device="cpu")
    seen(monkeypatch, reward, instances("mouse", 1))
    prompts = [Prompt("a photo of a computer mouse"), Prompt("a photo of a mouse")]
    assert reward(images()[:2], prompts).tolist() == [1, 1]
    with pytest.raises(ValueError, match="finds no 'unicorn'; it knows person, bicycle, car"):
        reward(images()[:1], [Prompt("a photo of a unicorn")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "kind"}, "rule=kind is unknown; give graded, strict, benchmark"),
        ({"batch_size": 0}, "batch_size=0 is no"),
    ],
)
def test_a_mistake_is_one_line(arguments: dict, message: str, folders: dict[str, str]):
    with pytest.raises(ValueError, match=message):
        build_reward("geneval", {**folders, **arguments})
